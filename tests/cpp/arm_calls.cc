// The int8 convolution without an operating system, for an emulator of 64-bit ARM: entry(isa, args), on one thread.
#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/conv2d_int8.h"
#include "cpu/cpuid.h"
#include "cpu/parallel.h"

namespace {
cnncomp::Isa isa;
alignas(64) char heap[16 << 20];
size_t used;  // by this call: nothing is freed

void* allocate(size_t bytes, size_t alignment) {
  used = (used + alignment - 1) / alignment * alignment;
  void* const p = heap + used;
  used += bytes;
  if (used > sizeof(heap)) __builtin_trap();
  return p;
}
}  // namespace

namespace cnncomp {
Isa current_isa() { return isa; }
void parallel_for(int, int64_t tasks, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < tasks; i++) task(i);
}
}  // namespace cnncomp

void* operator new(size_t bytes) { return allocate(bytes, 16); }
void* operator new[](size_t bytes, std::align_val_t alignment) { return allocate(bytes, static_cast<size_t>(alignment)); }
void operator delete(void*) noexcept {}
void operator delete(void*, size_t) noexcept {}
void operator delete[](void*, std::align_val_t) noexcept {}
namespace std {
inline namespace __1 {
[[noreturn]] void __libcpp_verbose_abort(const char*, ...) noexcept { __builtin_trap(); }
}  // namespace __1
}  // namespace std

extern "C" {
void* __dso_handle;
int __cxa_atexit(void (*)(void*), void*, void*) { return 0; }
void* memcpy(void* to, const void* from, size_t n) {
  for (size_t i = 0; i < n; i++) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
  return to;
}
void* memmove(void* to, const void* from, size_t n) {
  if (to <= from) return memcpy(to, from, n);
  while (n-- > 0) static_cast<char*>(to)[n] = static_cast<const char*>(from)[n];
  return to;
}
void* memset(void* to, int value, size_t n) {
  for (size_t i = 0; i < n; i++) static_cast<char*>(to)[i] = static_cast<char>(value);
  return to;
}
void entry(int which, const cnncomp::Conv2dInt8Args* args) {
  isa = static_cast<cnncomp::Isa>(which);
  cnncomp::conv2d_int8(*args);
}
}
