// The tensor-core tile that all matrix products share: shared memory, main loop, epilogue.
//
// One thread block computes kBlockM pixels x kBlockN output channels. The reduction goes in slices of 64 bytes; a step of the
// main loop, from barrier to barrier, is kSlices of them, through a ring of kStages steps in shared memory that a loader fills
// (GEMM, convolution, or byte by byte). Each warp owns kWarpM x kWarpN of the tile.
//
// Output channels are permuted on their way into shared memory: row 8 * j + 2 * t + e of a warp's share holds channel
// j / 4 * 32 + 8 * t + j % 4 * 2 + e, so that of four pairs of channels that mma leaves in thread t of a quad one vector comes out,
// next to those of the quad's other threads, without a detour through shared memory.
#pragma once

#include "cuda/arch.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/schedule.cuh"
#include "cuda/tile_config.h"
#include "cuda/warpgroup.cuh"

namespace cnncomp::cuda {

// Offset of a 16-byte chunk. Two 64-byte rows fill the banks once; xor over row / 2 keeps 8 rows of one chunk apart.
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Where in a slice of a shared tile this thread's first chunk goes; its others follow Tile::kRowStepBytes apart.
template <typename Tile>
__device__ __forceinline__ uint32_t own_place() {
  return swizzle(threadIdx.x / Tile::kChunks, threadIdx.x % Tile::kChunks);
}

// How warps share a tile. On sm_90a four of them, a group, multiply together: each has 16 of 64 rows and all columns, and the
// groups share the rows of the tile.
template <typename Tile>
struct Share {
  static constexpr bool kGroup = CNNCOMP_HOPPER && Tile::kBlockM % 64 == 0;
  static constexpr int kStepM = kGroup ? 64 : 16;  // rows from one mma tile of a warp to its next
  static constexpr int kGroups = kGroup ? Tile::kThreads / 128 : 1;
  static constexpr int kTilesM = kGroup ? Tile::kBlockM / 64 / kGroups : Tile::kTilesM;
  static constexpr int kTilesN = kGroup ? Tile::kBlockN / 8 : Tile::kTilesN;
  static constexpr int kWarpN = 8 * kTilesN;
  static_assert(!kGroup || kTilesM * kGroups * 64 == Tile::kBlockM, "groups have the same number of rows");

  int m0, n0;  // first row and column of the thread's warp

  __device__ __forceinline__ Share() {
    const int warp = threadIdx.x / 32;
    m0 = kGroup ? warp / 4 * (64 * kTilesM) + warp % 4 * 16 : warp % Tile::kWarpsM * Tile::kWarpM;
    n0 = kGroup ? 0 : warp / Tile::kWarpsM * Tile::kWarpN;
  }
};

// Output channel, within the block, whose weights row `row` of the shared tile holds.
template <typename Tile>
__device__ __forceinline__ int channel_of_row(int row) {
  const int within = row % Share<Tile>::kWarpN, j = within / 8;
  return row - within + j / 4 * 32 + within % 8 / 2 * 8 + j % 4 * 2 + within % 2;
}

// The block's dynamic shared memory: kStages steps, each kSlices slices of activations and then kSlices of weights.
__device__ __forceinline__ uint32_t shared_tiles() {
  extern __shared__ __align__(1024) uint8_t tiles[];  // the swizzle of sm_90a is one of addresses
  return shared_address(tiles);
}

template <typename Tile>
struct Accumulators {
  int32_t value[Share<Tile>::kTilesM][Share<Tile>::kTilesN][4];
};

// Addresses of the rows that this lane names to load_matrices, or of the matrices for multiply_group, of a step's first slice.
struct FragmentAddresses {
  uint32_t a, b;
};

template <typename Tile>
__device__ __forceinline__ FragmentAddresses fragment_addresses(uint32_t tiles) {
  const uint32_t weights = tiles + Tile::kSlices * Tile::kBytesA;
  const int lane = threadIdx.x % 32;
  const Share<Tile> share;
  if constexpr (Share<Tile>::kGroup) {  // the group's first row; all of it has to name the same matrices
    const int group = Share<Tile>::kGroups == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0);
    return {tiles + group * Share<Tile>::kTilesM * 64 * Tile::kSliceBytes, weights};
  }
  return {tiles + swizzle(share.m0 + lane % 16, lane / 16), weights + swizzle(share.n0 + lane % 8 + lane / 16 * 8, lane / 8 % 2)};
}

