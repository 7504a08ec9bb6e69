#include "conv2d_int8.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpuid.h"
#include "driver.h"
#include "int8_constants.h"
#include "parallel.h"

namespace cnncomp {

const Int8Kernels& int8_kernels() {
#if defined(__x86_64__) || defined(__i386__)
  switch (current_isa()) {
    case Isa::avx512vnni: return kInt8Avx512Vnni;
    case Isa::avx512: return kInt8Avx512;
    case Isa::avxvnni: return kInt8AvxVnni;
    case Isa::avx2: return kInt8Avx2;
    case Isa::baseline: break;
  }
#endif
  return kInt8Baseline;
}

namespace {

// Where the channels of the input pixel under each tap begin, for a run of output pixels. Taps outside the image point at
// zeros. No row reaches past the tensor: the last pixels' rows lie in a copy that zeros follow.
class Rows {
 public:
  // row_bytes: how much of a row is read; slots: pointers per pixel, those after the taps point at zeros.
  Rows(const Conv2dInt8Args& a, int64_t row_bytes, int64_t slots)
      : a_(a),
        p_(output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h)),
        q_(output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w)),
        row_bytes_(row_bytes),
        slots_(slots),
        size_(a.n * a.h * a.w * a.c),
        tail_size_(std::min(size_, row_bytes)),
        pixel_by_pixel_(slots == 1 && std::max(a.stride_h, a.stride_w) == 1 && std::max(a.pad_h, a.pad_w) == 0),
        zeros_(row_bytes),
        tail_(tail_size_ + row_bytes),
        tap_offset_(a.r * a.s) {
    if (tail_size_ > 0) std::memcpy(tail_.data(), a.x + size_ - tail_size_, tail_size_);
    for (int64_t r = 0; r < a.r; r++)
      for (int64_t s = 0; s < a.s; s++) tap_offset_[r * a.s + s] = (r * a.dil_h * a.w + s * a.dil_w) * a.c;
  }

  int64_t pixels() const { return a_.n * p_ * q_; }
  int64_t slots() const { return slots_; }

  // rows: (count, slots). channel: where to begin in each input pixel.
  void fill(int64_t first, int64_t count, int64_t channel, const uint8_t** rows) const {
    if (pixel_by_pixel_) {
      const uint8_t* const from = a_.x + first * a_.c + channel;
      const int64_t last = size_ - row_bytes_ - channel, inside = last < 0 ? 0 : std::min(count, last / a_.c + 1 - first);
      for (int64_t i = 0; i < inside; i++) rows[i] = from + i * a_.c;
      for (int64_t i = std::max<int64_t>(inside, 0); i < count; i++)
        rows[i] = tail_.data() + ((first + i) * a_.c + channel - (size_ - tail_size_));
      return;
    }
    int64_t q = first % q_, p = first / q_ % p_, n = first / (q_ * p_);
    const int64_t taps = a_.r * a_.s, slots = slots_, last = size_ - row_bytes_ - tap_offset_[taps - 1];
    const int64_t reach_h = (a_.r - 1) * a_.dil_h, reach_w = (a_.s - 1) * a_.dil_w;
    const int64_t* __restrict tap_offset = tap_offset_.data();
    for (int64_t i = 0; i < count; i++, rows += slots) {
      const int64_t h = p * a_.stride_h - a_.pad_h, w = q * a_.stride_w - a_.pad_w;
      const int64_t at = ((n * a_.h + h) * a_.w + w) * a_.c + channel;
      if (h >= 0 && w >= 0 && h + reach_h < a_.h && w + reach_w < a_.w && at <= last) {
        const uint8_t* const base = a_.x + at;
        const uint8_t** __restrict row = rows;
        for (int64_t t = 0; t < taps; t++) row[t] = base + tap_offset[t];
      } else {
        fill_border(h, w, at, rows);
      }
      for (int64_t t = taps; t < slots; t++) rows[t] = zeros_.data();
      if (++q == q_) q = 0, ++p;
      if (p == p_) p = 0, ++n;
    }
  }

 private:
  void fill_border(int64_t h, int64_t w, int64_t at, const uint8_t** rows) const {
    for (int64_t r = 0; r < a_.r; r++) {
      const int64_t hr = h + r * a_.dil_h;
      for (int64_t s = 0; s < a_.s; s++) {
        const int64_t ws = w + s * a_.dil_w, t = r * a_.s + s, offset = at + tap_offset_[t];
        if (hr < 0 || hr >= a_.h || ws < 0 || ws >= a_.w) {
          rows[t] = zeros_.data();
        } else if (offset + row_bytes_ > size_) {
          rows[t] = tail_.data() + (offset - (size_ - tail_size_));
        } else {
          rows[t] = a_.x + offset;
        }
      }
    }
  }

  const Conv2dInt8Args& a_;
  const int64_t p_, q_, row_bytes_, slots_, size_, tail_size_;
  const bool pixel_by_pixel_;  // the output's pixels are the input's
  std::vector<uint8_t> zeros_, tail_;
  std::vector<int64_t> tap_offset_;
};

