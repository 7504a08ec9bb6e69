// The tensor-core tile that the GEMM and the convolution share: shared memory, main loop, epilogue.
//
// One thread block computes kBlockM pixels x kBlockN output channels, kBlockK products a step, through a ring of kStages
// shared-memory tiles filled by a loader (GEMM, convolution, or byte by byte); each warp owns kWarpM x kWarpN of it.
//
// Output channels are permuted on their way into shared memory: row 8 * j + 2 * t + e of a warp's slice holds channel
// t * 2 * kTilesN + 2 * j + e, so that the pairs of channels that mma leaves in thread t of a quad are neighbours in the output
// and leave in one vector, without a detour through shared memory.
#pragma once

#include <string>

#include "cuda/arch.cuh"
#include "cuda/epilogue.cuh"

namespace cnncomp::cuda {

template <int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_, int kStages_>
struct TileConfig {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kBlockK = 64;  // bytes; a row of a shared tile
  static constexpr int kChunk = 16;   // bytes copied at once
  static constexpr int kChunks = kBlockK / kChunk;
  static constexpr int kWarpsM = kBlockM / kWarpM, kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRowStep = kThreads / kChunks;  // rows between two chunks of one thread
  static constexpr int kStepBytes = kRowStep * kBlockK;
  static constexpr int kBytesA = kBlockM * kBlockK, kBytesB = kBlockN * kBlockK;  // of one stage
  static constexpr int kRowsA = kBlockM / kRowStep, kRowsB = kBlockN / kRowStep;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // mma tiles of a warp
  static constexpr int kVec = 8;                                     // neighbouring channels stored together
  static_assert(kWarpM % 16 == 0 && kTilesN % 4 == 0, "a warp tile is whole mma tiles and whole vectors of 8 channels");
  static_assert(kRowStep % 8 == 0, "the swizzle repeats every 8 rows, so a thread's places differ by a constant");
  static_assert(kBlockM % kRowStep == 0 && kBlockN % kRowStep == 0, "every thread copies the same number of chunks");
  static_assert(kStages * (kBlockM + kBlockN) * kBlockK <= 48 * 1024, "static shared memory");

