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

std::vector<Tap> window_taps(const Conv2dInt8Args& a) {
  std::vector<Tap> taps;
  for (int64_t t = 0; t < a.r * a.s; t++) taps.push_back({t / a.s, t % a.s});
  return taps;
}

// Where the top bits of signed inputs are flipped: nowhere, in the kernel, or once for all panels, run by run or in the image.
enum class Flip { none, kernel, run, image };

// What the panels meet: rows of inputs, and where products of bytes saturate their range.
class Inputs {
 public:
  // See dense.
  Inputs(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t group_c, int64_t q, bool flipped)
      : a_(a),
        kernels_(kernels),
        group_c_(group_c),
        quads_(ceil_div(group_c, 4)),
        pixels_(a.n * output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) * q),
        // Pixels of a folded image may lie further apart than what a window sums over.
        by_run_(group_c == a.c && is_pixel_by_pixel(a, a.r * a.s, q)),
        bounded_(kernels.range != nullptr && (!a.x_signed || can_flip(a)) && pixels_ > kMinTiles * kernels.max_pixels[0]),
        flip_(!a.x_signed || flipped ? Flip::none
              : !can_flip(a)         ? Flip::kernel
              : by_run_              ? Flip::run
              : bounded_             ? Flip::image
                                     : Flip::kernel),
        in_(flip_ == Flip::image ? flip_image(a, kFlip) : a),
        rows_(in_, 4 * quads_, q, window_taps(a), flip_ == Flip::image ? kFlip : 0) {
    if (!bounded_ || by_run_) return;
    // Where pixels overlap, a channel is that of several. Behind the last one a quad's weights are zeros.
    const int64_t size = a.c + 4 * quads_;
    most_ = most_scratch.get(size);
    std::memset(most_, 255, size);
    if (group_c == a.c / a.groups) image_most(in_, kernels, flip_ == Flip::image ? kFlip : 0, most_);
  }

  int64_t pixels() const { return pixels_; }

  // Fills in what `panel` says of the inputs of a group. The rows are this thread's until its next call.
  void take(int64_t begin, int64_t count, int64_t group, ConvPanel& panel) const {
    const auto table = rows_scratch.get(count * rows_.taps());
    panel.rows = table;
    panel.pixels = count;
    panel.x_signed = flip_ == Flip::kernel;
    panel.most = most_ != nullptr ? most_ + group * group_c_ : nullptr;
    panel.least = nullptr;
    if (by_run_ && bounded_) take_range(begin, count, panel);
    if (flip_ != Flip::run) return rows_.fill(begin, count, group * a_.c / a_.groups, table);
    const uint8_t* const from = a_.x + begin * a_.c;
    uint8_t* const to = run_scratch.get(count * a_.c + 4);
    if (panel.least != nullptr) {
      kernels_.lower(from, count, a_.c, kFlip, panel.least, to);
    } else {
      flip_bytes(from, count * a_.c, kFlip, to);
    }
    std::memset(to + count * a_.c, 0, 4);
    for (int64_t i = 0; i < count; i++) table[i] = to + i * a_.c;
  }

 private:
  static constexpr uint8_t kFlip = 0x80;
  // Ranges are worth while from so many tiles on.
  static constexpr int64_t kMinTiles = 2;

  // Signed inputs are lowered to what is above the least of their channel: fewer products are too large.
  void take_range(int64_t begin, int64_t count, ConvPanel& panel) const {
    uint8_t *const most = range_scratch.get(8 * quads_), *const least = most + 4 * quads_;
    std::memset(most, 0, 8 * quads_);
    kernels_.range(a_.x + begin * a_.c, count, a_.c, flip_ == Flip::run ? kFlip : 0, least, most);
    panel.most = most;
    if (flip_ != Flip::run) return;
    panel.least = least;
    for (int64_t c = 0; c < a_.c; c++) most[c] -= least[c];
  }

  const Conv2dInt8Args& a_;
  const Int8Kernels& kernels_;
  const int64_t group_c_, quads_, pixels_;
  const bool by_run_, bounded_;
  const Flip flip_;
  const Conv2dInt8Args in_;
  const ConvRows rows_;
  uint8_t* most_ = nullptr;  // of the image: the largest input of each channel
};

// group_c: channels that a window sums over at each tap; q: columns of the output; flipped: whether the input is already.
void dense(const Conv2dInt8Args& a, const Int8Kernels& kernels, int64_t group_c, int64_t q, bool flipped) {
  const int64_t taps = a.r * a.s, quads = ceil_div(group_c, 4), blocks = ceil_div(a.k / a.groups, kBlock);
  const int64_t panels = ceil_div(blocks, kernels.max_blocks), block_bytes = taps * quads * 4 * kBlock;
  const Int8Constants constants = make_constants(a, kernels, a.groups, blocks, taps * quads);
  const Inputs inputs(a, kernels, group_c, q, flipped);
  const int64_t pixels = inputs.pixels(), parts_bytes = kernels.max_blocks * (block_bytes * 9 / 4 + 1024);
  const ConvPlan plan = make_plan(pixels, taps, a.c, a.groups, panels, a.num_threads);
  // Of large panels the second-level cache would not hold two.
  const bool fetches = kernels.max_blocks * block_bytes < 64 << 10;
  parallel_for(a.num_threads, a.groups * plan.runs * plan.ranges, [&](int64_t task) {
    const int64_t range = task % plan.ranges, run = task / plan.ranges % plan.runs, g = task / (plan.ranges * plan.runs);
    const int64_t begin = pixels * run / plan.runs, count = pixels * (run + 1) / plan.runs - begin;
    ConvPanel panel{};
    panel.taps = taps, panel.quads = quads;
    inputs.take(begin, count, g, panel);
    panel.parts = panel.most != nullptr ? parts_scratch.get(parts_bytes) : nullptr;
    int32_t* window = nullptr;
    if (a.shifted) {
      window = window_scratch.get(count);
      kernels.sum_rows(panel.rows, count, taps, group_c, a.x_signed, window);
    }
    const int64_t last = panels * (range + 1) / plan.ranges;
    for (int64_t i = panels * range / plan.ranges; i < last; i++) {
      const int64_t block = panel_begin(i, panels, blocks, kernels.max_blocks), channel = block * kBlock;
      const int64_t end = panel_begin(i + 1, panels, blocks, kernels.max_blocks);
      const int64_t next = panel_begin(i + 2, panels, blocks, kernels.max_blocks);
      panel.weight = a.weight + (g * blocks + block) * block_bytes;
      panel.blocks = end - block;
      panel.init = constants.init(g, channel);
      panel.next_blocks = fetches && i + 1 < last ? next - end : 0;
      panel.epilogue = constants.epilogue(a, begin, g, channel);
      if (a.shifted) {
        panel.epilogue.shift = constants.shift(g, channel);
        panel.epilogue.window = window;
      }
      kernels.conv(panel);
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
