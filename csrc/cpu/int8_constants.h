// The constants of the int8 epilogue, as its kernels read them. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "driver.h"
#include "int8_kernels.h"

namespace cnncomp {

// The bits of a float, which order non-negative numbers as they are, and NaN above all.
inline int32_t bits(float value) {
  int32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

// The rows of a call's constants, each group padded to where the kernels may read, and what the accumulators start from.
class Int8Constants {
 public:
  // constants: (rows, groups * per_group), of which no copy is made where none is needed. The accumulators start from 0.
  void assign(const float* constants, int64_t rows, int64_t groups, int64_t per_group) {
    per_group_ = per_group;
    padded_ = ceil_div(per_group, kChannelPad) * kChannelPad;
    row_ = groups * padded_;
    init_.assign(row_, 0);
    values_ = constants;
    if (padded_ == per_group) return;
    copy_.assign(rows * row_, 0.0f);
    values_ = copy_.data();
    for (int64_t row = 0; row < rows; row++)
      for (int64_t g = 0; g < groups; g++)
        std::copy_n(constants + (row * groups + g) * per_group, per_group, copy_.data() + row * row_ + g * padded_);
  }

  // Lets epilogues round before they clamp, where the call `a` allows it: with |sum| <= 2^31, the bounds keep what is
  // rounded below 2^30; no nonlinearity makes a number larger. After assign.
  template <class Args>
  void use_bytes(const Args& a) {
    const bool float_residual = a.residual != nullptr && a.residual_dtype == kF32;
    int32_t scale = 0, bias = 0, hi = 0;
    for (int64_t k = 0; k < a.k; k++) {
      scale = std::max(scale, bits(a.constants[k]) & INT32_MAX);
      bias = std::max(bias, bits(a.constants[a.k + k]) & INT32_MAX);
      hi = std::max(hi, bits(a.constants[2 * a.k + k]) & INT32_MAX);
    }
    const float step = a.nonlinearity == kNone ? 1.0f : std::min(1.0f / a.out_factor, 0x1p60f);
    set_bytes(a, a.out_dtype != kF32 && !float_residual && !std::isnan(a.lo) && scale < bits(0.25f * step) &&
                     bias < bits(0x1p28f * step) && hi <= bits(INFINITY) &&
                     (a.residual == nullptr || std::abs(a.residual_scale) < 0x1p20f * step));
  }

  // The same where the caller knows whether what is rounded `fits` an int32; no bound is NaN then.
  template <class Args>
  void set_bytes(const Args& a, bool fits) {
    bytes_ = fits;
    if (!fits) return;
    const float least = a.out_dtype == kS8 ? -128.0f : 0.0f, most = a.out_dtype == kS8 ? 127.0f : 255.0f;
    int32_t least_hi = INT32_MAX;
    for (int64_t k = 0; k < a.k; k++) least_hi = std::min(least_hi, bits(a.constants[2 * a.k + k]));
    const auto byte = [&](float bound) { return static_cast<uint8_t>(std::lrintf(std::clamp(bound, least, most))); };
    lo_byte_ = byte(a.lo);
    hi_bytes_.resize(a.lo > least || least_hi < bits(most) ? row_ : 0);
    for (size_t i = 0; i < hi_bytes_.size(); i++) hi_bytes_[i] = byte(values_[2 * row_ + i]);
  }

  bool bytes() const { return bytes_; }

  int32_t* init(int64_t group, int64_t channel = 0) { return init_.data() + group * padded_ + channel; }
  const int32_t* init(int64_t group, int64_t channel = 0) const { return init_.data() + group * padded_ + channel; }

  // Of the call `a`, from a pixel, and a channel of a group, on; without a shift.
  template <class Args>
  Int8Epilogue epilogue(const Args& a, int64_t pixel, int64_t group, int64_t channel) const {
    const float* const scale = values_ + group * padded_ + channel;
    const int64_t at = pixel * a.k + group * per_group_ + channel;
    const auto bytes = [](Dtype dtype) { return dtype == kF32 ? 4 : 1; };
    return {scale,
            scale + row_,
            scale + 2 * row_,
            a.lo,
            a.residual_scale,
            a.residual_dtype,
            a.out_dtype,
            a.residual == nullptr ? nullptr : a.residual + at * bytes(a.residual_dtype),
            a.out + at * bytes(a.out_dtype),
            a.k,
            per_group_ - channel,
            nullptr,
            nullptr,
            false,
            bytes_,
            lo_byte_,
            hi_bytes_.empty() ? nullptr : hi_bytes_.data() + group * padded_ + channel,
            a.nonlinearity,
            a.out_factor};
  }

  // The fourth row, for weights with a shift.
  const float* shift(int64_t group, int64_t channel) const { return values_ + 3 * row_ + group * padded_ + channel; }

 private:
  int64_t per_group_ = 0, padded_ = 0, row_ = 0;
  const float* values_ = nullptr;
  std::vector<float> copy_;
  std::vector<int32_t> init_;
  bool bytes_ = false;
  uint8_t lo_byte_ = 0;
  std::vector<uint8_t> hi_bytes_;
};

}  // namespace cnncomp
