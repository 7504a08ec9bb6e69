// Weights in runs of 32 outputs that share one list of positions (cnncomp/sparsity/vectors.py) times activations: a gathered
// implicit GEMM, from sm_80 on. Gale et al., "Sparse GPU kernels for deep learning", SC 2020, and Chen et al., "Efficient tensor
// core-based GPU kernels for structured sparsity under reduced precision", SC 2021, gather the rows of a matrix so; here a row is
// an input channel (8 bits: four of them) at one tap.
//
// Activations lie channel by channel, in units of eight images: (C, N / 8, H, W, 8), for 8 bits (C / 4, N / 8, H, W, 8, 4). So
// each tap of eight images is aligned, whatever stride and padding, and is inside the image or outside as a whole; neighbouring
// pixels of a channel are neighbours in memory. The output is NHWC.
//
// Weights are the left operand of mma. The right one, pixels, is gathered into rows of kBlockP pixels; fp16 is turned by
// ldmatrix, int8 read as it lies, four mma tiles at once.
#pragma once

#include <string>

#include "cuda/gathered_tile.cuh"

namespace cnncomp::cuda {

template <int kBlockP_, int kWarpP_, int kStages_, int kElement_>
struct VectorsTile {
  static constexpr int kElement = kElement_;  // bytes
  static constexpr int kBlockP = kBlockP_, kWarpP = kWarpP_, kStages = kStages_;
  static constexpr int kRun = 32;                    // outputs
  static constexpr int kUnit = 8;                    // images
  static constexpr int kPieces = 2;                  // of a step; a piece is the depth of one mma
  static constexpr int kRows = kElement == 2 ? 16 : 8;  // of a piece: channels, or fours of them
  static constexpr int kRowBytes = kBlockP * (kElement == 2 ? 2 : 4);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kThreads = 32 * kBlockP / kWarpP;
  static constexpr int kGroups = kThreads / kChunks;  // rows that all threads copy at once
  static constexpr int kCopies = kPieces * kRows / kGroups;
  static constexpr int kTilesC = kRun / 16, kTilesP = kWarpP / 8;  // mma tiles of a warp
  static constexpr int kVec = 2 * kTilesC;                         // neighbouring channels of a thread
  static constexpr int kValueBytes = kRun * 32;                    // of a piece
  static constexpr int kPieceBytes = kValueBytes + kRows * 4;      // and its places
  static constexpr int kStageBytes = kPieces * (kValueBytes + kRows * kRowBytes);
  static_assert(kThreads % kChunks == 0 && kCopies % 4 == 0 && kRows % kCopies == 0, "a thread's rows are of one piece");
  static_assert(kChunks >= 8 && kTilesP % 4 == 0, "rows that swizzle, and whole loads");

  static std::string name() {
    return std::to_string(kBlockP) + "_" + std::to_string(kWarpP) + "_" + std::to_string(kStages);
  }
};

struct VectorsParams {
  EpilogueParams epilogue;
  const int8_t* x;
  const int8_t* weight;
  int32_t group_runs;  // of a group; runs of all groups are runs.value
  int32_t n, h, w, r, s;
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t unit_bytes, row_bytes, channel_bytes, group_bytes;  // of x: eight images' pixel, row, channel (or four), group
  int32_t units;                                              // of the output
  Divisor runs, image, row;                                   // image, row: pixels of an output image and row
};

// Four 8 x 8 matrices of 16-bit elements, turned; lane 8 * i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Which run and which pixels a block computes: runs vary fastest, the longest first.
template <typename Tile>
struct VectorsPlace {
  int run, group, unit0, begin, end;  // begin, end: pieces

  __device__ __forceinline__ explicit VectorsPlace(const VectorsParams& p) {
    const int tile = divide(blockIdx.x, p.runs), at = blockIdx.x - tile * p.runs.value;
    const int32_t* table = reinterpret_cast<const int32_t*>(p.weight);
    begin = __ldg(table + at), end = __ldg(table + at + 1);
    run = __ldg(table + p.runs.value + 1 + at);
    group = run / p.group_runs;
    unit0 = tile * (Tile::kBlockP / Tile::kUnit);
  }
};

// A run's pieces, and where this thread's chunk of the activations is.
template <typename Tile>
struct VectorsLoader {
  const int8_t* piece;  // the next step's first
  const int8_t* x;      // this thread's chunk at the first tap of its output unit, of the group's first channel
  uint32_t inside;      // as of PixelLoader
  int32_t left;         // pieces to load
  int4 places[Tile::kCopies / 4];

