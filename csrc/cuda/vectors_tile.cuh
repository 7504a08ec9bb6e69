// Weights in runs of 32 outputs that share one list of positions (cnncomp/sparsity/vectors.py) times activations: a gathered
// implicit GEMM, from sm_80 on. Gale et al., "Sparse GPU kernels for deep learning", SC 2020, and Chen et al., "Efficient tensor
// core-based GPU kernels for structured sparsity under reduced precision", SC 2021, gather the rows of a matrix so; here a row is
// an input channel (8 bits: four of them) at one tap.
//
// Activations lie channel by channel, in units of eight images: (C, N / 8, H, W, 8), for 8 bits (C / 4, N / 8, H, W, 8, 4). So
// each tap of eight images is aligned, whatever stride and padding, and is inside the image or outside as a whole; neighbouring
// pixels of a channel are neighbours in memory. The output is NHWC, or lies as the input does (vectors_units.cuh).
//
// Weights are the left operand of mma. The right one, pixels, is gathered into rows of kBlockP pixels; fp16 is turned by
// ldmatrix, int8 read as it lies, four mma tiles at once.
#pragma once

#include <string>

#include "cuda/gathered_tile.cuh"

namespace cnncomp::cuda {

// What a piece is, the depth of one mma.
template <int kElement_>
struct VectorsPiece {
  static constexpr int kElement = kElement_;               // bytes
  static constexpr int kRun = 32;                          // outputs
  static constexpr int kUnit = 8;                          // images
  static constexpr int kColumns = kElement == 2 ? 1 : 4;   // channels of a row
  static constexpr int kParts = kElement * kColumns / 2;   // chunks of a unit at one pixel
  static constexpr int kChunkBytes = 16;                   // that a thread copies at once
  static constexpr int kRows = kElement == 2 ? 16 : 8;     // channels, or fours of them
  static constexpr int kValueBytes = kRun * 32;
  static constexpr int kTogether = 32;                     // pixels that a warp reads at once

  // Of the sums of mma tile j: which of the warp's units this lane has, and of it the image, the first or second that it has.
  __device__ __forceinline__ static int unit(int j, int lane) { return kElement == 2 ? j : j / 4 * 4 + lane % 4; }
  __device__ __forceinline__ static int image(int j, int lane, int e) {
    return kElement == 2 ? lane % 4 * 2 + e : 4 * e + j % 4;
  }
};

// A tile of kRun outputs and kBlockP pixels, and its steps of kPieces pieces.
template <typename Piece, int kBlockP_, int kWarpP_, int kPieces_, int kStages_>
struct RunTile : Piece {
  using Piece::kElement, Piece::kRun, Piece::kColumns, Piece::kRows, Piece::kValueBytes;
  static constexpr int kBlockP = kBlockP_, kWarpP = kWarpP_, kPieces = kPieces_, kStages = kStages_;
  static constexpr int kStepRows = kPieces * kRows;
  static constexpr int kRowBytes = kBlockP * kElement * kColumns;
  static constexpr int kChunks = kRowBytes / Piece::kChunkBytes;
  static constexpr int kThreads = 32 * kBlockP / kWarpP;
  static constexpr int kGroups = kThreads / kChunks;  // rows that all threads copy at once
  static constexpr int kCopies = kStepRows / kGroups;
  static constexpr int kTilesC = kRun / 16, kTilesP = kWarpP / 8;  // mma tiles of a warp
  static constexpr int kVec = 2 * kTilesC;                         // neighbouring channels of a thread
  static constexpr int kPieceBytes = kValueBytes + kRows * 4;      // values and places
  static constexpr int kStageBytes = kPieces * kValueBytes + kStepRows * kRowBytes;
  static constexpr int kTableBytes = kStepRows * 8;  // where the rows of a step are
  static_assert(kThreads % kChunks == 0 && kCopies % 4 == 0 && kRows % kCopies == 0, "a thread's rows are of one piece");
  static_assert(kChunks >= 8 && kWarpP % Piece::kTogether == 0, "rows that swizzle, and whole loads");
  static_assert(kThreads >= kStepRows, "a thread for each row");

