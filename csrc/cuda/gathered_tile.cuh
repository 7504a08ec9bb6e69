// Weights in blocks of 64 outputs x 16 bytes of inputs, each with its place (cnncomp/sparsity/gathered.py), times activations:
// the steps of a slice of outputs gather the chunks of activations that its blocks name, and nothing else is read or multiplied.
// Pixels, sums and epilogue are those of the 2:4 kernels.
#pragma once

#include "cuda/sparse24_tile.cuh"

namespace cnncomp::cuda {

template <int kBlockP, int kWarpP, int kStages, int kElement>
struct GatheredTile : Sparse24Tile<64, kBlockP, kWarpP, 1, kStages, kElement> {
  using Base = Sparse24Tile<64, kBlockP, kWarpP, 1, kStages, kElement>;
  static constexpr int kValueBytes = 64 * 128;                // the eight blocks of a step
  static constexpr int kStepBytes = kValueBytes + 8 * 4;      // and their places
  static constexpr int kStageBytes = kValueBytes + Base::kPixelBytes;
  static constexpr int kCopies = kValueBytes / 16 / Base::kThreads;
  static std::string name() {
    return std::to_string(kBlockP) + "_" + std::to_string(kWarpP) + "_" + std::to_string(kStages);
  }
  static_assert(kCopies * Base::kThreads * 16 == kValueBytes, "every thread copies as much");
};

#define CNNCOMP_MMA_LEFT(SHAPE, TYPES, REGISTER)                                                                             \
  asm volatile("mma.sync.aligned." SHAPE ".row.col." TYPES " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"              \
               : "+" REGISTER(d[0]), "+" REGISTER(d[1]), "+" REGISTER(d[2]), "+" REGISTER(d[3])                               \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))

// d(16 x 8) += a(16 x 32 bytes) * b(32 bytes x 8), from sm_80 on; a is s8 for 8 bits.
template <Operand kOperand, typename Sum>
__device__ __forceinline__ void multiply_left(Sum (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#if !CNNCOMP_TURING
  if constexpr (kOperand == Operand::kInt8) {
    CNNCOMP_MMA_LEFT("m16n8k32", "s32.s8.s8.s32", "r");
  } else if constexpr (kOperand == Operand::kUint8) {
    CNNCOMP_MMA_LEFT("m16n8k32", "s32.s8.u8.s32", "r");
  } else if constexpr (kOperand == Operand::kFloat16) {
    CNNCOMP_MMA_LEFT("m16n8k16", "f32.f16.f16.f32", "f");
  } else {
    CNNCOMP_MMA_LEFT("m16n8k16", "f32.bf16.bf16.f32", "f");
  }
#endif
}

#undef CNNCOMP_MMA_LEFT

// A slice's steps, and where this thread's chunk of the next one is.
template <typename Tile>
struct GatheredLoader {
  PixelLoader<Tile> pixels;
  const int8_t* step;   // the next one to load
  const int8_t* x;      // of the group
  int32_t place, left;  // of the next step; steps to load, it among them

  __device__ __forceinline__ GatheredLoader(const Sparse24Params& p, int64_t pixel0, int group)
      : pixels(p, pixel0, group), x(p.x + group * p.group_bytes) {
    const int32_t* first = reinterpret_cast<const int32_t*>(p.weight) + group * p.slices + blockIdx.y;
    const int table = (static_cast<int>(gridDim.z) * p.slices + 1 + 3) / 4 * 16;  // bytes
    left = first[1] - first[0];
    step = p.weight + table + static_cast<int64_t>(first[0]) * Tile::kStepBytes;
    find();
  }

  // Places past the last block are -1: tap (15, 15), of which no bit is set.
  __device__ __forceinline__ void find() {
    place = left > 0 ? __ldg(reinterpret_cast<const int32_t*>(step + Tile::kValueBytes) + threadIdx.x % Tile::kChunks) : -1;
  }

  __device__ __forceinline__ void load(const Sparse24Params& p, uint32_t stage) {
    pixels.r = place >> 4 & 15, pixels.s = place & 15;
    pixels.tap = x + pixels.r * p.dil_h * p.row_bytes + pixels.s * p.tap_w_bytes + (place >> 8) * 16;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      const int at = (threadIdx.x + i * Tile::kThreads) * 16;
      copy_async<16>(stage + at, step + at, 16);
    }
    pixels.copy(stage + Tile::kValueBytes);
    step += Tile::kStepBytes;
    --left;
    find();
  }
};

// A reduction of so many steps through a ring of kStages stages: load(stage) begins to fill one with the next step, multiply(stage)
// uses it.
template <typename Tile, typename Load, typename Multiply>
__device__ __forceinline__ void run_ring(int steps, Load&& load, Multiply&& multiply) {
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < steps) load(stage);
    commit_copies();
  }
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage `read` is complete, and everyone is done with stage `write`
    if (step + Tile::kStages - 1 < steps) load(write);
    commit_copies();
    multiply(read);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
}

// The whole reduction: as many steps as the slice has, none where it is all zeros.
template <typename Tile, Operand kOperand, typename Sum>
__device__ __forceinline__ void gathered_main_loop(Sparse24Sums<Tile, Sum>& acc, const Sparse24Params& p, uint32_t shared) {
  GatheredLoader<Tile> loader(p, static_cast<int64_t>(blockIdx.x) * Tile::kBlockP, blockIdx.z);
  const int lane = threadIdx.x % 32;
  const uint32_t weights = shared + lane * 16;
  const uint32_t rows = shared + Tile::kValueBytes + (warp_pixel<Tile>() + lane % 8) * Tile::kStep + ((lane / 8 ^ lane % 8) << 4);
  auto load = [&](int stage) { loader.load(p, shared + stage * Tile::kStageBytes); };
  run_ring<Tile>(loader.left, load, [&](int stage) {
    const uint32_t at = stage * Tile::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 a[2][Tile::kTilesC];
#pragma unroll
      for (int i = 0; i < 2 * Tile::kTilesC; ++i)
        a[i / Tile::kTilesC][i % Tile::kTilesC] = load_shared_16(weights + at + (half * 2 * Tile::kTilesC + i) * 512);
#pragma unroll
      for (int j = 0; j < Tile::kTilesP; ++j) {
        uint32_t b[4];
        load_matrices<0>(b, ((rows + at) ^ (half * 64)) + j * 8 * Tile::kStep);
#pragma unroll
        for (int i = 0; i < Tile::kTilesC; ++i) {
          multiply_left<kOperand>(acc.value[i][j], a[0][i], b[0], b[1]);
          multiply_left<kOperand>(acc.value[i][j], a[1][i], b[2], b[3]);
        }
      }
    }
  });
}

}  // namespace cnncomp::cuda