  __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::kChunks; }
  __device__ __forceinline__ static int first_row() { return threadIdx.x / Tile::kChunks * Tile::kCopies; }

  __device__ __forceinline__ VectorsLoader(const VectorsParams& p, const VectorsPlace<Tile>& place) {
    const int table = (2 * p.runs.value + 1 + 3) / 4 * 16;  // bytes
    piece = p.weight + table + static_cast<int64_t>(place.begin) * Tile::kPieceBytes;
    left = place.end - place.begin;
    constexpr int kParts = Tile::kElement == 2 ? 1 : 2;  // chunks of a unit
    const int unit = place.unit0 + chunk() / kParts;
    x = p.x + place.group * p.group_bytes, inside = 0;
    if (unit < p.units) {
      const int image = divide(unit, p.image), rest = unit - image * p.image.value, row = divide(rest, p.row);
      const int h0 = row * p.stride_h - p.pad_h, w0 = (rest - row * p.row.value) * p.stride_w - p.pad_w;
      x += (image * p.h + h0) * p.row_bytes + w0 * p.unit_bytes + chunk() % kParts * 16;
      inside = taps_inside(h0, p.h, p.r, p.dil_h) | taps_inside(w0, p.w, p.s, p.dil_w) << 16;
    }
    find();
  }

  // The places of this thread's rows of the next step. A row that is filled up has place -1: tap (15, 15), of which no bit is set.
  __device__ __forceinline__ void find() {
    const int mine = first_row() / Tile::kRows, row = first_row() % Tile::kRows;
    const int4* at = reinterpret_cast<const int4*>(piece + mine * Tile::kPieceBytes + Tile::kValueBytes) + row / 4;
#pragma unroll
    for (int i = 0; i < Tile::kCopies / 4; ++i) places[i] = mine < left ? __ldg(at + i) : make_int4(-1, -1, -1, -1);
  }

  __device__ __forceinline__ void copy(const VectorsParams& p, int place, uint32_t to) const {
    const int r = place >> 4 & 15, s = place & 15;
    const bool real = inside >> r & inside >> (16 + s) & 1;
    const int offset = (place >> 8) * p.channel_bytes + r * p.dil_h * p.row_bytes + s * p.dil_w * p.unit_bytes;
    copy_async_16(to, real ? x + offset : p.x, real);
  }

  // Where chunk `chunk` of row `row` of a step is: rows that one instruction reads lie in different banks.
  __device__ __forceinline__ static uint32_t address(int row, int chunk) {
    const int turn = Tile::kElement == 2 ? row & 7 : (row & 3) * 2;
    return row * Tile::kRowBytes + ((chunk ^ turn) << 4);
  }

  __device__ __forceinline__ void load(const VectorsParams& p, uint32_t stage) {
#pragma unroll
    for (int i = 0; i < (Tile::kPieces * 64 + Tile::kThreads - 1) / Tile::kThreads; ++i) {
      const int at = threadIdx.x + i * Tile::kThreads, mine = at / 64;
      if (mine < min(left, Tile::kPieces))
        copy_async_16(stage + at * 16, piece + mine * Tile::kPieceBytes + at % 64 * 16, true);
    }
    const uint32_t rows = stage + Tile::kPieces * Tile::kValueBytes;
    if (first_row() / Tile::kRows < left) {
#pragma unroll
      for (int i = 0; i < Tile::kCopies / 4; ++i) {
        const int row = first_row() + 4 * i;
        copy(p, places[i].x, rows + address(row, chunk()));
        copy(p, places[i].y, rows + address(row + 1, chunk()));
        copy(p, places[i].z, rows + address(row + 2, chunk()));
        copy(p, places[i].w, rows + address(row + 3, chunk()));
      }
    }
    piece += Tile::kPieces * Tile::kPieceBytes;
    left -= Tile::kPieces;
    find();
  }
};

template <typename Tile, typename Sum>
struct VectorsSums {
  Sum value[Tile::kTilesC][Tile::kTilesP][4];
};

