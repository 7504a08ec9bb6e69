// Loaders of the shared tiles: how rows of activations and of weights are found in global memory.
#pragma once

#include "cuda/conv_params.cuh"
#include "cuda/tile.cuh"

namespace cnncomp::cuda {

// Rows of a matrix, row-major, whose rows are a multiple of 16 bytes and aligned: weights, and a GEMM's activations.
// Each thread copies chunk threadIdx.x % kChunks of kRows rows, kRowStep apart.
template <typename Tile, int kRows>
struct RowLoader {
  const int8_t* base;  // this thread's chunk of row 0 of the matrix, moving along k
  int64_t offset[kRows];
  uint32_t exists;  // bit i: row i is in the matrix
  int k, columns;

  // row_of(i) gives the row of the matrix for row i of the shared tile, or a negative number if there is none.
  template <typename RowOf>
  __device__ __forceinline__ RowLoader(const int8_t* matrix, int columns_, RowOf row_of)
      : k(threadIdx.x % Tile::kChunks * Tile::kChunk), columns(columns_) {
    base = matrix + k;
    exists = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of(threadIdx.x / Tile::kChunks + i * Tile::kRowStep);
      exists |= (row >= 0 ? 1u : 0u) << i;
      offset[i] = row >= 0 ? row * columns : 0;
    }
  }

  __device__ __forceinline__ void load(uint32_t tile) {
    const uint32_t place = tile + own_place<Tile>();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool real = (exists >> i & 1) && k < columns;
      copy_async_16(place + i * Tile::kStepBytes, real ? base + offset[i] : base - k, real);
    }
    base += Tile::kBlockK;
    k += Tile::kBlockK;
  }
};

// Where an output pixel's taps begin: input row and column of tap (0, 0), and the element offset of that place.
struct Pixel {
  int64_t offset;
  int32_t h0, w0;
};

__device__ __forceinline__ Pixel pixel_of(const ConvParams& p, int64_t m, int group) {
  // Far outside for pixels past the end, so that no tap of theirs is ever inside the image.
  if (m >= static_cast<int64_t>(p.n) * p.p * p.q) return {0, INT32_MIN / 2, 0};
  const int pixel = static_cast<int>(m), image = pixel / (p.p * p.q), rest = pixel % (p.p * p.q);
  const int h0 = rest / p.q * p.stride_h - p.pad_h, w0 = rest % p.q * p.stride_w - p.pad_w;
  return {((static_cast<int64_t>(image) * p.h + h0) * p.w + w0) * p.c + static_cast<int64_t>(group) * p.c_group, h0, w0};
}

// A position in the reduction (r, s, c), c fastest.
struct Tap {
  int32_t dh, dw, c;  // dh, dw: tap times dilation

  __device__ __forceinline__ Tap(const ConvParams& p, int k) {
    const int tap = k / p.c_group;
    c = k % p.c_group;
    dh = tap / p.s * p.dil_h;
    dw = tap % p.s * p.dil_w;
  }
  __device__ __forceinline__ void advance(const ConvParams& p, int by) {
    c += by;
    while (c >= p.c_group) {
      c -= p.c_group;
      dw += p.dil_w;
      if (dw == p.s * p.dil_w) dw = 0, dh += p.dil_h;
    }
  }
  __device__ __forceinline__ bool inside(const ConvParams& p, const Pixel& at) const {
    return static_cast<uint32_t>(at.h0 + dh) < static_cast<uint32_t>(p.h) &&
           static_cast<uint32_t>(at.w0 + dw) < static_cast<uint32_t>(p.w);
  }
  __device__ __forceinline__ int64_t offset(const ConvParams& p) const {
    return (static_cast<int64_t>(dh) * p.w + dw) * p.c + c;
  }
};

// Activations of an implicit GEMM, channels a multiple of 16: a chunk never crosses taps.
template <typename Tile>
struct ConvLoader {
  const ConvParams& p;
  Pixel pixel[Tile::kRowsA];
  Tap tap;
  int k;

