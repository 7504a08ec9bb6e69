// Which tile a convolution with runs of 32 outputs gets, and its launch.
#pragma once

#include "cuda/sparse24_plan.cuh"
#include "cuda/vectors_units.cuh"

namespace cnncomp::cuda {

// Why the kernels can't run a convolution; empty where they can.
template <typename Tile>
std::string vectors_refusal(const Conv2d& c) {
  constexpr int channels = Tile::kColumns;
  const int64_t images = ceil_div(c.n, Tile::kUnit) * Tile::kUnit, pixel = int64_t{c.c} * Tile::kElement;
  const int64_t border = 2 * (c.pad_h + 1) * int64_t{c.w} * Tile::kUnit * Tile::kElement * channels;
  if (c.c / c.groups % channels) return "input channels of a group that are no multiple of " + std::to_string(channels);
  if (c.r > 15 || c.s > 15) return "a kernel of more than 15 rows or columns";
  if (images * c.h * c.w * pixel + border > INT32_MAX) return "an input of more than 2^31 bytes";
  if (!aligned(c.x, 16) || !aligned(c.weight, 16)) return "an input or weight that is not aligned to 16 bytes";
  if (!c.out_units) return "";
  const Epilogue& e = c.epilogue;
  if (c.n % Tile::kUnit) return "an output in units of a batch that is no multiple of " + std::to_string(Tile::kUnit);
  if (c.k / c.groups % Tile::kVec)
    return "an output in units, of channels of a group that are no multiple of " + std::to_string(Tile::kVec);
  if (size_of(e.out_dtype) != Tile::kElement || (e.residual != nullptr && size_of(e.residual_dtype) != Tile::kElement))
    return "an output in units, of elements of another size than the input's";
  if (!aligned(e.out, 16) || !aligned(e.residual, 16)) return "an output or residual that is not aligned to 16 bytes";
  return "";
}

// Fills in grid, block, shared memory and parameters. Throws std::invalid_argument where the kernels can't run it.
template <typename Tile>
void set_vectors(Launch& launch, const Conv2d& c) {
  const std::string refusal = vectors_refusal<Tile>(c);
  if (!refusal.empty()) throw std::invalid_argument(launch.kernel + ": " + refusal);
  constexpr int channels = Tile::kColumns;
  const int32_t k_group = c.k / c.groups;
  const int64_t runs = ceil_div(k_group, Tile::kRun) * c.groups;
  const int64_t units = ceil_div(c.n, Tile::kUnit) * c.p() * c.q();
  const int64_t blocks = ceil_div(units, Tile::kBlockP / Tile::kUnit) * runs;
  if (units * Tile::kUnit > INT32_MAX || blocks > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(blocks) + " tiles; at most 2^31 - 1 are possible");
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.block = Tile::kThreads;
  launch.shared = Tile::kStages * (Tile::kStageBytes + Tile::kTableBytes);
  VectorsParams p = {};
  p.epilogue = epilogue_params(c, k_group, Tile::kVec);
  p.x = static_cast<const int8_t*>(c.x), p.weight = c.weight;
  p.group_runs = static_cast<int32_t>(runs / c.groups);
  p.n = c.n, p.h = c.h, p.w = c.w, p.r = c.r, p.s = c.s;
  p.stride_h = c.stride_h, p.stride_w = c.stride_w, p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.dil_h = c.dil_h, p.dil_w = c.dil_w;
  p.unit_bytes = Tile::kUnit * Tile::kElement * channels, p.row_bytes = c.w * p.unit_bytes;
  p.channel_bytes = static_cast<int32_t>(ceil_div(c.n, Tile::kUnit)) * c.h * p.row_bytes;
  p.group_bytes = c.c / c.groups / channels * p.channel_bytes;
  p.units = static_cast<int32_t>(units), p.out_units = c.out_units;
  p.runs = divisor(static_cast<int32_t>(runs)), p.image = divisor(c.p() * c.q()), p.row = divisor(c.q());
  launch.set_params(p);
}

// Calls plan(tile): the larger one if that gives every multiprocessor two blocks, with fewer stages where a multiprocessor's
// shared memory, of `shared` bytes, would hold too few of them.
template <int kElement, typename Plan>
Launch plan_vectors(const Conv2d& conv, int multiprocessors, int shared, Plan&& plan) {
  using Large = VectorsTile<128, 64, 2, 3, kElement>;
  using LargeInLess = VectorsTile<128, 64, 2, 2, kElement>;
  using Small = VectorsTile<64, 32, 4, 3, kElement>;
  const int64_t units = ceil_div(conv.n, Large::kUnit) * conv.p() * conv.q();
  const int64_t runs = ceil_div(conv.k / conv.groups, Large::kRun) * conv.groups;
  const int64_t blocks = runs * ceil_div(units, Large::kBlockP / Large::kUnit);
  if (blocks < 2 * int64_t{multiprocessors}) return plan(Small{});
  return shared >= 4 * (Large::kStages * Large::kStageBytes + 1024) ? plan(Large{}) : plan(LargeInLess{});
}

}  // namespace cnncomp::cuda
