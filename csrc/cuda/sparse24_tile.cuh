// 2:4 sparse weights times activations: the tile, its loader, main loop and epilogue. sparse24_plan.cuh chooses and launches.
//
// The sparse operand of mma.sp is the left one, so a tile is kBlockC output channels x kBlockP pixels. A step of the reduction
// is 128 bytes of dense elements. Its weights lie in memory as they are multiplied (cnncomp/sparsity/two_four.py): copied as
// they are, read back 16 bytes a lane, no conflicts. A row of pixels is 128 bytes, its 16-byte chunks exchanged by the row's
// number, and read by load_matrices.
//
// With kHalves = 2, two warps compute the same sums, each over its half of every step: with few pixels in a tile, warps of few
// pixels each would read the weights from shared memory too often. At the end each gives the other half of its sums.
#pragma once

#include <string>

#include "cuda/conv_params.cuh"
#include "cuda/sparse24_mma.cuh"
#include "cuda/sparse_division.cuh"

namespace cnncomp::cuda {

template <int kBlockC_, int kBlockP_, int kWarpP_, int kHalves_, int kStages_, int kElement_>
struct Sparse24Tile {
  static constexpr int kElement = kElement_;  // bytes
  static constexpr int kBlockC = kBlockC_, kBlockP = kBlockP_, kWarpP = kWarpP_, kStages = kStages_;
  static constexpr int kHalves = kHalves_;  // warps that share the products of a step
  static constexpr int kSlice = 64;   // channels of a warp, and of a packed slice
  static constexpr int kStep = 128;   // dense bytes of the reduction
  static constexpr int kChunks = kStep / 16;
  static constexpr int kSlices = kBlockC / kSlice, kWarpsP = kBlockP / kWarpP;
  static constexpr int kThreads = 32 * kSlices * kWarpsP * kHalves;
  static constexpr int kTilesC = kSlice / 16, kTilesP = kWarpP / 8;  // mma tiles of a warp
  static constexpr int kRowStep = kThreads / kChunks;                // rows of pixels between two chunks of a thread
  static constexpr int kRows = kBlockP / kRowStep;                   // chunks of pixels that a thread copies
  static constexpr int kValueBytes = kSlice * kStep / 2;
  static constexpr int kPixelBytes = kBlockP * kStep;
  static constexpr int kVec = 2 * kTilesC;  // neighbouring channels of a thread
  static_assert(kBlockC % kSlice == 0 && kWarpP % 8 == 0 && kBlockP % kWarpP == 0, "whole slices and whole mma tiles");
  static_assert(kHalves == 1 || (kHalves == 2 && kTilesP % 2 == 0), "halves of a step, and of the sums");
  static_assert(kRowStep % 8 == 0 && kBlockP % kRowStep == 0, "a thread's chunks all have the same place in their rows");

  static constexpr int kStepBytes = kValueBytes + kValueBytes / (4 * kElement);  // a slice's: 2 bits for each kept element
  static constexpr int kStageBytes = kSlices * kStepBytes + kPixelBytes;

