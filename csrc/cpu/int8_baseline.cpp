// The int8 kernels for any processor: SSE2 on x86, NEON on 64-bit ARM, plain C++ elsewhere.
#include "simd128.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

constexpr int kPixels[kMaxBlocks] = {2};

}  // namespace

const Int8Kernels kInt8Baseline = int8_kernels_of<8, Vec128>(conv_one_block<Vec128, kPixels[0]>, kPixels);

}  // namespace cnncomp
