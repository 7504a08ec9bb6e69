// V:2:M weights (cnncomp/sparsity/vnm.py) times activations: runs of 64 outputs that share one list of input channels, which is
// gathered as for runs of 32 (vectors_tile.cuh), and of each four channels of it two for each output, which mma.sp picks as for
// 2:4 weights (sparse24_tile.cuh). The hierarchy of VENOM (Castro et al., SC 2023), there of matrices.
//
// 64 outputs, because a gathered row has to be used that often: a piece takes mma.sp as long as its rows take the port to the L2.
//
// 8-bit activations are gathered channel by channel too, for the four channels of a word are any four: units are sixteen images,
// (C, N / 16, H, W, 16), or eight where there are no more, which takes twice as many copies of half the bytes. Words of four pixels of four channels are turned on their way to mma.sp; in shared memory, channels that
// one instruction reads lie next to each other.
#pragma once

#include "cuda/turn_bytes.cuh"
#include "cuda/vectors_plan.cuh"

namespace cnncomp::cuda {

template <int kUnit_, int kElement_>
struct VnmPiece {
  static constexpr int kElement = kElement_;  // bytes
  static constexpr int kRun = 64;             // outputs
  static constexpr int kUnit = kUnit_, kChunkBytes = kUnit * kElement;
  static constexpr int kColumns = 1, kParts = 1;
  static constexpr int kRows = 64 / kElement;  // channels, half of which each output has
  static constexpr int kKeptBytes = kRun * 32;
  static constexpr int kValueBytes = kKeptBytes + kKeptBytes / (4 * kElement);  // and the metadata
  static constexpr int kTogether = kElement == 2 ? 8 : 32;

  __device__ __forceinline__ static int unit(int j, int lane) {
    return kElement == 2 ? j : (j / 4 * 32 + lane % 4 * 8) / kUnit;
  }
  __device__ __forceinline__ static int image(int j, int lane, int e) {
    return kElement == 2 ? lane % 4 * 2 + e : lane % 4 * 8 % kUnit + e * 4 + j % 4;
  }
};

template <int kBlockP, int kWarpP, int kPieces, int kStages, int kUnit, int kElement>
struct VnmTile : RunTile<VnmPiece<kUnit, kElement>, kBlockP, kWarpP, kPieces, kStages> {
  static std::string name() {
    return RunTile<VnmPiece<kUnit, kElement>, kBlockP, kWarpP, kPieces, kStages>::name() + "_" + std::to_string(kUnit);
  }
};

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// This lane's pixels of mma tiles j to j + 3, 8 bits: pixel 4 * n + i of the 32 is column n of tile j + i.
template <typename Tile>
__device__ __forceinline__ void load_turned(uint32_t (&b)[4][4], uint32_t rows, int chunk) {
  const int lane = threadIdx.x % 32;
  const uint32_t at = rows + VectorsLoader<Tile>::address(lane % 4, chunk + lane / 16) + lane / 4 % 4 * 4;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t words[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) words[e] = load_shared_4(at + (e * 16 + q * 4) * Tile::kRowBytes);
    turn_bytes(words);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i][q] = words[i];
  }
}

// One piece. `rows`: of the piece, in shared memory; `first`: the warp's first chunk of a row.
template <typename Tile, Operand kOperand, typename Sum>
__device__ __forceinline__ void multiply_sparse_piece(VectorsSums<Tile, Sum>& acc, uint32_t values, uint32_t rows, int first) {
  const int lane = threadIdx.x % 32;
  // Of 16 bits, two lanes of each four have the metadata.
  const uint4 words = load_shared_16(values + Tile::kKeptBytes + (Tile::kElement == 2 ? lane / 4 * 2 + lane % 2 : lane) * 16);
  const uint32_t metadata[4] = {words.x, words.y, words.z, words.w};
  uint4 a[Tile::kTilesC];
#pragma unroll
  for (int i = 0; i < Tile::kTilesC; ++i) a[i] = load_shared_16(values + lane * 16 + i * 512);
  if constexpr (Tile::kElement == 2) {
#pragma unroll
    for (int j = 0; j < Tile::kTilesP; ++j) {
      uint32_t b[4];
      load_matrices_turned(b, rows + VectorsLoader<Tile>::address(lane, first + j));
#pragma unroll
      for (int i = 0; i < Tile::kTilesC; ++i) multiply_sparse<kOperand, 0>(acc.value[i][j], a[i], b, metadata[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Tile::kTilesP; j += 4) {
      uint32_t b[4][4];
      load_turned<Tile>(b, rows, first + j / 2);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < Tile::kTilesC; ++i) multiply_sparse<kOperand, 0>(acc.value[i][j + k], a[i], b[k], metadata[i]);
    }
  }
}

// Calls plan(tile): the larger one if that gives every multiprocessor a block, with fewer stages where shared memory, of which a
// multiprocessor has `shared` bytes, would hold one block of it alone.
template <int kUnit, int kElement, typename Plan>
Launch plan_vnm(const Conv2d& conv, int multiprocessors, int shared, Plan&& plan) {
  using Large = VnmTile<128, 32, 2, 3, kUnit, kElement>;
  using LargeInLess = VnmTile<128, 32, 2, 2, kUnit, kElement>;
  const int64_t units = ceil_div(conv.n, Large::kUnit) * conv.p() * conv.q();
  const int64_t runs = ceil_div(conv.k / conv.groups, Large::kRun) * conv.groups;
  const int64_t blocks = runs * ceil_div(units, Large::kBlockP / Large::kUnit);
  if constexpr (kElement == 2)
    if (blocks < multiprocessors) return plan(VnmTile<64, 16, 4, 3, kUnit, kElement>{});
  return shared >= 2 * (Large::kStages * (Large::kStageBytes + Large::kTableBytes) + 1024) ? plan(Large{}) : plan(LargeInLess{});
}

}  // namespace cnncomp::cuda
