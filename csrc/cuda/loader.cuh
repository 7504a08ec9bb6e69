// Loaders of the shared tiles: how rows of activations and of weights are found in global memory.
#pragma once

#include "cuda/conv_params.cuh"
#include "cuda/tile.cuh"

namespace cnncomp::cuda {

// Rows of a matrix, row-major, whose rows are a multiple of kPiece bytes (4, 8 or 16) and aligned: weights, and a GEMM's
// activations. Each thread copies chunk threadIdx.x % kChunks of kRows rows, kRowStep apart.
template <typename Tile, int kRows, int kPiece = Tile::kChunk>
struct RowLoader {
  const int8_t* at[kRows];  // this thread's chunks, moving along the reduction
  uint32_t bytes[kRows];    // kPiece, or 0: the row is not in the matrix
  int left;                 // columns from this thread's chunk on

  // row_of(i) gives the row of the matrix for row i of the shared tile, or a negative number if there is none; `slice` is the
  // first to be loaded.
  template <typename RowOf>
  __device__ __forceinline__ RowLoader(const int8_t* matrix, int columns, int slice, RowOf row_of) {
    const int k = slice * Tile::kSliceBytes + threadIdx.x % Tile::kChunks * Tile::kChunk;
    left = columns - k;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of(threadIdx.x / Tile::kChunks + i * Tile::kRowStep);
      bytes[i] = row >= 0 ? kPiece : 0;
      at[i] = matrix + (row >= 0 ? row * columns : 0) + k;
      pin(at[i]);
      pin(bytes[i]);
    }
    if (left < kPiece) stop();
  }

  // The last slice may have less than other slices.
  __device__ __forceinline__ void stop() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) bytes[i] = 0;
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
    unroll<Tile::kChunk / kPiece>([&](auto piece) {
      constexpr int kAt = piece.value * kPiece;
      const bool real = kAt == 0 || left >= kAt + kPiece;
      unroll<kRows>([&](auto i) {
        copy_async<kPiece, kOffset + i.value * Tile::kRowStepBytes + kAt>(place, at[i.value] + kAt, real ? bytes[i.value] : 0);
      });
    });
#pragma unroll
    for (int i = 0; i < kRows; ++i) at[i] += Tile::kSliceBytes;
    left -= Tile::kSliceBytes;
    if (left < kPiece) stop();
  }
};

// Where an output pixel's taps begin: input row and column of tap (0, 0), and the element offset of that place.
struct Pixel {
  int64_t offset;
  int32_t h0, w0;
};

