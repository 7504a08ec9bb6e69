// Which instruction set the kernels use.
#pragma once

#include <string>
#include <vector>

namespace cnncomp {

enum class Isa { baseline, avx2, avxvnni, avx512, avx512vnni };

const char* isa_name(Isa isa);

// The instruction sets that this CPU and operating system can run, from the plainest on.
const std::vector<Isa>& isa_available();

// The one in use: the last of isa_available(), unless set_isa chose another.
Isa current_isa();

// Throws std::invalid_argument for a name that is unknown or not available here. Process-wide; for tests and measurements.
void set_isa(const std::string& name);

}  // namespace cnncomp
