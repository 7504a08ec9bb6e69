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
    case Isa::baseline: break;
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

void dense(const Conv2dInt8Args& a, const Int8Kernels& kernels) {
  const int64_t group_c = a.c / a.groups, group_k = a.k / a.groups, taps = a.r * a.s;
  const int64_t quads = ceil_div(group_c, 4), blocks = ceil_div(group_k, kBlock);
  const int64_t panels = ceil_div(blocks, kernels.max_blocks);
  const int64_t block_bytes = taps * quads * 4 * kBlock;
  std::vector<Tap> window_taps;
  for (int64_t t = 0; t < taps; t++) window_taps.push_back({t / a.s, t % a.s});
  const ConvRows rows(a, 4 * quads, std::move(window_taps));
  const Int8Constants constants = make_constants(a, kernels, a.groups, blocks, taps * quads);
  const int64_t pixels = rows.pixels();
  const ConvPlan plan = make_plan(pixels, taps, a.c, a.groups, panels, a.num_threads);
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

}  // namespace

void conv2d_int8(const Conv2dInt8Args& a) {
  if (a.n * a.k == 0) return;
  (a.depthwise ? depthwise_int8 : dense)(a, int8_kernels());
}

}  // namespace cnncomp
