// Which tile a convolution with gathered blocks of weights gets.
#pragma once

#include "cuda/gathered_tile.cuh"
#include "cuda/sparse24_plan.cuh"

namespace cnncomp::cuda {

// Calls plan(tile): the larger one if it is enough to give every multiprocessor a block, with fewer stages where shared memory,
// of which a multiprocessor has `shared` bytes, would hold one block of it alone.
template <int kElement, typename Plan>
Launch plan_gathered(const Conv2d& conv, int multiprocessors, int shared, Plan&& plan) {
  using Large = GatheredTile<128, 32, 3, kElement>;
  using LargeInLess = GatheredTile<128, 32, 2, kElement>;
  using Small = GatheredTile<64, 16, 3, kElement>;
  const int64_t pixels = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  const int64_t blocks = ceil_div(conv.k / conv.groups, Large::kBlockC) * ceil_div(pixels, Large::kBlockP) * conv.groups;
  if (blocks < multiprocessors) return plan(Small{});
  return shared >= 2 * (Large::kStages * Large::kStageBytes + 1024) ? plan(Large{}) : plan(LargeInLess{});
}

}  // namespace cnncomp::cuda