// blocks: of 16 output channels in a group; quads: in a block.
Int8Constants make_constants(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t groups, int64_t blocks,
                             int64_t quads) {
  Int8Constants constants;
  constants.assign(a.constants, a.shifted ? 4 : 3, groups, a.k / groups);
  constants.use_bytes(a);
  if (!a.x_signed) return constants;
  // The kernels see x + 128.
  parallel_for(a.num_threads, groups * blocks, [&](int64_t i) {
    int32_t* sums = constants.init(i / blocks, i % blocks * kBlock);
    kernels.sum_weights(a.weight + i * quads * 4 * kBlock, quads, sums);
    for (int j = 0; j < kBlock; j++) sums[j] *= -128;
  });
  return constants;
}

// The first block of a panel: panels are full but for the last, or the last two where one block would be left.
int64_t panel_begin(int64_t panel, int64_t panels, int64_t blocks, int64_t max_blocks) {
  const int64_t begin = std::min(panel * max_blocks, blocks);
  return panel == panels - 1 && panels > 1 && blocks - begin == 1 && max_blocks > 2 ? begin - 1 : begin;
}

// In how many runs of pixels, and in how many ranges of output channels, to cut the work.
struct Plan {
  int64_t runs, ranges;
};

// A run's row pointers and input stay in the second-level cache while the weights of all its panels go by.
Plan make_plan(int64_t pixels, int64_t slots, int64_t c, int64_t groups, int64_t panels, int64_t num_threads) {
  constexpr int64_t kRun = 256, kRowsBytes = 64 << 10, kInputBytes = 256 << 10, kTasksPerThread = 4, kMinRun = 16;
  const int64_t most = std::min({kRun, kRowsBytes / (8 * slots), kInputBytes / c});
  Plan plan{ceil_div(pixels, std::max(most, kMinRun)), 1};
  if (num_threads > 1) {
    const int64_t wanted = kTasksPerThread * num_threads;
    plan.ranges = std::clamp<int64_t>(ceil_div(wanted, plan.runs * groups), 1, panels);
    const int64_t runs = ceil_div(wanted, plan.ranges * groups);
    plan.runs = std::max(plan.runs, std::min(runs, ceil_div(pixels, kMinRun)));
  }
  return plan;
}

thread_local AlignedArray<const uint8_t*> rows_scratch;
thread_local AlignedArray<int8_t> weight_scratch;
thread_local AlignedArray<int32_t> window_scratch;

void dense(const Conv2dInt8Args& a, const Int8Kernels& kernels) {
  const int64_t group_c = a.c / a.groups, group_k = a.k / a.groups, taps = a.r * a.s;
  const int64_t quads = ceil_div(group_c, 4), blocks = ceil_div(group_k, kBlock);
  const int64_t panels = ceil_div(blocks, kernels.max_blocks);
  const int64_t block_bytes = taps * quads * 4 * kBlock;
  const Rows rows(a, 4 * quads, taps);
  const Int8Constants constants = make_constants(a, kernels, a.groups, blocks, taps * quads);
  const int64_t pixels = rows.pixels();
  const Plan plan = make_plan(pixels, taps, a.c, a.groups, panels, a.num_threads);
  parallel_for(a.num_threads, a.groups * plan.runs * plan.ranges, [&](int64_t task) {
    const int64_t range = task % plan.ranges, run = task / plan.ranges % plan.runs, g = task / (plan.ranges * plan.runs);
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    const auto table = rows_scratch.get(count * taps);
    rows.fill(begin, count, g * group_c, table);
    int32_t* window = nullptr;
    if (a.shifted) {
      window = window_scratch.get(count);
      kernels.sum_rows(table, count, taps, group_c, a.x_signed, window);
    }
    const int64_t last = panels * (range + 1) / plan.ranges;
    for (int64_t panel = panels * range / plan.ranges; panel < last; panel++) {
      const int64_t block = panel_begin(panel, panels, blocks, kernels.max_blocks);
      const int64_t end = panel_begin(panel + 1, panels, blocks, kernels.max_blocks), channel = block * kBlock;
      Int8Epilogue epilogue = constants.epilogue(a, begin, g, channel);
      if (a.shifted) {
        epilogue.shift = constants.shift(g, channel);
        epilogue.window = window;
      }
      kernels.conv({table, count, taps, quads, a.x_signed, a.weight + (g * blocks + block) * block_bytes, end - block,
                    constants.init(g, channel), epilogue});
    }
  });
}

void depthwise(const Conv2dInt8Args& a, const Int8Kernels& kernels) {
  const int64_t quads = ceil_div(a.r * a.s, 4), blocks = ceil_div(a.c, kBlock);
  const Rows rows(a, blocks * kBlock, 4 * quads);
  const Int8Constants constants = make_constants(a, kernels, 1, blocks, quads);
  const int64_t pixels = rows.pixels();
  const Plan plan = make_plan(pixels, 4 * quads, a.c, 1, 1, a.num_threads);
  parallel_for(a.num_threads, plan.runs, [&](int64_t run) {
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    const auto table = rows_scratch.get(count * rows.slots());
    rows.fill(begin, count, 0, table);
    Int8Epilogue epilogue = constants.epilogue(a, begin, 0, 0);
    if (a.shifted) epilogue.shift = constants.shift(0, 0);
    kernels.depthwise({table, count, quads, a.x_signed, a.weight, blocks, constants.init(0),
                       weight_scratch.get(quads * 4 * kChannelPad), epilogue});
  });
}

}  // namespace

void conv2d_int8(const Conv2dInt8Args& a) {
  if (a.n * a.k == 0) return;
  (a.depthwise ? depthwise : dense)(a, int8_kernels());
}

}  // namespace cnncomp
