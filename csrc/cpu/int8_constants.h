// The constants of the int8 epilogue, as its kernels read them. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "driver.h"
#include "int8_kernels.h"

namespace cnncomp {

// The rows of a call's constants, each group padded to where the kernels may read, and what the accumulators start from.
class Int8Constants {
 public:
  // constants: (rows, groups * per_group). The accumulators start from 0.
  void assign(const float* constants, int64_t rows, int64_t groups, int64_t per_group) {
    per_group_ = per_group;
    padded_ = ceil_div(per_group, kChannelPad) * kChannelPad;
    row_ = groups * padded_;
    values_.assign(rows * row_, 0.0f);
    init_.assign(row_, 0);
    for (int64_t row = 0; row < rows; row++)
      for (int64_t g = 0; g < groups; g++)
        std::copy_n(constants + (row * groups + g) * per_group, per_group, values_.data() + row * row_ + g * padded_);
  }

  int32_t* init(int64_t group, int64_t channel = 0) { return init_.data() + group * padded_ + channel; }
  const int32_t* init(int64_t group, int64_t channel = 0) const { return init_.data() + group * padded_ + channel; }

  // Of the call `a`, from a pixel, and a channel of a group, on; without a shift.
  template <class Args>
  Int8Epilogue epilogue(const Args& a, int64_t pixel, int64_t group, int64_t channel) const {
    const float* const scale = values_.data() + group * padded_ + channel;
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
            false};
  }

  // The fourth row, for weights with a shift.
  const float* shift(int64_t group, int64_t channel) const { return values_.data() + 3 * row_ + group * padded_ + channel; }

 private:
  int64_t per_group_ = 0, padded_ = 0, row_ = 0;
  std::vector<float> values_;
  std::vector<int32_t> init_;
};

}  // namespace cnncomp
