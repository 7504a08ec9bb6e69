// Which instruction set the kernels use.
#pragma once

#include <string>
#include <vector>

namespace cnncomp {

enum class Isa { baseline, avx2, avxvnni, avx512, avx512vnni, dotprod, i8mm };

const char* isa_name(Isa isa);

// The instruction sets that this CPU and operating system can run, from the plainest on.
const std::vector<Isa>& isa_available();

// The one in use: the last of isa_available(), unless set_isa chose another.
Isa current_isa();

// Of the fp32 kernels that are called name##Baseline, name##Avx2 and name##Avx512, those for the one in use.
#if defined(__x86_64__)
#define CNNCOMP_FP32_KERNELS(name) ::cnncomp::fp32_kernels(name##Baseline, name##Avx2, name##Avx512)
template <class T>
const T& fp32_kernels(const T& baseline, const T& avx2, const T& avx512) {
  const Isa isa = current_isa();
  if (isa == Isa::avx512 || isa == Isa::avx512vnni) return avx512;
  return isa != Isa::baseline ? avx2 : baseline;
}
#else
#define CNNCOMP_FP32_KERNELS(name) name##Baseline
#endif

// Throws std::invalid_argument for a name that is unknown or not available here. Process-wide; for tests and measurements.
void set_isa(const std::string& name);

}  // namespace cnncomp