// One piece. `rows`: of the piece, in shared memory; `first`: the warp's first chunk of a row.
template <typename Tile, Operand kOperand, typename Sum>
__device__ __forceinline__ void multiply_piece(VectorsSums<Tile, Sum>& acc, uint32_t values, uint32_t rows, int first) {
  using Loader = VectorsLoader<Tile>;
  const int lane = threadIdx.x % 32;
  uint4 a[Tile::kTilesC];
#pragma unroll
  for (int i = 0; i < Tile::kTilesC; ++i) a[i] = load_shared_16(values + lane * 16 + i * 512);
  if constexpr (Tile::kElement == 2) {
    // Matrices: channels 0-7 and 8-15 of one unit, then of the next one.
#pragma unroll
    for (int j = 0; j < Tile::kTilesP; j += 2) {
      uint32_t b[4];
      load_matrices_turned(b, rows + Loader::address(lane % 16, first + j + lane / 16));
#pragma unroll
      for (int i = 0; i < Tile::kTilesC; ++i) {
        multiply_left<kOperand>(acc.value[i][j], a[i], b[0], b[1]);
        multiply_left<kOperand>(acc.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  } else {
    // A lane's 16 bytes are one row of four pixels, each of which is of another mma tile.
#pragma unroll
    for (int j = 0; j < Tile::kTilesP; j += 4) {
      const int chunk = first + j * 2 + lane / 4;
      const uint4 low = load_shared_16(rows + Loader::address(lane % 4, chunk));
      const uint4 high = load_shared_16(rows + Loader::address(lane % 4 + 4, chunk));
#pragma unroll
      for (int i = 0; i < Tile::kTilesC; ++i) {
        multiply_left<kOperand>(acc.value[i][j], a[i], low.x, high.x);
        multiply_left<kOperand>(acc.value[i][j + 1], a[i], low.y, high.y);
        multiply_left<kOperand>(acc.value[i][j + 2], a[i], low.z, high.z);
        multiply_left<kOperand>(acc.value[i][j + 3], a[i], low.w, high.w);
      }
    }
  }
}

// The whole reduction: as many pieces as the run has, none where it is all zeros.
template <typename Tile, Operand kOperand, typename Sum>
__device__ __forceinline__ void vectors_main_loop(VectorsSums<Tile, Sum>& acc, const VectorsParams& p,
                                                  const VectorsPlace<Tile>& place, uint32_t shared) {
  VectorsLoader<Tile> loader(p, place);
  int pieces = loader.left;
  const int first = threadIdx.x / 32 * (Tile::kWarpP * Tile::kRowBytes / Tile::kBlockP / 16);
  auto load = [&](int stage) { loader.load(p, shared + stage * Tile::kStageBytes); };
  run_ring<Tile>((pieces + Tile::kPieces - 1) / Tile::kPieces, load, [&](int stage) {
    const uint32_t values = shared + stage * Tile::kStageBytes, rows = values + Tile::kPieces * Tile::kValueBytes;
#pragma unroll
    for (int i = 0; i < Tile::kPieces; ++i)
      if (i < pieces)
        multiply_piece<Tile, kOperand>(acc, values + i * Tile::kValueBytes, rows + i * Tile::kRows * Tile::kRowBytes, first);
    pieces -= Tile::kPieces;
  });
}

// Epilogue and store of this thread's part: kVec neighbouring channels of two images of a unit in each mma tile; for 8 bits, one
// image of each of four neighbouring tiles, twice.
template <typename Tile, typename Narrow, typename Sum>
__device__ __forceinline__ void store_vectors(const VectorsSums<Tile, Sum>& acc, const VectorsParams& p,
                                              const VectorsPlace<Tile>& place) {
  constexpr int kVec = Tile::kVec;
  const int lane = threadIdx.x % 32;
  const int channel = (place.run - place.group * p.group_runs) * Tile::kRun + lane / 4 * kVec;
  const int warp_unit = place.unit0 + threadIdx.x / 32 * (Tile::kWarpP / Tile::kUnit);
  const ChannelConstants<kVec> constants = load_constants<kVec>(p.epilogue, place.group, channel);
#pragma unroll
  for (int j = 0; j < Tile::kTilesP; ++j) {
    const int unit = warp_unit + (Tile::kElement == 2 ? j : j / 4 * 4 + lane % 4);
    const int block = divide(unit, p.image), rest = unit - block * p.image.value;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int image = block * Tile::kUnit + (Tile::kElement == 2 ? lane % 4 * 2 + e : 4 * e + j % 4);
      Sum values[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = acc.value[i / 2][j][i % 2 * 2 + e];
      if (unit < p.units && image < p.n)
        finish<kVec, Narrow>(values, constants, p.epilogue, static_cast<int64_t>(image) * p.image.value + rest, place.group,
                             channel);
    }
  }
}

}  // namespace cnncomp::cuda
