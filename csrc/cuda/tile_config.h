// The tiles of the matrix products, and which one a layer gets. Plain C++: the host chooses, kernels are compiled for each.
#pragma once

#include <cstdint>
#include <string>

namespace cnncomp::cuda {

// Stages on sm_75, which has no asynchronous copies to keep under way.
constexpr int kTuringStages = 2;

template <int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_, int kSlices_, int kStages_>
struct TileConfig {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kSlices = kSlices_, kStages = kStages_;
  static constexpr int kSliceBytes = 64;  // of the reduction; a row of a shared tile
  static constexpr int kChunk = 16;       // bytes that a thread owns in a row
  static constexpr int kChunks = kSliceBytes / kChunk;
  static constexpr int kWarpsM = kBlockM / kWarpM, kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRowStep = kThreads / kChunks;  // rows between two chunks of one thread
  static constexpr int kRowStepBytes = kRowStep * kSliceBytes;
  static constexpr int kBytesA = kBlockM * kSliceBytes, kBytesB = kBlockN * kSliceBytes;  // of one slice
  static constexpr int kStageBytes = kSlices * (kBytesA + kBytesB), kSharedBytes = kStages * kStageBytes;
  static constexpr int kRowsA = kBlockM / kRowStep, kRowsB = kBlockN / kRowStep;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // mma tiles of a warp
  static constexpr int kVec = 8;                                     // neighbouring channels stored together
  static_assert(kWarpM % 16 == 0 && kTilesN % 4 == 0, "a warp tile is whole mma tiles and whole vectors of 8 channels");
  static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows, so a thread's places differ by a constant");
  static_assert(kBlockM % kRowStep == 0 && kBlockN % kRowStep == 0, "every thread copies the same number of chunks");
  static_assert(kStages >= 2, "one step is copied while another is multiplied");
  // Room for a second block where there is as much as on an A100, or one block on the sm_86 that has all of its shared memory.
  static_assert(kSharedBytes <= (kThreads <= 128 ? 64 : 96) * 1024, "there is no more");

  static constexpr int kSums = kBlockM * kBlockN / kThreads;  // of a thread
  // Blocks of a multiprocessor to have registers for, as there is shared memory for on an A100 or an H100: of itself the compiler
  // aims at more, and spills.
  static constexpr int kTogether = kThreads > 128 ? 1 : kSums <= 32 ? 4 : kSums <= 64 ? 3 : 2;

  static std::string size() { return std::to_string(kBlockM) + "x" + std::to_string(kBlockN); }
  static std::string name() {
    return size() + "_" + std::to_string(kWarpM) + "x" + std::to_string(kWarpN) + "_" + std::to_string(kSlices) + "x" +
           std::to_string(kStages);
  }
};

template <typename Tile>
constexpr int32_t slices_of(int32_t reduction) {
  return (reduction + Tile::kSliceBytes - 1) / Tile::kSliceBytes;
}

template <typename Tile>
struct TileTag {
  using type = Tile;
};
template <typename... Tiles>
struct TileList {
  template <typename F>
  static void for_each(F&& f) {
    (f(TileTag<Tiles>{}), ...);
  }
};

// Four warps each, one for each part of a multiprocessor; eight for the largest, which reads the least from the L2 and writes the
// least to shared memory for each product. Warps of 64 x 64 read shared memory least, so large layers are bound by their tensor
// cores; 256 x 64 is for 64 channels; 64 x 64 makes of small layers enough blocks for all multiprocessors; 32 x 128 is for few
// rows, where the weights are the traffic.
using Tile256x128 = TileConfig<256, 128, 64, 64, 1, 4>;
using Tile128x128 = TileConfig<128, 128, 64, 64, 1, 3>;
using Tile256x64 = TileConfig<256, 64, 64, 64, 1, 3>;
using Tile128x64 = TileConfig<128, 64, 64, 32, 1, 4>;
using Tile64x64 = TileConfig<64, 64, 32, 32, 2, 3>;
using Tile32x128 = TileConfig<32, 128, 32, 32, 2, 3>;
using AllTiles = TileList<Tile256x128, Tile128x128, Tile256x64, Tile128x64, Tile64x64, Tile32x128>;
using FewTiles = TileList<Tile128x64, Tile64x64>;  // for loaders that ask for each chunk where it lies
using OneTile = TileList<Tile128x64>;              // for loaders of pieces, which cost more than the products

}  // namespace cnncomp::cuda
