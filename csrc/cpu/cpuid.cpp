#include "cpuid.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define CNNCOMP_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace cnncomp {
namespace {

#ifdef CNNCOMP_X86
uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }
#elif defined(__aarch64__) && defined(__linux__)
// Of the kernel's interface, in which bits never change; old headers lack the names.
bool has_dotprod() { return (getauxval(AT_HWCAP) >> 20) & 1; }  // HWCAP_ASIMDDP
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13) & 1; }    // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
  int32_t value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__)
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::baseline};
#ifdef CNNCOMP_X86
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28);
  if (!osxsave || !avx || !fma) return found;
  const uint64_t state = xgetbv0();
  if ((state & 0x6) != 0x6) return found;  // the system keeps the ymm registers
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return found;
  found.push_back(Isa::avx2);
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool avx512 = zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  const bool avx512vnni = avx512 && bit(c, 11);
  uint32_t a1, b1, c1, d1;
  if (__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && bit(a1, 4)) found.push_back(Isa::avxvnni);
  if (avx512) found.push_back(Isa::avx512);
  if (avx512vnni) found.push_back(Isa::avx512vnni);
#elif defined(__aarch64__)
  if (has_dotprod()) found.push_back(Isa::dotprod);
  if (has_dotprod() && has_i8mm()) found.push_back(Isa::i8mm);
#endif
  return found;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{isa_available().back()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "dotprod", "i8mm"};
  return names[static_cast<int>(isa)];
}

const std::vector<Isa>& isa_available() {
  static const std::vector<Isa> found = detect();
  return found;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
  for (Isa isa : isa_available()) {
    if (name == isa_name(isa)) {
      current().store(isa);
      return;
    }
  }
  std::string known;
  for (Isa isa : isa_available()) known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  throw std::invalid_argument("isa: got '" + name + "', expected one of " + known);
}

}  // namespace cnncomp