  static std::string name() {
    return std::to_string(kBlockM) + "x" + std::to_string(kBlockN) + "_" + std::to_string(kWarpM) + "x" +
           std::to_string(kWarpN) + "_" + std::to_string(kStages);
  }
};

using LargeTile = TileConfig<128, 128, 64, 32, 3>;
using SmallTile = TileConfig<64, 64, 32, 32, 3>;

// Whether large tiles are enough to give every multiprocessor one. A rule, not a measurement.
inline bool large_tile_fits(int64_t m, int k_group, int groups, int multiprocessors) {
  const int64_t tiles = ceil_div(m, LargeTile::kBlockM) * ceil_div(k_group, LargeTile::kBlockN) * groups;
  return k_group > SmallTile::kBlockN && tiles >= multiprocessors;
}

// Sets grid and block for m pixels and k_group channels in each of `groups`.
template <typename Tile>
void set_grid(Launch& launch, int64_t m, int k_group, int groups) {
  const int64_t tiles_m = ceil_div(m, Tile::kBlockM), tiles_n = ceil_div(k_group, Tile::kBlockN);
  if (m > INT32_MAX || tiles_n > 65535 || groups > 65535) throw std::invalid_argument(
      launch.kernel + ": " + std::to_string(m) + " pixels, " + std::to_string(k_group) + " channels in each of " +
      std::to_string(groups) + " groups; at most 2^31 - 1, 65535 tiles and 65535 are possible");
  launch.grid[0] = static_cast<uint32_t>(tiles_m);
  launch.grid[1] = static_cast<uint32_t>(tiles_n);
  launch.grid[2] = static_cast<uint32_t>(groups);
  launch.block = Tile::kThreads;
}

template <typename Tile>
struct SharedTiles {
  alignas(128) int8_t a[Tile::kStages][Tile::kBytesA];
  alignas(128) int8_t b[Tile::kStages][Tile::kBytesB];
};

// Offset of a 16-byte chunk. Two 64-byte rows fill the banks once; xor over row / 2 keeps 8 rows of one chunk apart.
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Where in a shared tile this thread's first chunk goes; its others follow kStepBytes apart.
template <typename Tile>
__device__ __forceinline__ uint32_t own_place() {
  return swizzle(threadIdx.x / Tile::kChunks, threadIdx.x % Tile::kChunks);
}

// Output channel, within the block, whose weights row `row` of the shared tile holds.
template <typename Tile>
__device__ __forceinline__ int channel_of_row(int row) {
  const int within = row % Tile::kWarpN;
  return row - within + (within % 8 / 2) * (2 * Tile::kTilesN) + within / 8 * 2 + within % 2;
}

template <typename Tile>
struct Accumulators {
  int32_t value[Tile::kTilesM][Tile::kTilesN][4];
};

// Addresses, within the first stage, of the rows that this lane names to load_matrices.
struct FragmentAddresses {
  uint32_t a, b;
};

template <typename Tile>
__device__ __forceinline__ FragmentAddresses fragment_addresses(const SharedTiles<Tile>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = warp % Tile::kWarpsM * Tile::kWarpM, n0 = warp / Tile::kWarpsM * Tile::kWarpN;
  return {shared_address(shared.a) + swizzle(m0 + lane % 16, lane / 16),
          shared_address(shared.b) + swizzle(n0 + lane % 8 + lane / 16 * 8, lane / 8 % 2)};
}

// One shared tile: acc += a * b^T. Steps of 16 rows leave the swizzle as it is; the second half of the products is two chunks
// on, which is bit 5 of the address.
template <typename Tile, bool kSigned>
__device__ __forceinline__ void multiply_tile(Accumulators<Tile>& acc, FragmentAddresses at) {
#pragma unroll
  for (int k = 0; k < Tile::kBlockK / 32; ++k) {
    uint32_t fa[Tile::kTilesM][4], fb[Tile::kTilesN / 2][4];
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i) load_matrices(fa[i], (at.a ^ (k * 32)) + i * 16 * Tile::kBlockK);
#pragma unroll
    for (int j = 0; j < Tile::kTilesN / 2; ++j) load_matrices(fb[j], (at.b ^ (k * 32)) + j * 16 * Tile::kBlockK);
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kTilesN; ++j)
        multiply<kSigned>(acc.value[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
  }
}

// The whole reduction. The loader's load(a, b) fills one stage (asynchronously or not) and moves on by kBlockK products.
template <typename Tile, bool kSigned, typename Loader>
__device__ __forceinline__ void main_loop(Accumulators<Tile>& acc, SharedTiles<Tile>& shared, Loader& loader, int steps) {
  const uint32_t a = shared_address(shared.a), b = shared_address(shared.b);
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < steps) loader.load(a + stage * Tile::kBytesA, b + stage * Tile::kBytesB);
    commit_copies();
  }
  const FragmentAddresses first = fragment_addresses(shared);
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage `read` is complete, and everyone is done with stage `write`
    if (step + Tile::kStages - 1 < steps) loader.load(a + write * Tile::kBytesA, b + write * Tile::kBytesB);
    commit_copies();
    multiply_tile<Tile, kSigned>(acc, {first.a + read * Tile::kBytesA, first.b + read * Tile::kBytesB});
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
}

// Epilogue and store of this thread's part of the tile. m: output pixels in all.
template <typename Tile>
__device__ __forceinline__ void store_tile(const Accumulators<Tile>& acc, const EpilogueParams& p, int64_t m) {
  constexpr int kVec = Tile::kVec;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * Tile::kBlockM + warp % Tile::kWarpsM * Tile::kWarpM + lane / 4;
  const int channel0 =
      blockIdx.y * Tile::kBlockN + warp / Tile::kWarpsM * Tile::kWarpN + lane % 4 * (2 * Tile::kTilesN);
  const int group = blockIdx.z;
#pragma unroll
  for (int v = 0; v < 2 * Tile::kTilesN / kVec; ++v) {
    const int channel = channel0 + v * kVec;
    const ChannelConstants<kVec> constants = load_constants<kVec>(p, group, channel);
#pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t pixel = pixel0 + i * 16 + half * 8;
        int32_t values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) values[e] = acc.value[i][v * kVec / 2 + e / 2][half * 2 + e % 2];
        if (pixel < m) finish<kVec>(values, constants, p, pixel, group, channel);
      }
    }
  }
}

}  // namespace cnncomp::cuda
