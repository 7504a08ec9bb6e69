// 2:4 sparse weights times activations: the tile, its loader, main loop and epilogue.
//
// The sparse operand of mma.sp is the left one, so a tile is kBlockC output channels x kBlockP pixels. A step of the reduction
// is 128 bytes of dense elements. Its weights lie in memory as they are multiplied (cnncomp/sparsity/two_four.py): copied as
// they are, read back 16 bytes a lane, no conflicts. A row of pixels is 128 bytes, its 16-byte chunks exchanged by the row's
// number, and read by load_matrices.
#pragma once

#include <string>

#include "cuda/conv_params.cuh"
#include "cuda/sparse24_mma.cuh"
#include "cuda/sparse_division.cuh"

namespace cnncomp::cuda {

template <int kBlockC_, int kBlockP_, int kWarpP_, int kStages_, int kElement_>
struct Sparse24Tile {
  static constexpr int kElement = kElement_;  // bytes
  static constexpr int kBlockC = kBlockC_, kBlockP = kBlockP_, kWarpP = kWarpP_, kStages = kStages_;
  static constexpr int kSlice = 64;   // channels of a warp, and of a packed slice
  static constexpr int kStep = 128;   // dense bytes of the reduction
  static constexpr int kChunks = kStep / 16;
  static constexpr int kSlices = kBlockC / kSlice, kWarpsP = kBlockP / kWarpP;
  static constexpr int kThreads = 32 * kSlices * kWarpsP;
  static constexpr int kTilesC = kSlice / 16, kTilesP = kWarpP / 8;  // mma tiles of a warp
  static constexpr int kRowStep = kThreads / kChunks;                // rows of pixels between two chunks of a thread
  static constexpr int kRows = kBlockP / kRowStep;                   // chunks of pixels that a thread copies
  static constexpr int kValueBytes = kSlice * kStep / 2;
  static constexpr int kPixelBytes = kBlockP * kStep;
  static constexpr int kVec = 2 * kTilesC;  // neighbouring channels of a thread
  static_assert(kBlockC % kSlice == 0 && kWarpP % 8 == 0 && kBlockP % kWarpP == 0, "whole slices and whole mma tiles");
  static_assert(kRowStep % 8 == 0 && kBlockP % kRowStep == 0, "a thread's chunks all have the same place in their rows");

  static constexpr int kStepBytes = kValueBytes + kValueBytes / (4 * kElement);  // a slice's: 2 bits for each kept element
  static constexpr int kStageBytes = kSlices * kStepBytes + kPixelBytes;

  static std::string name() {
    return std::to_string(kBlockC) + "x" + std::to_string(kBlockP) + "_" + std::to_string(kWarpP) + "_" +
           std::to_string(kStages);
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

  __device__ __forceinline__ void load(const Sparse24Params& p, uint32_t tile) {
    const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    const uint32_t place = tile + row * Tile::kStep + ((chunk ^ (row & 7)) << 4);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const bool real = inside[i] >> r & inside[i] >> (16 + s) & 1;
      copy_async<16>(place + i * Tile::kRowStep * Tile::kStep, tap + offset[i], real ? 16 : 0);
    }
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

template <typename Tile, typename Sum>
struct Sparse24Sums {
  Sum value[Tile::kTilesC][Tile::kTilesP][4];
};

// Half a step: 64 bytes of the reduction. `weights`: this lane's 16 bytes of the slice's first tile; `pixels`: the row that this
// lane names to load_matrices.
template <typename Tile, Operand kOperand, int kHalf, typename Sum>
__device__ __forceinline__ void multiply_half(Sparse24Sums<Tile, Sum>& acc, uint32_t weights, uint32_t metadata,
                                              uint32_t pixels) {
  const uint4 words = load_shared_16(kOperand == Operand::kFloat16 ? metadata : metadata + kHalf * 512);
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
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t weights = shared + warp % Tile::kSlices * kStepBytes + lane * 16;
  const uint32_t rows = shared + kWeights + (warp / Tile::kSlices * Tile::kWarpP + lane % 8) * Tile::kStep +
                        ((lane / 8 ^ lane % 8) << 4);
  int read = 0, write = Tile::kStages - 1;
  for (int step = 0; step < p.steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage `read` is complete, and everyone is done with stage `write`
    if (step + Tile::kStages - 1 < p.steps) load(step + Tile::kStages - 1, write);
    commit_copies();
    const uint32_t at = read * kStage;
    multiply_half<Tile, kOperand, 0>(acc, weights + at, weights + at + Tile::kValueBytes, rows + at);
    multiply_half<Tile, kOperand, 1>(acc, weights + at, weights + at + Tile::kValueBytes, rows + at);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
}

// Epilogue and store of this thread's part of the tile: kVec neighbouring channels of two pixels in each mma tile.
template <typename Tile, typename Sum>
__device__ __forceinline__ void store_sparse24(const Sparse24Sums<Tile, Sum>& acc, const Sparse24Params& p) {
  constexpr int kVec = Tile::kVec;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = blockIdx.z;
  const int channel = blockIdx.y * Tile::kBlockC + warp % Tile::kSlices * Tile::kSlice + lane / 4 * kVec;
  const int64_t pixel0 =
      static_cast<int64_t>(blockIdx.x) * Tile::kBlockP + warp / Tile::kSlices * Tile::kWarpP + lane % 4 * 2;
  const ChannelConstants<kVec> constants = load_constants<kVec>(p.epilogue, group, channel);
#pragma unroll
  for (int j = 0; j < Tile::kTilesP; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t pixel = pixel0 + j * 8 + e;
      Sum values[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = acc.value[i / 2][j][i % 2 * 2 + e];
      if (pixel < p.pixels) finish<kVec>(values, constants, p.epilogue, pixel, group, channel);
    }
  }
}

// Why the kernels can't run a convolution of elements of so many bytes; empty where they can.
inline std::string sparse24_refusal(const Conv2d& c, int element) {
  const int64_t image = static_cast<int64_t>(c.n) * c.h * c.w * c.c * element, border = 2 * (c.pad_h + 1) * int64_t{c.w} * c.c;
  if (c.c / c.groups * element % 16) return "input channels of a group that are no multiple of 16 bytes";
  if (c.r > 15 || c.s > 15) return "a kernel of more than 15 rows or columns";
  if (image + border * element > INT32_MAX) return "an input of more than 2^31 bytes";
  if (!aligned(c.x, 16) || !aligned(c.weight, 16)) return "an input or weight that is not aligned to 16 bytes";
  return "";
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

}  // namespace cnncomp::cuda
