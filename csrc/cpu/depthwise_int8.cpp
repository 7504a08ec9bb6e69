// Depthwise int8 convolution: by columns where a kernel knows the window, else pixel by pixel.
#include "conv2d_int8_driver.h"

namespace cnncomp {
namespace {

thread_local AlignedArray<const uint8_t*> rows_scratch;
thread_local AlignedArray<int8_t> weight_scratch;

// The packed weights' order: quads of taps down each column of the window; along it where it is one row.
std::vector<Tap> quads_of_taps(const Conv2dInt8Args& a) {
  const bool one_row = a.r == 1;
  const int64_t length = one_row ? a.s : a.r;
  std::vector<Tap> taps;
  for (int64_t s = 0; s < (one_row ? 1 : a.s); s++)
    for (int64_t i = 0; i < ceil_div(length, 4) * 4; i++)
      taps.push_back(i >= length ? Tap{0, 0, true} : one_row ? Tap{0, i} : Tap{i, s});
  return taps;
}

void by_pixels(const Conv2dInt8Args& a, const Int8Kernels& kernels, const Int8Constants& constants, std::vector<Tap> taps) {
  const int64_t quads = static_cast<int64_t>(taps.size()) / 4, blocks = ceil_div(a.c, kBlock);
  const ConvRows rows(a, blocks * kBlock, output_columns(a), std::move(taps));
  const int64_t pixels = rows.pixels();
  const ConvPlan plan = make_plan(pixels, 4 * quads, a.c, 1, 1, a.num_threads);
  parallel_for(a.num_threads, plan.runs, [&](int64_t run) {
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    const auto table = rows_scratch.get(count * rows.taps());
    rows.fill(begin, count, 0, table);
    Int8Epilogue epilogue = constants.epilogue(a, begin, 0, 0);
    if (a.shifted) epilogue.shift = constants.shift(0, 0);
    kernels.depthwise({table, count, quads, a.x_signed, a.weight, blocks, constants.init(0),
                       weight_scratch.get(quads * 4 * kChannelPad), epilogue});
  });
}

// The rows of the input as the kernels may read them: whole blocks of channels of the last column, too.
class InputRows {
 public:
  explicit InputRows(const Conv2dInt8Args& a) : a_(a), row_(a.w * a.c), zeros_(row_ + kBlock) {
    const int64_t rows = a.n * a.h, guarded = a.c % kBlock == 0 ? 0 : std::min(rows, ceil_div(kBlock, row_));
    tail_begin_ = rows - guarded;
    tail_.resize(guarded * row_ + kBlock);
    if (guarded > 0) std::memcpy(tail_.data(), a.x + tail_begin_ * row_, guarded * row_);
  }

  const uint8_t* zeros() const { return zeros_.data(); }
  const uint8_t* operator()(int64_t n, int64_t h) const {
    if (h < 0 || h >= a_.h) return zeros();
    const int64_t row = n * a_.h + h;
    return row < tail_begin_ ? a_.x + row * row_ : tail_.data() + (row - tail_begin_) * row_;
  }

 private:
  const Conv2dInt8Args& a_;
  const int64_t row_;
  int64_t tail_begin_;
  std::vector<uint8_t> zeros_, tail_;
};

void by_columns(const Conv2dInt8Args& a, const Int8Constants& constants, DepthwiseColumnsFn kernel) {
  constexpr int64_t kInputBytes = 256 << 10, kTasksPerThread = 4;
  const int64_t p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h), rows = a.n * p;
  const int64_t q = output_columns(a), blocks = ceil_div(a.c, kBlock);
  const int64_t quads = ceil_div(a.r, 4) * a.s, parts = ceil_div(a.c, kChannelPad);
  const InputRows input(a);
  // A run's input stays in the second-level cache while its channels go by.
  int64_t runs = ceil_div(rows, std::max<int64_t>(1, kInputBytes / (a.w * a.c * a.stride_h))), ranges = 1;
  if (a.num_threads > 1) {
    ranges = std::clamp<int64_t>(ceil_div(kTasksPerThread * a.num_threads, runs), 1, parts);
    runs = std::max(runs, std::min(rows, ceil_div(kTasksPerThread * a.num_threads, ranges)));
  }
  parallel_for(a.num_threads, runs * ranges, [&](int64_t task) {
    const int64_t run = task / ranges, range = task % ranges;
    const int64_t begin = rows * run / runs, end = rows * (run + 1) / runs;
    const auto table = rows_scratch.get((end - begin) * a.r);
    for (int64_t row = begin; row < end; row++)
      for (int64_t r = 0; r < a.r; r++)
        table[(row - begin) * a.r + r] = input(row / p, row % p * a.stride_h - a.pad_h + r * a.dil_h);
    kernel({table, end - begin, q, a.w, a.c, a.pad_w, input.zeros(), a.x_signed, a.weight, parts * range / ranges * 4,
            std::min(blocks, parts * (range + 1) / ranges * 4), constants.init(0),
            weight_scratch.get(quads * 4 * kChannelPad), constants.epilogue(a, begin * q, 0, 0)});
  });
}

}  // namespace

void depthwise_int8(const Conv2dInt8Args& a, const Int8Kernels& kernels) {
  std::vector<Tap> taps = quads_of_taps(a);
  const auto constants = make_constants(a, kernels, 1, ceil_div(a.c, kBlock), static_cast<int64_t>(taps.size()) / 4);
  const bool square = a.r == a.s && a.dil_w == 1 && (a.stride_w == 1 || a.stride_w == 2);
  const bool floats = a.out_dtype == kF32;
  if (square && (a.r == 3 || a.r == 5) && (floats || constants.bytes()) && a.residual == nullptr && !a.shifted) {
    by_columns(a, constants, kernels.depthwise_columns[floats || a.nonlinearity != kNone][a.r == 5][a.stride_w - 1]);
  } else {
    by_pixels(a, kernels, constants, std::move(taps));
  }
}

}  // namespace cnncomp
