#include "conv2d_int8.h"

#include <algorithm>

#include "conv2d_int8_driver.h"
#include "cpuid.h"
#include "parallel.h"

namespace cnncomp {

const Int8Kernels& int8_kernels() {
#if defined(__x86_64__) || defined(__i386__)
  switch (current_isa()) {
    case Isa::avx512vnni: return kInt8Avx512Vnni;
    case Isa::avx512: return kInt8Avx512;
    case Isa::avxvnni: return kInt8AvxVnni;
    case Isa::avx2: return kInt8Avx2;
    default: break;
  }
#elif defined(__aarch64__)
  switch (current_isa()) {
    case Isa::i8mm: return kInt8I8mm;
    case Isa::dotprod: return kInt8Dotprod;
    default: break;
  }
#endif
  return kInt8Baseline;
}

namespace {

// The first block of a panel: panels are full but for the last, or the last two where one block would be left.
int64_t panel_begin(int64_t panel, int64_t panels, int64_t blocks, int64_t max_blocks) {
  const int64_t begin = std::min(panel * max_blocks, blocks);
  return panel == panels - 1 && panels > 1 && blocks - begin == 1 && max_blocks > 2 ? begin - 1 : begin;
}

thread_local AlignedArray<const uint8_t*> rows_scratch;
thread_local AlignedArray<int32_t> window_scratch;
thread_local AlignedArray<uint8_t> flip_scratch, folded_scratch;

void flip_bytes(const uint8_t* __restrict from, int64_t count, uint8_t flip, uint8_t* __restrict to) {
  for (int64_t i = 0; i < count; i++) to[i] = from[i] ^ flip;
}

// Where a pixel has few channels, those of all taps in a row of the window, which lie next to each other, are taken as one
// pixel's: quads would be half empty.
bool folds(const Conv2dInt8Args& a) { return a.groups == 1 && a.c < 4 && a.s > 1 && a.dil_w == 1; }

// Whether the top bits of int8 inputs can be flipped before the kernels see them: sums of windows need them as they were.
bool can_flip(const Conv2dInt8Args& a) { return a.x_signed && !a.shifted; }

// The same convolution by a window of one column, on an image with its padding, flipped if it can be. Its pixels overlap: c is
// the step from one to the next.
struct Folded {
  Conv2dInt8Args args;
  std::vector<int8_t> weight;