// Slice kSlice of a step: acc += a * b^T. 16 rows leave the swizzle as it is; the second half of the products is two chunks on,
// which is bit 5 of the address.
template <typename Tile, bool kSigned, int kSlice>
__device__ __forceinline__ void multiply_slice(Accumulators<Tile>& acc, FragmentAddresses at) {
  constexpr int kRows = Share<Tile>::kStepM * Tile::kSliceBytes;
  if constexpr (Share<Tile>::kGroup) begin_products();
#pragma unroll
  for (int k = 0; k < Tile::kSliceBytes; k += 32) {
    if constexpr (Share<Tile>::kGroup) {
#pragma unroll
      for (int i = 0; i < Share<Tile>::kTilesM; ++i)
        multiply_group<kSigned>(acc.value[i], swizzled_matrix(at.a + kSlice * Tile::kBytesA + i * kRows + k),
                                swizzled_matrix(at.b + kSlice * Tile::kBytesB + k));
    } else {
      uint32_t fa[Tile::kTilesM][4], fb[Tile::kTilesN / 2][4];
      unroll<Tile::kTilesM>([&](auto i) { load_matrices<kSlice * Tile::kBytesA + i.value * kRows>(fa[i.value], at.a ^ k); });
      unroll<Tile::kTilesN / 2>([&](auto j) {
        load_matrices<kSlice * Tile::kBytesB + j.value * 16 * Tile::kSliceBytes>(fb[j.value], at.b ^ k);
      });
#pragma unroll
      for (int i = 0; i < Tile::kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kTilesN; ++j)
          multiply<kSigned>(acc.value[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// The reduction of `slices` slices. The loader's load<kSlice>(place) fills slice kSlice of a step, this thread's chunks of which
// start at `place`, asynchronously or not, and moves on by a slice. Its slices are loaded in order, and no other.
template <typename Tile, bool kSigned, typename Loader>
__device__ __forceinline__ void main_loop(Accumulators<Tile>& acc, Loader& loader, int slices) {
  constexpr bool kGroup = Share<Tile>::kGroup;
  constexpr int kStages = CNNCOMP_TURING ? kTuringStages : Tile::kStages, kRing = kStages * Tile::kStageBytes;
  const uint32_t tiles = shared_tiles();
  uint32_t own = tiles + own_place<Tile>();
  pin(own);
  auto fetch = [&](uint32_t stage, int left) {
    unroll<Tile::kSlices>([&](auto s) {
      if (s.value < left) loader.template load<s.value>(own + stage);
    });
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage)
    fetch(stage * Tile::kStageBytes, slices - stage * Tile::kSlices);
  FragmentAddresses first = fragment_addresses<Tile>(tiles);
  pin(first.a);
  pin(first.b);
  uint32_t read = 0, write = (kStages - 1) * Tile::kStageBytes;
  for (int left = slices; left > 0; left -= Tile::kSlices) {
    wait_copies<kStages - 2>();
    if constexpr (kGroup) show_to_group();
    __syncthreads();  // the step at `read` is complete, and everyone is done with the one at `write`
    if constexpr (!kGroup) fetch(write, left - (kStages - 1) * Tile::kSlices);
    unroll<Tile::kSlices>([&](auto s) {
      if (s.value < left) multiply_slice<Tile, kSigned, s.value>(acc, {first.a + read, first.b + read});
    });
    if constexpr (kGroup) {  // while they are under way
      commit_products();
      fetch(write, left - (kStages - 1) * Tile::kSlices);
      wait_products();
    }
    write = read;
    read = read + Tile::kStageBytes == kRing ? 0 : read + Tile::kStageBytes;
  }
  if constexpr (kGroup) {
#pragma unroll
    for (int i = 0; i < Share<Tile>::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Share<Tile>::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) settle(acc.value[i][j][e]);
  }
}

// Adds up the sums of the blocks that share a tile; false in all of them but the last to come, which has the whole sums then.
// Sums of integers don't depend on their order. Leaves zeros behind, for the next kernel.
template <typename Tile>
__device__ __forceinline__ bool join_parts(Accumulators<Tile>& acc, const Schedule& schedule, const Work& work) {
  if (work.shared < 0) return true;
  int32_t* sums = schedule.sums + static_cast<int64_t>(work.shared) * (Tile::kBlockM * Tile::kBlockN) + threadIdx.x;
  auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < Share<Tile>::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Share<Tile>::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(acc.value[i][j][e], sums + ((i * Share<Tile>::kTilesN + j) * 4 + e) * Tile::kThreads);
  };
  each([](int32_t value, int32_t* at) { add_global(at, value); });
  __syncthreads();  // also: everyone is done with the shared tiles
  const uint32_t flag = shared_tiles();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t ticket = atomicInc(schedule.tickets + work.shared, schedule.parts - 1);  // wraps to 0 after the last
    __threadfence();
    store_shared(flag, ticket);
  }
  __syncthreads();
  if (load_shared(flag) != static_cast<uint32_t>(schedule.parts) - 1) return false;
  each([](int32_t& value, int32_t* at) { value = __ldcg(at); });
  each([](int32_t, int32_t* at) { *at = 0; });
  return true;
}

// Epilogue and store of this thread's part of the tile. m: output pixels in all.
template <typename Tile>
__device__ __forceinline__ void store_tile(const Accumulators<Tile>& acc, const EpilogueParams& p, const Work& work, int m) {
  constexpr int kVec = Tile::kVec;
  const int lane = threadIdx.x % 32;
  const Share<Tile> share;
  const int pixel0 = work.m0 + share.m0 + lane / 4, channel0 = work.n0 + share.n0 + lane % 4 * kVec;
#pragma unroll
  for (int v = 0; v < Share<Tile>::kTilesN / 4; ++v) {
    const int channel = channel0 + v * 4 * kVec, real = real_channels<kVec>(p, channel);
    if (real == 0) return;
    const ChannelConstants<kVec> constants = load_constants<kVec>(p, work.group, channel);
    int64_t offset = offset_of(p, pixel0, work.group, channel);
#pragma unroll
    for (int i = 0; i < Share<Tile>::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) values[e] = acc.value[i][v * kVec / 2 + e / 2][half * 2 + e % 2];
        if (pixel0 + i * Share<Tile>::kStepM + half * 8 < m) finish_at<kVec>(values, constants, p, offset, real);
        offset += (half == 0 ? 8 : Share<Tile>::kStepM - 8) * static_cast<int64_t>(p.k);
      }
    }
  }
}

}  // namespace cnncomp::cuda
