// Which tile a convolution with 2:4 sparse weights gets, and its launch.
#pragma once

#include "cuda/sparse24_tile.cuh"

namespace cnncomp::cuda {

// Why the kernels can't run a convolution of elements of so many bytes; empty where they can.
inline std::string sparse24_refusal(const Conv2d& c, int element) {
  const int64_t image = static_cast<int64_t>(c.n) * c.h * c.w * c.c * element, border = 2 * (c.pad_h + 1) * int64_t{c.w} * c.c;
  if (c.c / c.groups * element % 16) return "input channels of a group that are no multiple of 16 bytes";
  if (c.r > 15 || c.s > 15) return "a kernel of more than 15 rows or columns";
  if (image + border * element > INT32_MAX) return "an input of more than 2^31 bytes";
  if (!aligned(c.x, 16) || !aligned(c.weight, 16)) return "an input or weight that is not aligned to 16 bytes";
  return "";
}

// The epilogue of halves reads and writes x's type and float32 alone.
inline void check_half_types(const Conv2d& conv, const std::string& kernel) {
  auto known = [&](DType type) { return type == conv.x_dtype || type == DType::kFloat32; };
  if (!is_half(conv.x_dtype) || !known(conv.epilogue.out_dtype) ||
      (conv.epilogue.residual && !known(conv.epilogue.residual_dtype)))
    throw std::invalid_argument(kernel + ": an input that is not float16 or bfloat16, or an output or residual that is neither of "
                                         "its type nor float32");
}

// Fills in grid, block, shared memory and parameters. Throws std::invalid_argument where the kernels can't run it.
template <typename Tile>
void set_sparse24(Launch& launch, const Conv2d& c) {
  constexpr int element = Tile::kElement;
  const std::string refusal = sparse24_refusal(c, element);
  if (!refusal.empty()) throw std::invalid_argument(launch.kernel + ": " + refusal);
  const int32_t c_group = c.c / c.groups, k_group = c.k / c.groups;
  const int64_t pixels = static_cast<int64_t>(c.n) * c.p() * c.q();
  const int32_t pixel_bytes = c.c * element, row_bytes = c.w * pixel_bytes, tap_w = c.dil_w * pixel_bytes;
  const int64_t tiles_c = ceil_div(k_group, Tile::kBlockC);
  if (pixels > INT32_MAX || tiles_c > 65535 || c.groups > 65535)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(pixels) + " pixels, " + std::to_string(k_group) +
                                " channels in each of " + std::to_string(c.groups) +
                                " groups; at most 2^31 - 1, 65535 tiles and 65535 are possible");
  launch.grid[0] = static_cast<uint32_t>(ceil_div(pixels, Tile::kBlockP));
  launch.grid[1] = static_cast<uint32_t>(tiles_c);
  launch.grid[2] = static_cast<uint32_t>(c.groups);
  launch.block = Tile::kThreads;
  launch.shared = Tile::kStages * Tile::kStageBytes;
  Sparse24Params p = {};
  p.epilogue = epilogue_params(c, k_group, Tile::kVec);
  p.x = static_cast<const int8_t*>(c.x), p.weight = c.weight;
  p.steps = static_cast<int32_t>(ceil_div(static_cast<int64_t>(c.r) * c.s * c_group * element, Tile::kStep));
  p.slices = static_cast<int32_t>(ceil_div(k_group, Tile::kSlice));
  p.h = c.h, p.w = c.w, p.r = c.r, p.s = c.s;
  p.stride_h = c.stride_h, p.stride_w = c.stride_w, p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.dil_h = c.dil_h, p.dil_w = c.dil_w;
  p.row_bytes = row_bytes, p.pixel_bytes = pixel_bytes, p.group_bytes = c_group * element;
  p.tap_w_bytes = tap_w, p.tap_h_bytes = c.dil_h * row_bytes - c.s * tap_w;
  p.pointwise = c.pointwise() ? 1 : 0;
  p.image = divisor(c.p() * c.q()), p.row = divisor(c.q());
  p.pixels = pixels;
  launch.set_params(p);
}

// Calls plan(tile) with the tile for a convolution of elements of kElement bytes. Warps of 64 x 64 read the least from shared
// memory for each product. Two blocks of them want 160 KB of a multiprocessor; with less, eight warps in one block, or two stages,
// keep as many warps there. shared: bytes of a multiprocessor.
template <int kElement, typename Plan>
Launch plan_sparse24(const Conv2d& conv, int multiprocessors, int shared, Plan&& plan) {
  using Wide = Sparse24Tile<128, 128, 64, 1, 3, kElement>;
  using WideInLess = Sparse24Tile<128, 128, 32, 1, 3, kElement>;
  using Narrow = Sparse24Tile<128, 64, 32, 1, 3, kElement>;
  using NarrowInLess = Sparse24Tile<128, 64, 32, 1, 2, kElement>;
  using Small = Sparse24Tile<64, 64, 16, 1, 3, kElement>;
  using SmallLong = Sparse24Tile<64, 64, 32, 2, 3, kElement>;  // for long reductions: the exchange of sums takes its time
  const int64_t pixels = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  const int32_t k_group = conv.k / conv.groups;
  const bool enough = shared >= 2 * (Wide::kStages * Wide::kStageBytes + 1024);
  auto blocks = [&](int block_c, int block_p) { return ceil_div(k_group, block_c) * ceil_div(pixels, block_p) * conv.groups; };
  if (k_group > Small::kBlockC && blocks(Wide::kBlockC, Wide::kBlockP) >= multiprocessors)
    return enough ? plan(Wide{}) : plan(WideInLess{});
  if (k_group > Small::kBlockC && blocks(Narrow::kBlockC, Narrow::kBlockP) >= multiprocessors)
    return enough ? plan(Narrow{}) : plan(NarrowInLess{});
  const int64_t bytes = int64_t{conv.r} * conv.s * (conv.c / conv.groups) * kElement;
  return bytes >= 8 * SmallLong::kStep ? plan(SmallLong{}) : plan(Small{});
}

}  // namespace cnncomp::cuda