  static std::string name() {
    return std::to_string(kBlockP) + "_" + std::to_string(kWarpP) + "_" + std::to_string(kPieces) + "_" +
           std::to_string(kStages);
  }
};

template <int kBlockP, int kWarpP, int kPieces, int kStages, int kElement>
struct VectorsTile : RunTile<VectorsPiece<kElement>, kBlockP, kWarpP, kPieces, kStages> {};

struct VectorsParams {
  EpilogueParams epilogue;
  const int8_t* x;
  const int8_t* weight;
  int32_t group_runs;  // of a group; runs of all groups are runs.value
  int32_t n, h, w, r, s;
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t unit_bytes, row_bytes, channel_bytes, group_bytes;  // of x: eight images' pixel, row, channel (or four), group
  int32_t units, out_units;                                   // of the output; whether it lies in them
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

// kBytes, 8 or 16, to shared memory, zeros where `inside` lacks one of `bits`: nothing is read then.
template <int kBytes, int kOffset>
__device__ __forceinline__ void copy_row(uint32_t to, const int8_t* from, uint32_t inside, uint32_t bits) {
#if !CNNCOMP_TURING
  const int read = (inside & bits) == bits ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0+%3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read), "n"(kOffset) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0+%3], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(read), "n"(kOffset) : "memory");
#endif
}

// Loads a run's steps, one after the other. What of a row is the same for all pixels, its distance from the first tap and the
// bits of `inside` that it needs, is worked out once by one thread, a step ahead, and lies in a ring of tables beside the stages.
template <typename Tile>
struct VectorsLoader {
  const int8_t* piece;  // the next step's first
  const int8_t* x;      // this thread's chunk at the first tap of its output unit, of the group's first channel
  uint32_t inside;      // as of PixelLoader
  uint32_t tables;
  int32_t left, step, place;  // pieces to load; the next step; of this thread's row of the step that has no table yet

