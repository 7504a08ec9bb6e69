// What the drivers of the dense and the depthwise int8 convolution share. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "conv2d_int8.h"
#include "driver.h"
#include "int8_constants.h"
#include "parallel.h"

namespace cnncomp {

// A tap of the window, or none.
struct Tap {
  int64_t r, s;
  bool none = false;
};

// Whether the output's pixels are the input's.
inline bool is_pixel_by_pixel(const Conv2dInt8Args& a, int64_t taps, int64_t q) {
  return taps == 1 && std::max(a.stride_h, a.stride_w) == 1 && std::max(a.pad_h, a.pad_w) == 0 && q == a.w;
}

// Where the channels of the input pixel under each tap begin, for a run of output pixels. Taps outside the image, and those
// that are none, point at zeros. No row reaches past the tensor: the last pixels' rows lie in a copy that zeros follow.
class ConvRows {
 public:
  // row_bytes: how much of a row is read; q: columns of the output; taps: of each pixel's pointers; zero: what zeros became
  // where the input was flipped.
  ConvRows(const Conv2dInt8Args& a, int64_t row_bytes, int64_t q, std::vector<Tap> taps, uint8_t zero = 0)
      : a_(a),
        p_(output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h)),
        q_(q),
        row_bytes_(row_bytes),
        size_(a.n * a.h * a.w * a.c),
        tail_size_(std::min(size_, row_bytes)),
        pixel_by_pixel_(is_pixel_by_pixel(a, static_cast<int64_t>(taps.size()), q)),
        zeros_(row_bytes, zero),
        tail_(tail_size_ + row_bytes),
        taps_(std::move(taps)) {
    if (tail_size_ > 0) std::memcpy(tail_.data(), a.x + size_ - tail_size_, tail_size_);
    for (const Tap& tap : taps_) tap_offset_.push_back((tap.r * a.dil_h * a.w + tap.s * a.dil_w) * a.c);
  }

  int64_t pixels() const { return a_.n * p_ * q_; }
  int64_t taps() const { return static_cast<int64_t>(taps_.size()); }

  // rows: (count, taps). channel: where to begin in each input pixel.
  void fill(int64_t first, int64_t count, int64_t channel, const uint8_t** rows) const {
    if (pixel_by_pixel_) {
      const uint8_t* const from = a_.x + first * a_.c + channel;
      const int64_t last = size_ - row_bytes_ - channel, inside = last < 0 ? 0 : std::min(count, last / a_.c + 1 - first);
      for (int64_t i = 0; i < inside; i++) rows[i] = from + i * a_.c;
      for (int64_t i = std::max<int64_t>(inside, 0); i < count; i++)
        rows[i] = tail_.data() + ((first + i) * a_.c + channel - (size_ - tail_size_));
      return;
    }
    const int64_t num_taps = taps(), last = size_ - row_bytes_ - *std::max_element(tap_offset_.begin(), tap_offset_.end());
    const int64_t reach_h = (a_.r - 1) * a_.dil_h, reach_w = (a_.s - 1) * a_.dil_w, step = a_.stride_w * a_.c;
    int64_t q = first % q_, p = first / q_ % p_, n = first / (q_ * p_);
    for (int64_t left = count; left > 0;) {
      const int64_t h = p * a_.stride_h - a_.pad_h, end = std::min(q_, q + left);
      // Where column 0 of the output begins to read. The columns [from, to) read no border and nothing past the last row.
      const int64_t at = ((n * a_.h + h) * a_.w - a_.pad_w) * a_.c + channel;
      const bool inside = h >= 0 && h + reach_h < a_.h && a_.w + a_.pad_w > reach_w && at <= last;
      const int64_t from = inside ? std::clamp(ceil_div(a_.pad_w, a_.stride_w), q, end) : end;
      const int64_t width = (a_.w + a_.pad_w - reach_w - 1) / a_.stride_w + 1;
      const int64_t to = inside ? std::clamp(std::min(width, (last - at) / step + 1), from, end) : end;
      left -= end - q;
      for (; q < from; q++, rows += num_taps) fill_border(h, q * a_.stride_w - a_.pad_w, at + q * step, rows);
      fill_inside(to - q, at + q * step, rows);
      rows += (to - q) * num_taps;
      for (q = to; q < end; q++, rows += num_taps) fill_border(h, q * a_.stride_w - a_.pad_w, at + q * step, rows);
      q = 0;
      if (++p == p_) p = 0, ++n;
    }
  }