  static std::string name() {
    return std::to_string(kBlockC) + "x" + std::to_string(kBlockP) + "_" + std::to_string(kWarpP) + "_" +
           std::to_string(kHalves) + "_" + std::to_string(kStages);
  }
};

struct Sparse24Params {
  EpilogueParams epilogue;
  const int8_t* x;
  const int8_t* weight;
  int32_t steps, slices;  // of the reduction; of a group's channels
  int32_t h, w, r, s;
  int32_t stride_h, stride_w, pad_h, pad_w;
  int32_t row_bytes, tap_h_bytes, tap_w_bytes;  // from a pixel to the one below, to the next tap below, to the next tap
  int32_t pixel_bytes, group_bytes;
  int32_t dil_h, dil_w;
  int32_t pointwise;  // 1: output pixels are input pixels
  Divisor image, row;  // pixels of an output image and row
  int64_t pixels;      // of the output
};

// Bit i: whether a tap at first + i * dilation is in 0..size - 1; taps are at most 15.
__device__ __forceinline__ uint32_t taps_inside(int first, int size, int taps, int dilation) {
  if (dilation == 1) {
    const int from = min(max(-first, 0), 15), to = min(max(size - first, 0), taps);
    return to > from ? (1u << to) - (1u << from) : 0u;
  }
  uint32_t bits = 0;
  for (int i = 0; i < taps; ++i)
    bits |= (static_cast<uint32_t>(first + i * dilation) < static_cast<uint32_t>(size) ? 1u : 0u) << i;
  return bits;
}

// Where a thread's chunks of pixels are. Bit i of the lower half of `inside` says whether tap row i is in the image, bit i of
// the upper half the same of tap column i. Offsets are less than 2^31.
template <typename Tile>
struct PixelLoader {
  const int8_t* tap;  // this thread's chunk at the current tap of the pixel whose taps begin at x
  const int8_t* x;
  int32_t offset[Tile::kRows];
  uint32_t inside[Tile::kRows];
  int32_t byte, r, s;  // position in the reduction: byte within the tap

  __device__ __forceinline__ PixelLoader(const Sparse24Params& p, int64_t pixel0, int group) : x(p.x), r(0), s(0) {
    byte = threadIdx.x % Tile::kChunks * 16;
    tap = p.x + group * p.group_bytes;
    skip(p);
    tap += byte;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const int64_t m = pixel0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep;
      offset[i] = 0, inside[i] = 0;
      if (m >= p.pixels) continue;
      const int pixel = static_cast<int>(m);
      if (p.pointwise) {
        offset[i] = pixel * p.pixel_bytes, inside[i] = 0x10001u;
        continue;
      }
      const int image = divide(pixel, p.image), rest = pixel - image * p.image.value, row = divide(rest, p.row);
      const int h0 = row * p.stride_h - p.pad_h, w0 = (rest - row * p.row.value) * p.stride_w - p.pad_w;
      offset[i] = (image * p.h + h0) * p.row_bytes + w0 * p.pixel_bytes;
      inside[i] = taps_inside(h0, p.h, p.r, p.dil_h) | taps_inside(w0, p.w, p.s, p.dil_w) << 16;
    }
  }

  // Brings `byte` back into a tap; past the last one r stays at p.r, of which no bit is set.
  __device__ __forceinline__ void skip(const Sparse24Params& p) {
    while (byte >= p.group_bytes) {
      byte -= p.group_bytes;
      tap += p.tap_w_bytes;
      if (++s == p.s) s = 0, tap += p.tap_h_bytes, r = min(r + 1, p.r);
    }
  }

  // This thread's chunks at the tap, zeros where it is outside.
  __device__ __forceinline__ void copy(uint32_t tile) const {
    const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    const uint32_t place = tile + row * Tile::kStep + ((chunk ^ (row & 7)) << 4);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const bool real = inside[i] >> r & inside[i] >> (16 + s) & 1;
      copy_async<16>(place + i * Tile::kRowStep * Tile::kStep, tap + offset[i], real ? 16 : 0);
    }
  }

  __device__ __forceinline__ void load(const Sparse24Params& p, uint32_t tile) {
    copy(tile);
    const int before = byte;
    byte += Tile::kStep;
    skip(p);
    tap += byte - before;
  }
};