  __device__ __forceinline__ ConvLoader(const ConvParams& params, int64_t m0, int group)
      : p(params), tap(params, threadIdx.x % Tile::kChunks * Tile::kChunk), k(threadIdx.x % Tile::kChunks * Tile::kChunk) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      pixel[i] = pixel_of(p, m0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep, group);
  }

  __device__ __forceinline__ void load(uint32_t tile) {
    const uint32_t place = tile + own_place<Tile>();
    const int8_t* at = p.x + tap.offset(p);
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) {
      const bool real = k < p.reduction && tap.inside(p, pixel[i]);
      copy_async_16(place + i * Tile::kStepBytes, real ? at + pixel[i].offset : p.x, real);
    }
    k += Tile::kBlockK;
    tap.advance(p, Tile::kBlockK);
  }
};

// Activations byte by byte: any number of channels, any alignment.
template <typename Tile>
struct ConvByteLoader {
  const ConvParams& p;
  Pixel pixel[Tile::kRowsA];
  int k;

  __device__ __forceinline__ ConvByteLoader(const ConvParams& params, int64_t m0, int group)
      : p(params), k(threadIdx.x % Tile::kChunks * Tile::kChunk) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      pixel[i] = pixel_of(p, m0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep, group);
  }

  __device__ __forceinline__ void load(uint32_t tile) {
    const uint32_t place = tile + own_place<Tile>();
    Tap tap(p, k);
#pragma unroll 1  // a chunk at once takes more registers than there are
    for (int b = 0; b < Tile::kChunk; b += 4) {
      uint32_t word[Tile::kRowsA] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < Tile::kRowsA; ++i) {
          const bool real = k + b + j < p.reduction && tap.inside(p, pixel[i]);
          const uint32_t byte = real ? static_cast<uint8_t>(__ldg(p.x + pixel[i].offset + tap.offset(p))) : 0u;
          word[i] |= byte << (8 * j);
        }
        tap.advance(p, 1);
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowsA; ++i) store_shared(place + i * Tile::kStepBytes + b, word[i]);
    }
    k += Tile::kBlockK;
  }
};

// Rows of a matrix byte by byte. Interface of RowLoader.
template <typename Tile, int kRows>
struct RowByteLoader {
  const int8_t* matrix;
  int64_t offset[kRows];
  uint32_t exists;
  int k, columns;

  template <typename RowOf>
  __device__ __forceinline__ RowByteLoader(const int8_t* matrix_, int columns_, RowOf row_of)
      : matrix(matrix_), k(threadIdx.x % Tile::kChunks * Tile::kChunk), columns(columns_) {
    exists = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of(threadIdx.x / Tile::kChunks + i * Tile::kRowStep);
      exists |= (row >= 0 ? 1u : 0u) << i;
      offset[i] = row >= 0 ? row * columns : 0;
    }
  }

  __device__ __forceinline__ void load(uint32_t tile) {
    const uint32_t place = tile + own_place<Tile>();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll 1
      for (int b = 0; b < Tile::kChunk; b += 4) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool real = (exists >> i & 1) && k + b + j < columns;
          word |= (real ? static_cast<uint8_t>(__ldg(matrix + offset[i] + k + b + j)) : 0u) << (8 * j);
        }
        store_shared(place + i * Tile::kStepBytes + b, word);
      }
    }
    k += Tile::kBlockK;
  }
};

// Activations and weights together, as main_loop wants them.
template <typename LoaderA, typename LoaderB>
struct LoaderPair {
  LoaderA a;
  LoaderB b;
  __device__ __forceinline__ void load(uint32_t tile_a, uint32_t tile_b) {
    a.load(tile_a);
    b.load(tile_b);
  }
};

// Row of the weight matrix that row `row` of the shared tile holds, or -1 past the group's channels.
template <typename Tile>
__device__ __forceinline__ int64_t weight_row(int row, int k_group) {
  const int channel = blockIdx.y * Tile::kBlockN + channel_of_row<Tile>(row);
  return channel < k_group ? static_cast<int64_t>(blockIdx.z) * k_group + channel : -1;
}

}  // namespace cnncomp::cuda