 private:
  void fill_inside(int64_t count, int64_t at, const uint8_t** rows) const {
    const int64_t num_taps = taps(), step = a_.stride_w * a_.c;
    for (int64_t t = 0; t < num_taps; t++) {
      const uint8_t* const from = taps_[t].none ? zeros_.data() : a_.x + at + tap_offset_[t];
      const int64_t stride = taps_[t].none ? 0 : step;
      for (int64_t i = 0; i < count; i++) rows[i * num_taps + t] = from + i * stride;
    }
  }

  void fill_border(int64_t h, int64_t w, int64_t at, const uint8_t** rows) const {
    for (size_t t = 0; t < taps_.size(); t++) {
      const int64_t hr = h + taps_[t].r * a_.dil_h, ws = w + taps_[t].s * a_.dil_w, offset = at + tap_offset_[t];
      if (taps_[t].none || hr < 0 || hr >= a_.h || ws < 0 || ws >= a_.w) {
        rows[t] = zeros_.data();
      } else if (offset + row_bytes_ > size_) {
        rows[t] = tail_.data() + (offset - (size_ - tail_size_));
      } else {
        rows[t] = a_.x + offset;
      }
    }
  }

  const Conv2dInt8Args& a_;
  const int64_t p_, q_, row_bytes_, size_, tail_size_;
  const bool pixel_by_pixel_;
  std::vector<uint8_t> zeros_, tail_;
  std::vector<Tap> taps_;
  std::vector<int64_t> tap_offset_;
};

// blocks: of 16 output channels in a group; quads: in a block.
inline Int8Constants make_constants(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t groups, int64_t blocks,
                             int64_t quads) {
  Int8Constants constants;
  constants.assign(a.constants, a.shifted ? 4 : 3, groups, a.k / groups);
  constants.use_bytes(a);
  if (a.x_signed == (kernels.flips_unsigned && !a.depthwise)) return constants;
  // The kernels see x + 128, or x - 128.
  parallel_for(a.num_threads, groups * blocks, [&](int64_t i) {
    int32_t* sums = constants.init(i / blocks, i % blocks * kBlock);
    kernels.sum_weights(a.weight + i * quads * 4 * kBlock, quads, sums);
    for (int j = 0; j < kBlock; j++) sums[j] *= a.x_signed ? -128 : 128;
  });
  return constants;
}

// In how many runs of pixels, and in how many ranges of output channels, to cut the work.
struct ConvPlan {
  int64_t runs, ranges;
};

// A run's row pointers and input stay in the second-level cache while the weights of all its panels go by.
inline ConvPlan make_plan(int64_t pixels, int64_t slots, int64_t c, int64_t groups, int64_t panels, int64_t num_threads) {
  constexpr int64_t kRun = 256, kRowsBytes = 64 << 10, kInputBytes = 256 << 10, kTasksPerThread = 4, kMinRun = 16;
  const int64_t most = std::min({kRun, kRowsBytes / (8 * slots), kInputBytes / c});
  ConvPlan plan{ceil_div(pixels, std::max(most, kMinRun)), 1};
  if (num_threads > 1) {
    const int64_t wanted = kTasksPerThread * num_threads;
    plan.ranges = std::clamp<int64_t>(ceil_div(wanted, plan.runs * groups), 1, panels);
    const int64_t runs = ceil_div(wanted, plan.ranges * groups);
    plan.runs = std::max(plan.runs, std::min(runs, ceil_div(pixels, kMinRun)));
  }
  return plan;
}

inline int64_t output_columns(const Conv2dInt8Args& a) { return output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w); }

void depthwise_int8(const Conv2dInt8Args& a, const Int8Kernels& kernels);

}  // namespace cnncomp