// A step of all slices of the tile. Past the last slice of a group that one comes again: mma.sp must have metadata, though the
// channels are not stored.
template <typename Tile>
__device__ __forceinline__ void load_weights(const Sparse24Params& p, const int8_t* first, int slices, int step,
                                             uint32_t tile) {
  constexpr int kStepBytes = Tile::kStepBytes, kChunks = Tile::kSlices * kStepBytes / 16;
#pragma unroll
  for (int i = 0; i < (kChunks + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int chunk = threadIdx.x + i * Tile::kThreads;
    if (kChunks % Tile::kThreads != 0 && chunk >= kChunks) break;
    const int slice = min(chunk / (kStepBytes / 16), slices - 1), within = chunk % (kStepBytes / 16);
    const int64_t at = (static_cast<int64_t>(slice) * p.steps + step) * kStepBytes + within * 16;
    copy_async<16>(tile + chunk * 16, first + at, 16);
  }
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// The same as four sums.
__device__ __forceinline__ void load_shared_16(int32_t (&v)[4], uint32_t address) {
  const uint4 words = load_shared_16(address);
  v[0] = words.x, v[1] = words.y, v[2] = words.z, v[3] = words.w;
}
__device__ __forceinline__ void load_shared_16(float (&v)[4], uint32_t address) {
  const uint4 words = load_shared_16(address);
  v[0] = __uint_as_float(words.x), v[1] = __uint_as_float(words.y);
  v[2] = __uint_as_float(words.z), v[3] = __uint_as_float(words.w);
}
__device__ __forceinline__ void store_shared_16(uint32_t address, const int32_t (&v)[4]) {
  asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ void store_shared_16(uint32_t address, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// What a warp computes: its slice, its first pixel of the tile, and which half of each step. Slices vary fastest, halves slowest.
template <typename Tile>
__device__ __forceinline__ int warp_slice() {
  return threadIdx.x / 32 % Tile::kSlices;
}
template <typename Tile>
__device__ __forceinline__ int warp_pixel() {
  return threadIdx.x / 32 / Tile::kSlices % Tile::kWarpsP * Tile::kWarpP;
}
template <typename Tile>
__device__ __forceinline__ int warp_half() {
  return threadIdx.x / 32 / (Tile::kSlices * Tile::kWarpsP);
}

template <typename Tile, typename Sum>
struct Sparse24Sums {
  Sum value[Tile::kTilesC][Tile::kTilesP][4];
};

// Half a step: 64 bytes of the reduction. `weights`: this lane's 16 bytes of the slice's first tile; `pixels`: the row that this
// lane names to load_matrices.
template <typename Tile, Operand kOperand, int kHalf, typename Sum>
__device__ __forceinline__ void multiply_half(Sparse24Sums<Tile, Sum>& acc, uint32_t weights, uint32_t metadata,
                                              uint32_t pixels) {
  const uint4 words = load_shared_16(Tile::kElement == 2 ? metadata : metadata + kHalf * 512);
  const uint32_t e[4] = {words.x, words.y, words.z, words.w};
  uint4 a[Tile::kTilesC];
#pragma unroll
  for (int i = 0; i < Tile::kTilesC; ++i) a[i] = load_shared_16(weights + (kHalf * Tile::kTilesC + i) * 512);
#pragma unroll
  for (int j = 0; j < Tile::kTilesP; ++j) {
    uint32_t b[4];
    load_matrices<0>(b, (pixels ^ (kHalf * 64)) + j * 8 * Tile::kStep);
#pragma unroll
    for (int i = 0; i < Tile::kTilesC; ++i) multiply_sparse<kOperand, kHalf>(acc.value[i][j], a[i], b, e[i]);
  }
}

// Each of two warps that have the sums of half a step gives the other half of the pixels' sums and adds what it gets to its own
// half, which is the one of its number. Through shared memory whose stages are done with.
template <typename Tile, typename Sum>
__device__ __forceinline__ void exchange_halves(Sparse24Sums<Tile, Sum>& acc, uint32_t shared) {
  constexpr int kMine = Tile::kTilesP / 2, kVectors = Tile::kTilesC * kMine, kWarps = Tile::kThreads / 32;
  static_assert(kWarps * kVectors * 512 <= Tile::kStages * Tile::kStageBytes, "the sums fit");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp_half<Tile>();
  const uint32_t mine = shared + (warp * kVectors * 32 + lane) * 16;
  const uint32_t others = shared + ((warp + (half ? -1 : 1) * kWarps / 2) * kVectors * 32 + lane) * 16;
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kTilesC; ++i)
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      Sum given[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        given[e] = half ? acc.value[i][j][e] : acc.value[i][j + kMine][e];
        acc.value[i][j][e] = half ? acc.value[i][j + kMine][e] : acc.value[i][j][e];
      }
      store_shared_16(mine + (i * kMine + j) * 512, given);
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kTilesC; ++i)
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      Sum got[4];
      load_shared_16(got, others + (i * kMine + j) * 512);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.value[i][j][e] += got[e];
    }
}

// The whole reduction through a ring of kStages stages.
template <typename Tile, Operand kOperand, typename Sum>
__device__ __forceinline__ void sparse24_main_loop(Sparse24Sums<Tile, Sum>& acc, const Sparse24Params& p, uint32_t shared) {
  constexpr int kStepBytes = Tile::kStepBytes, kStage = Tile::kStageBytes, kWeights = Tile::kSlices * kStepBytes;
  const int group = blockIdx.z, slice0 = blockIdx.y * Tile::kSlices;
  const int8_t* first = p.weight + (static_cast<int64_t>(group) * p.slices + slice0) * p.steps * kStepBytes;
  PixelLoader<Tile> pixels(p, static_cast<int64_t>(blockIdx.x) * Tile::kBlockP, group);
  auto load = [&](int step, int stage) {
    load_weights<Tile>(p, first, p.slices - slice0, step, shared + stage * kStage);
    pixels.load(p, shared + stage * kStage + kWeights);
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < p.steps) load(stage, stage);
    commit_copies();
  }
  const int lane = threadIdx.x % 32, half = warp_half<Tile>();
  const uint32_t weights = shared + warp_slice<Tile>() * kStepBytes + lane * 16;
  const uint32_t rows = shared + kWeights + (warp_pixel<Tile>() + lane % 8) * Tile::kStep + ((lane / 8 ^ lane % 8) << 4);
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < p.steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage `read` is complete, and everyone is done with stage `write`
    if (step + Tile::kStages - 1 < p.steps) load(step + Tile::kStages - 1, write);
    commit_copies();
    const uint32_t at = read * kStage;
    if (Tile::kHalves == 1 || half == 0)
      multiply_half<Tile, kOperand, 0>(acc, weights + at, weights + at + Tile::kValueBytes, rows + at);
    if (Tile::kHalves == 1 || half == 1)
      multiply_half<Tile, kOperand, 1>(acc, weights + at, weights + at + Tile::kValueBytes, rows + at);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
  if constexpr (Tile::kHalves == 2) exchange_halves(acc, shared);
}

// Epilogue and store of this thread's part of the tile: kVec neighbouring channels of two pixels in each mma tile.
template <typename Tile, typename Narrow, typename Sum>
__device__ __forceinline__ void store_sparse24(const Sparse24Sums<Tile, Sum>& acc, const Sparse24Params& p) {
  constexpr int kVec = Tile::kVec;
  constexpr int kMine = Tile::kTilesP / Tile::kHalves;  // of the mma tiles
  const int lane = threadIdx.x % 32, group = blockIdx.z;
  const int channel = blockIdx.y * Tile::kBlockC + warp_slice<Tile>() * Tile::kSlice + lane / 4 * kVec;
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x) * Tile::kBlockP + warp_pixel<Tile>() +
                         warp_half<Tile>() * kMine * 8 + lane % 4 * 2;
  const ChannelConstants<kVec> constants = load_constants<kVec>(p.epilogue, group, channel);
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t pixel = pixel0 + j * 8 + e;
      Sum values[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = acc.value[i / 2][j][i % 2 * 2 + e];
      if (pixel < p.pixels) finish<kVec, Narrow>(values, constants, p.epilogue, pixel, group, channel);
    }
  }
}

}  // namespace cnncomp::cuda
