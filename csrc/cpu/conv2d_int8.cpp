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
thread_local AlignedArray<uint8_t> run_scratch, image_scratch, folded_scratch, parts_scratch;
thread_local AlignedArray<uint8_t> range_scratch, image_range_scratch, most_scratch;

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
    args.c = a.c * a.stride_w;  // bytes, as pixels overlap
    args.h = (p - 1) * a.stride_h + a.dil_h * (a.r - 1) + 1;
    args.w = ceil_div(columns, a.stride_w);
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

// The same convolution on its input flipped.
Conv2dInt8Args flip_image(const Conv2dInt8Args& a, uint8_t flip) {
  Conv2dInt8Args flipped = a;
  const int64_t row = a.w * a.c;
  uint8_t* const x = image_scratch.get(a.n * a.h * row);
  parallel_for(a.num_threads, a.n * a.h, [&](int64_t i) { flip_bytes(a.x + i * row, row, flip, x + i * row); });
  flipped.x = x;
  return flipped;
}

// The largest of each channel in the whole image and around it, where it is `padding`.
void image_most(const Conv2dInt8Args& a, const Int8Kernels& kernels, uint8_t padding, uint8_t* most) {
  const int64_t pixels = a.n * a.h * a.w, parts = std::max<int64_t>(a.num_threads, 1);
  uint8_t* const ranges = image_range_scratch.get(2 * parts * a.c);  // of each part: the least, the largest
  parallel_for(a.num_threads, parts, [&](int64_t i) {
    const int64_t begin = pixels * i / parts, count = pixels * (i + 1) / parts - begin;
    kernels.range(a.x + begin * a.c, count, a.c, 0, ranges + 2 * i * a.c, ranges + (2 * i + 1) * a.c);
  });
  std::memset(most, padding, a.c);
  for (int64_t i = 0; i < parts; i++)
    for (int64_t c = 0; c < a.c; c++) most[c] = std::max(most[c], ranges[(2 * i + 1) * a.c + c]);
}

// group_c: channels that a window sums over at each tap; q: columns of the output; flipped: whether the input is already.
void dense(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t group_c, int64_t q, bool flipped) {
  const int64_t group_k = a.k / a.groups, taps = a.r * a.s;
  const int64_t quads = ceil_div(group_c, 4), blocks = ceil_div(group_k, kBlock);
  const int64_t panels = ceil_div(blocks, kernels.max_blocks);
  const int64_t block_bytes = taps * quads * 4 * kBlock;
  std::vector<Tap> window_taps;
  for (int64_t t = 0; t < taps; t++) window_taps.push_back({t / a.s, t % a.s});
  const Int8Constants constants = make_constants(a, kernels, a.groups, blocks, taps * quads);
  const int64_t pixels = a.n * output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) * q;
  // Pixels of a folded image may lie further apart than what a window sums over.
  const bool by_run = group_c == a.c && is_pixel_by_pixel(a, taps, q);
  const uint8_t flip = can_flip(a) && !flipped ? 0x80 : 0;
  // Where sums of two products saturate, those that cannot are told by the largest inputs: worth while for some tiles.
  constexpr int64_t kMinTiles = 2;
  const bool bounded = kernels.range != nullptr && (!a.x_signed || can_flip(a)) && pixels > kMinTiles * kernels.max_pixels[0];
  // Top bits are flipped once for all panels: run by run where its pixels are those of the input.
  const bool flips_image = bounded && flip != 0 && !by_run, prepared = flip != 0 && (by_run || flips_image);
  const Conv2dInt8Args in = flips_image ? flip_image(a, flip) : a;
  const ConvRows rows(in, 4 * quads, q, std::move(window_taps), flips_image ? flip : 0);
  const int64_t parts_bytes = kernels.max_blocks * (block_bytes * 9 / 4 + 64);
  const ConvPlan plan = make_plan(pixels, taps, a.c, a.groups, panels, a.num_threads);
  // Where pixels overlap, a channel is that of several. Behind the last one a quad's weights are zeros.
  uint8_t* largest = nullptr;
  if (bounded && !by_run) {
    const int64_t size = a.c + 4 * quads;
    largest = most_scratch.get(size);
    std::memset(largest, 255, size);
    if (group_c == a.c / a.groups) image_most(in, kernels, flips_image ? flip : 0, largest);
  }
  // Of large panels the second-level cache would not hold two.
  const bool fetches = kernels.max_blocks * block_bytes < 64 << 10;
  parallel_for(a.num_threads, a.groups * plan.runs * plan.ranges, [&](int64_t task) {
    const int64_t range = task % plan.ranges, run = task / plan.ranges % plan.runs, g = task / (plan.ranges * plan.runs);
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    const auto table = rows_scratch.get(count * taps);
    const uint8_t *most = largest != nullptr ? largest + g * group_c : nullptr, *least = nullptr;
    uint8_t* const run_range = by_run && bounded ? range_scratch.get(8 * quads) : nullptr;
    if (run_range != nullptr) {
      std::memset(run_range, 0, 8 * quads);
      kernels.range(a.x + begin * a.c, count, a.c, flip, run_range + 4 * quads, run_range);
      most = run_range;
    }
    if (by_run && flip != 0) {
      uint8_t* const run_x = run_scratch.get(count * a.c + 4);
      if (run_range != nullptr) {
        // Signed inputs are lowered to what is above the least of their channel: fewer products are too large.
        least = run_range + 4 * quads;
        kernels.lower(a.x + begin * a.c, count, a.c, flip, least, run_x);
        for (int64_t c = 0; c < a.c; c++) run_range[c] -= least[c];
      } else {
        flip_bytes(a.x + begin * a.c, count * a.c, flip, run_x);
      }
      std::memset(run_x + count * a.c, 0, 4);
      for (int64_t i = 0; i < count; i++) table[i] = run_x + i * a.c;
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
      kernels.conv({table, count, taps, quads, a.x_signed && !prepared && !flipped,
                    a.weight + (g * blocks + block) * block_bytes, end - block, constants.init(g, channel), epilogue,
                    fetches && panel + 1 < last ? next - end : 0,
                    most, bounded ? parts_scratch.get(parts_bytes) : nullptr, least});
    }
  });
}

}  // namespace

void conv2d_int8(const Conv2dInt8Args& a) {
  if (a.n * a.k == 0) return;
  if (a.depthwise) return depthwise_int8(a, int8_kernels());
  const Int8Kernels& kernels = int8_kernels();
  if (!folds(a)) return dense(a, kernels, a.c / a.groups, output_columns(a), false);
  const Folded folded(a);
  dense(folded.args, kernels, a.s * a.c, output_columns(a), can_flip(a));
}

}  // namespace cnncomp