  __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::kChunks; }
  __device__ __forceinline__ static int first_row() { return threadIdx.x / Tile::kChunks * Tile::kCopies; }

  // After it the tables are complete but for a barrier.
  __device__ __forceinline__ VectorsLoader(const VectorsParams& p, const VectorsPlace<Tile>& at, uint32_t shared)
      : x(p.x + at.group * p.group_bytes), tables(shared + Tile::kStages * Tile::kStageBytes), step(0) {
    const int begin = (2 * p.runs.value + 1 + 3) / 4 * 16;  // bytes of the table of runs
    piece = p.weight + begin + static_cast<int64_t>(at.begin) * Tile::kPieceBytes;
    left = at.end - at.begin;
    const int unit = at.unit0 + chunk() / Tile::kParts;
    // Of units past the last one too: a branch here could go on past the barrier.
    const int image = divide(unit, p.image), rest = unit - image * p.image.value, row = divide(rest, p.row);
    const int h0 = row * p.stride_h - p.pad_h, w0 = (rest - row * p.row.value) * p.stride_w - p.pad_w;
    x += (image * p.h + h0) * p.row_bytes + w0 * p.unit_bytes + chunk() % Tile::kParts * 16;
    inside = taps_inside(unit < p.units ? h0 : p.h, p.h, p.r, p.dil_h) | taps_inside(w0, p.w, p.s, p.dil_w) << 16;
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      find(i);
      write_table(p, i);
    }
    find(Tile::kStages - 1);
  }

  // The place of this thread's row, `ahead` steps after the next one. A row that is filled up has place -1: tap (15, 15), of which
  // no bit is set.
  __device__ __forceinline__ void find(int ahead) {
    const int row = threadIdx.x % Tile::kStepRows, mine = ahead * Tile::kPieces + row / Tile::kRows;
    const int32_t* at = reinterpret_cast<const int32_t*>(piece + mine * Tile::kPieceBytes + Tile::kValueBytes) + row % Tile::kRows;
    place = mine < left ? __ldg(at) : -1;
  }

  __device__ __forceinline__ void write_table(const VectorsParams& p, int stage) const {
    const int r = place >> 4 & 15, s = place & 15;
    const int offset = (place >> 8) * p.channel_bytes + r * p.dil_h * p.row_bytes + s * p.dil_w * p.unit_bytes;
    if (threadIdx.x < Tile::kStepRows)
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(tables + stage * Tile::kTableBytes + threadIdx.x * 8), "r"(offset),
                   "r"(1u << r | 0x10000u << s)
                   : "memory");
  }

  // Where piece `chunk` of 16 bytes of row `row` of a step is: rows that one instruction reads lie in different banks.
  __device__ __forceinline__ static constexpr uint32_t turn(int row) {
    return (Tile::kElement == 2 ? row & 7 : (row & 3) * 2) << 4;
  }
  __device__ __forceinline__ static uint32_t address(int row, int chunk) {
    return row * Tile::kRowBytes + (chunk << 4 ^ turn(row));
  }

  template <int kRow>
  __device__ __forceinline__ void copy_rows(uint32_t to, uint32_t table) const {
    const uint4 two = load_shared_16(table + kRow * 8);
    copy_row<Tile::kChunkBytes, kRow * Tile::kRowBytes>(to ^ turn(kRow), x + static_cast<int32_t>(two.x), inside, two.y);
    copy_row<Tile::kChunkBytes, (kRow + 1) * Tile::kRowBytes>(to ^ turn(kRow + 1), x + static_cast<int32_t>(two.z), inside, two.w);
    if constexpr (kRow + 2 < Tile::kCopies) copy_rows<kRow + 2>(to, table);
  }

  __device__ __forceinline__ void load(const VectorsParams& p, uint32_t shared, int stage) {
    const uint32_t at = shared + stage * Tile::kStageBytes, rows = at + Tile::kPieces * Tile::kValueBytes;
    constexpr int kOfPiece = Tile::kValueBytes / 16, kValues = Tile::kPieces * kOfPiece;
#pragma unroll
    for (int i = 0; i < (kValues + Tile::kThreads - 1) / Tile::kThreads; ++i) {
      const int chunk16 = threadIdx.x + i * Tile::kThreads, mine = chunk16 / kOfPiece;
      if (kValues % Tile::kThreads != 0 && mine >= Tile::kPieces) break;
      if (mine < left) copy_async<16>(at + chunk16 * 16, piece + mine * Tile::kPieceBytes + chunk16 % kOfPiece * 16, 16);
    }
    // A thread's first row is a multiple of the rows that swizzle differently, or its bits of the turn are free.
    static_assert(Tile::kCopies % (Tile::kElement == 2 ? 8 : 4) == 0, "turns are those of the first thread's rows");
    if (first_row() / Tile::kRows < left)
      copy_rows<0>(rows + first_row() * Tile::kRowBytes + chunk() * Tile::kChunkBytes,
                   tables + stage * Tile::kTableBytes + first_row() * 8);
    if (step >= Tile::kStages - 2) {
      write_table(p, stage + 1 == Tile::kStages ? 0 : stage + 1);
      find(2);
    }
    piece += Tile::kPieces * Tile::kPieceBytes;
    left -= Tile::kPieces;
    ++step;
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

// The whole reduction: as many pieces as the run has, none where it is all zeros. multiply(values, rows, first): of a piece, as
// multiply_piece.
template <typename Tile, typename Multiply>
__device__ __forceinline__ void vectors_main_loop(const VectorsParams& p, const VectorsPlace<Tile>& place, uint32_t shared,
                                                  Multiply&& multiply) {
  VectorsLoader<Tile> loader(p, place, shared);
  int pieces = loader.left;
  __syncthreads();
  const int first = threadIdx.x / 32 * (Tile::kWarpP * Tile::kRowBytes / Tile::kBlockP / 16);
  auto load = [&](int stage) { loader.load(p, shared, stage); };
  run_ring<Tile>((pieces + Tile::kPieces - 1) / Tile::kPieces, load, [&](int stage) {
    const uint32_t values = shared + stage * Tile::kStageBytes, rows = values + Tile::kPieces * Tile::kValueBytes;
#pragma unroll
    for (int i = 0; i < Tile::kPieces; ++i)
      if (i < pieces)  // the same for all
        multiply(values + i * Tile::kValueBytes, rows + i * Tile::kRows * Tile::kRowBytes, first);
    pieces -= Tile::kPieces;
  });
}

// Epilogue and store of this thread's part: kVec neighbouring channels of two images of a unit in each mma tile.
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
    const int unit = warp_unit + Tile::unit(j, lane);
    const int block = divide(unit, p.image), rest = unit - block * p.image.value;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int image = block * Tile::kUnit + Tile::image(j, lane, e);
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
