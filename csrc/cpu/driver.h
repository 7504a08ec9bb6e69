// What the drivers of convolutions share: sizes, checks, memory. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace cnncomp {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t output_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1;
}

// Output pixels along one axis of a pooling. ceil_mode: one more window where the last ones leave pixels and it begins before the
// padding behind the image.
inline int64_t pooled_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t floor = output_size(in, taps, stride, pad, dilation);
  const bool more = ceil_mode && (in + 2 * pad - dilation * (taps - 1) - 1) % stride != 0 && floor * stride < in + pad;
  return floor + more;
}

inline float clamp(float t, float lo, float hi) {
  t = t < lo ? lo : t;  // NaN stays
  return t > hi ? hi : t;
}

// Throws std::invalid_argument, with the operator's name in front, unless the arguments' window fits the image.
template <class Args>
void check_window(const char* name, const Args& a) {
  const std::string op = name;
  if (std::min({a.r, a.s, a.stride_h, a.stride_w, a.dil_h, a.dil_w}) < 1 || a.pad_h < 0 || a.pad_w < 0) {
    throw std::invalid_argument(op + ": kernel, stride and dilation must be at least 1, padding at least 0");
  }
  if (a.h + 2 * a.pad_h <= a.dil_h * (a.r - 1) || a.w + 2 * a.pad_w <= a.dil_w * (a.s - 1)) {
    throw std::invalid_argument(op + ": the kernel is larger than the padded image");
  }
}

// Elements from a multiple of 64 bytes on; grows on demand, never shrinks, keeps nothing when it grows.
template <class T>
class AlignedArray {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<T*>(::operator new[](size * sizeof(T), kAlign)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
  int64_t size_ = 0;
};

}  // namespace cnncomp