  explicit Folded(const Conv2dInt8Args& a) : args(a) {
    const int64_t p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h), columns = (output_columns(a) - 1) * a.stride_w + a.s;
    args.h = (p - 1) * a.stride_h + a.dil_h * (a.r - 1) + 1;
    args.w = ceil_div(columns, a.stride_w);
    args.c = a.c * a.stride_w;
    args.s = args.stride_w = 1;
    args.pad_h = args.pad_w = 0;
    const int64_t row = args.w * args.c, left = std::min(row, a.pad_w * a.c), inside = std::min(row - left, a.w * a.c);
    uint8_t* const x = folded_scratch.get(a.n * args.h * row);
    args.x = x;
    const uint8_t flip = can_flip(a) ? 0x80 : 0;
    parallel_for(a.num_threads, a.n * args.h, [&](int64_t i) {
      const int64_t n = i / args.h, h = i % args.h - a.pad_h;
      if (h < 0 || h >= a.h) {
        std::memset(x + i * row, flip, row);
        return;
      }
      std::memset(x + i * row, flip, left);
      flip_bytes(a.x + (n * a.h + h) * a.w * a.c, inside, flip, x + i * row + left);
      std::memset(x + i * row + left + inside, flip, row - left - inside);
    });
    const int64_t rows = ceil_div(a.k, kBlock) * a.r, bytes = ceil_div(a.s * a.c, 4) * 4 * kBlock;
    weight.resize(rows * bytes);
    args.weight = weight.data();
    for (int64_t i = 0; i < rows; i++)
      for (int64_t at = 0; at < a.s * a.c; at++)
        for (int64_t k = 0; k < kBlock; k++)
          weight[i * bytes + (at / 4 * kBlock + k) * 4 + at % 4] = a.weight[((i * a.s + at / a.c) * kBlock + k) * 4 + at % a.c];
  }
};

// group_c: channels that a window sums over at each tap; q: columns of the output; flipped: whether the input is already.
void dense(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t group_c, int64_t q, bool flipped) {
  const int64_t group_k = a.k / a.groups, taps = a.r * a.s;
  const int64_t quads = ceil_div(group_c, 4), blocks = ceil_div(group_k, kBlock);
  const int64_t panels = ceil_div(blocks, kernels.max_blocks);
  const int64_t block_bytes = taps * quads * 4 * kBlock;
  std::vector<Tap> window_taps;
  for (int64_t t = 0; t < taps; t++) window_taps.push_back({t / a.s, t % a.s});
  const ConvRows rows(a, 4 * quads, q, std::move(window_taps));
  const Int8Constants constants = make_constants(a, kernels, a.groups, blocks, taps * quads);
  const int64_t pixels = rows.pixels();
  const ConvPlan plan = make_plan(pixels, taps, a.c, a.groups, panels, a.num_threads);
  // Top bits flipped once for all panels.
  const bool flips = can_flip(a) && !flipped && a.groups == 1 && rows.pixel_by_pixel();
  // Of large panels the second-level cache would not hold two.
  const bool fetches = kernels.max_blocks * block_bytes < 64 << 10;
  parallel_for(a.num_threads, a.groups * plan.runs * plan.ranges, [&](int64_t task) {
    const int64_t range = task % plan.ranges, run = task / plan.ranges % plan.runs, g = task / (plan.ranges * plan.runs);
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    const auto table = rows_scratch.get(count * taps);
    if (flips) {
      const int64_t c = a.c, bytes = count * c;
      uint8_t* const run_x = flip_scratch.get(bytes + 4);
      flip_bytes(a.x + begin * c, bytes, 0x80, run_x);
      std::memset(run_x + bytes, 0, 4);
      for (int64_t i = 0; i < count; i++) table[i] = run_x + i * c;
    } else {
      rows.fill(begin, count, g * a.c / a.groups, table);
    }
    int32_t* window = nullptr;
    if (a.shifted) {
      window = window_scratch.get(count);
      kernels.sum_rows(table, count, taps, group_c, a.x_signed, window);
    }
    const int64_t last = panels * (range + 1) / plan.ranges;
    for (int64_t panel = panels * range / plan.ranges; panel < last; panel++) {
      const int64_t block = panel_begin(panel, panels, blocks, kernels.max_blocks);
      const int64_t end = panel_begin(panel + 1, panels, blocks, kernels.max_blocks), channel = block * kBlock;
      const int64_t next = panel_begin(panel + 2, panels, blocks, kernels.max_blocks);
      Int8Epilogue epilogue = constants.epilogue(a, begin, g, channel);
      if (a.shifted) {
        epilogue.shift = constants.shift(g, channel);
        epilogue.window = window;
      }
      kernels.conv({table, count, taps, quads, a.x_signed && !flips && !flipped,
                    a.weight + (g * blocks + block) * block_bytes, end - block, constants.init(g, channel), epilogue,
                    fetches && panel + 1 < last ? next - end : 0});
    }
  });
}

}  // namespace

void conv2d_int8(const Conv2dInt8Args& a) {
  if (a.n * a.k == 0) return;
  if (a.depthwise) return depthwise_int8(a, int8_kernels());
  if (folds(a)) return dense(Folded(a).args, int8_kernels(), a.s * a.c, output_columns(a), can_flip(a));
  dense(a, int8_kernels(), a.c / a.groups, output_columns(a), false);
}

}  // namespace cnncomp