__device__ __forceinline__ Pixel pixel_of(const ConvParams& p, int m, int group) {
  // Far outside for pixels past the end, so that no tap of theirs is ever inside the image.
  if (m >= p.n * p.p * p.q) return {0, INT32_MIN / 2, 0};
  const uint32_t pixel = m, size = p.p * p.q, image = pixel / size, rest = pixel % size, columns = p.q;
  const int h0 = static_cast<int>(rest / columns) * p.stride_h - p.pad_h;
  const int w0 = static_cast<int>(rest % columns) * p.stride_w - p.pad_w;
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

// Which taps of a pixel exist: bit r * s + s, shifted by 4, so that a bit moved to the right place is the 16 bytes to copy.
__device__ __forceinline__ uint32_t taps_inside(const ConvParams& p, const Pixel& pixel) {
  uint32_t columns = 0, inside = 0;
#pragma unroll 1
  for (int s = p.s - 1; s >= 0; --s)
    columns = columns * 2 + (static_cast<uint32_t>(pixel.w0 + s * p.dil_w) < static_cast<uint32_t>(p.w));
#pragma unroll 1
  for (int r = p.r - 1; r >= 0; --r) {
    const bool row = static_cast<uint32_t>(pixel.h0 + r * p.dil_h) < static_cast<uint32_t>(p.h);
    inside = inside << p.s | (row ? columns : 0);
  }
  return inside << 4;
}

// As copy_async of 16 bytes, by way of the L1: it holds what one tap's pixels share with the next one's.
template <int kOffset>
__device__ __forceinline__ void copy_kept(uint32_t dst, const int8_t* src, uint32_t real) {
#if CNNCOMP_TURING
  copy_async<16, kOffset>(dst, src, real);
#else
  asm volatile("cp.async.ca.shared.global [%0+%3], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(real), "n"(kOffset) : "memory");
#endif
}

// Activations of an implicit GEMM whose channels are a multiple of 64, with up to 28 taps: all of a slice is of one tap,
// so that where it lies is one number for the whole block, and whether it exists one bit for each row.
template <typename Tile>
struct TapLoader {
  const int8_t* at[Tile::kRowsA];  // this thread's chunk at tap (0, 0); may lie outside of the images
  uint32_t inside[Tile::kRowsA];   // of taps_inside
  uint32_t bytes[Tile::kRowsA];    // 16, or 0: the current tap does not exist
  int64_t offset;                  // from tap (0, 0) to the slice
  int64_t to_column, to_row;       // to add after the last slice of a tap; and more after the last tap of a row
  int tap, column, left;           // column: tap % s; left: channels of the tap that are not loaded yet
  int columns, channels;           // of the kernel; of a tap

  __device__ __forceinline__ TapLoader(const ConvParams& p, const Work& work) : columns(p.s), channels(p.c_group) {
    find_rows(p, work);
    const int k = work.slice * Tile::kSliceBytes;
    tap = k / channels, column = tap % columns, left = channels - k % channels;
    offset = (static_cast<int64_t>(tap / columns * p.dil_h) * p.w + column * p.dil_w) * p.c + k % channels;
    to_column = static_cast<int64_t>(p.dil_w) * p.c - channels;
    to_row = (static_cast<int64_t>(p.dil_h) * p.w - columns * p.dil_w) * p.c;
    pin(to_column);
    pin(to_row);
    choose();
  }

  // The four threads of a row have the same rows: each computes one, and the others get it from there.
  __device__ __forceinline__ void find_rows(const ConvParams& p, const Work& work) {
    constexpr int kQuad = Tile::kChunks;
    const int chunk = threadIdx.x % kQuad;
#pragma unroll
    for (int first = 0; first < Tile::kRowsA; first += kQuad) {
      const int row = threadIdx.x / kQuad + (first + min(chunk, Tile::kRowsA - 1 - first)) * Tile::kRowStep;
      const Pixel pixel = pixel_of(p, work.m0 + row, work.group);
      const int64_t own = reinterpret_cast<int64_t>(p.x) + pixel.offset;
      const uint32_t own_inside = taps_inside(p, pixel);
#pragma unroll
      for (int i = first; i < min(first + kQuad, Tile::kRowsA); ++i) {
        const int64_t place = Tile::kRowsA == 1 ? own : __shfl_sync(~0u, own, i - first, kQuad);
        at[i] = reinterpret_cast<const int8_t*>(place) + chunk * Tile::kChunk;
        inside[i] = Tile::kRowsA == 1 ? own_inside : __shfl_sync(~0u, own_inside, i - first, kQuad);
        pin(at[i]);
      }
    }
  }

  __device__ __forceinline__ void choose() {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) bytes[i] = inside[i] >> tap & Tile::kChunk;
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
    unroll<Tile::kRowsA>([&](auto i) {
      copy_kept<kOffset + i.value * Tile::kRowStepBytes>(place, at[i.value] + offset, bytes[i.value]);
    });
    offset += Tile::kSliceBytes;
    left -= Tile::kSliceBytes;
    if (left == 0) next_tap();
  }

  __device__ __forceinline__ void next_tap() {
    left = channels;
    offset += to_column;
    ++tap;
    if (++column == columns) column = 0, offset += to_row;
    choose();
  }
};

// Activations of an implicit GEMM whose channels are a multiple of kPiece (4, 8 or 16): a piece never crosses taps.
template <typename Tile, int kPiece>
struct ConvLoader {
  const ConvParams& p;
  Pixel pixel[Tile::kRowsA];
  Tap tap;
  int k;

  __device__ __forceinline__ ConvLoader(const ConvParams& params, const Work& work)
      : p(params), tap(params, first(work)), k(first(work)) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      pixel[i] = pixel_of(p, work.m0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep, work.group);
  }
  static __device__ __forceinline__ int first(const Work& work) {
    return work.slice * Tile::kSliceBytes + threadIdx.x % Tile::kChunks * Tile::kChunk;
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
    unroll<Tile::kChunk / kPiece>([&](auto piece) {
      constexpr int kAt = piece.value * kPiece;
      const int8_t* at = p.x + tap.offset(p);
      unroll<Tile::kRowsA>([&](auto i) {
        const bool real = k + kAt < p.reduction && tap.inside(p, pixel[i.value]);
        copy_async<kPiece, kOffset + i.value * Tile::kRowStepBytes + kAt>(place, at + pixel[i.value].offset, real ? kPiece : 0);
      });
      tap.advance(p, kAt + kPiece < Tile::kChunk ? kPiece : Tile::kSliceBytes - Tile::kChunk + kPiece);
    });
    k += Tile::kSliceBytes;
  }
};

// Activations byte by byte: any number of channels, any alignment.
template <typename Tile>
struct ConvByteLoader {
  const ConvParams& p;
  Pixel pixel[Tile::kRowsA];
  int k;

  __device__ __forceinline__ ConvByteLoader(const ConvParams& params, const Work& work)
      : p(params), k(work.slice * Tile::kSliceBytes + threadIdx.x % Tile::kChunks * Tile::kChunk) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      pixel[i] = pixel_of(p, work.m0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep, work.group);
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
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
      for (int i = 0; i < Tile::kRowsA; ++i) store_shared(place + kOffset + i * Tile::kRowStepBytes + b, word[i]);
    }
    k += Tile::kSliceBytes;
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
  __device__ __forceinline__ RowByteLoader(const int8_t* matrix_, int columns_, int slice, RowOf row_of)
      : matrix(matrix_), k(slice * Tile::kSliceBytes + threadIdx.x % Tile::kChunks * Tile::kChunk), columns(columns_) {
    exists = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of(threadIdx.x / Tile::kChunks + i * Tile::kRowStep);
      exists |= (row >= 0 ? 1u : 0u) << i;
      offset[i] = row >= 0 ? row * columns : 0;
    }
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
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
        store_shared(place + kOffset + i * Tile::kRowStepBytes + b, word);
      }
    }
    k += Tile::kSliceBytes;
  }
};

// Activations and weights together, as main_loop wants them.
template <typename Tile, typename LoaderA, typename LoaderB>
struct LoaderPair {
  LoaderA a;
  LoaderB b;

  template <int kSlice>
  __device__ __forceinline__ void load(uint32_t place) {
    a.template load<kSlice * Tile::kBytesA>(place);
    b.template load<Tile::kSlices * Tile::kBytesA + kSlice * Tile::kBytesB>(place);
  }
};

// Row of the weight matrix that row `row` of the shared tile holds, or -1 past the group's channels.
template <typename Tile>
__device__ __forceinline__ int64_t weight_row(const Work& work, int row, int k_group) {
  const int channel = work.n0 + channel_of_row<Tile>(row);
  return channel < k_group ? static_cast<int64_t>(work.group) * k_group + channel : -1;
}

}  // namespace cnncomp::cuda
