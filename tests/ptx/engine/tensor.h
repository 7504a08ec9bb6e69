// Element types of the tensor-core instructions.
#pragma once

#include "lanes.h"

namespace ptx {

enum Element { kS8, kU8, kF16, kBF16, kTF32 };

inline int element_bytes(Element e) { return e <= kU8 ? 1 : e == kTF32 ? 4 : 2; }

// A floating-point element of 16 bits or tf32.
float element_float(Element type, const uint8_t* at);

}  // namespace ptx
