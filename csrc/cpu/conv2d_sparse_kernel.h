// What the drivers of the sparse kernels and the micro-kernels, compiled once per instruction set, say to each other.
// Plain data only: see conv2d_sparse_tile.h.
#pragma once

#include <cstdint>

namespace cnncomp {

constexpr int kSparseMaxTile = 14;   // vectors: with the broadcast weight and one to spare they fill 16 registers
constexpr int kDenseMaxTile = 6;     // vectors, times 4 output channels on 32 registers
constexpr int kDenseRows = 8;        // output channels whose dense weights lie next to each other
constexpr int kSparseMaxLanes = 16;  // floats in the widest vector

// Pixels of a tile that are consecutive in the output, too.
struct SparseSegment {
  int64_t tile_begin, length;
  int64_t out_begin;  // floats from SparseTile::out, for output channel 0
};

// The outputs that a vector of a tile holds, from its first lane on.
struct SparsePiece {
  int64_t out_begin, length;  // as in SparseSegment; not all lanes need be outputs
};

// One tile of output pixels, one block of input channels, a range of output channels.
struct SparseTile {
  const float* values;  // dense: of this block, (ceil(K / kDenseRows), block_floats)
  int64_t block_floats;
  int64_t count;  // dense: inputs of the block, channels times taps
  const uint16_t* index;
  const int32_t* row_ptr;  // of this block: row k is [row_ptr[k], row_ptr[k + 1])
  int64_t k_begin, k_end;
  const float* x;         // of this block; a non-zero's inputs are either
  int64_t step;           // index * step bytes from it, or
  const int32_t* offset;  // as many bytes as is said here for each non-zero of the weights
  const float* next;      // inputs that are wanted after this block, `next_channels` of them `step` bytes apart; or null
  int64_t next_channels;
  float* partial;         // (k_end - k_begin, tile): the sums over the blocks before this one
  bool first_block, last_block;
  const float* bias;      // of output channel 0, or null
  const float* residual;  // laid out like out, or null
  float* out;             // of output channel 0
  int64_t out_stride_k;   // floats
  const SparseSegment* segments;
  int64_t num_segments;
  const SparsePiece* pieces;  // the same by vectors of the tile; null where one holds more than one piece
  float lo, hi;
};

// A stretch of one row of one packed plane: zeros, then input, then zeros.
struct SparseRun {
  int64_t length, first, last;  // the input is at [first, last)
  int64_t row;                  // of the plane
  int64_t image, column;        // floats from SparsePack::x to the image; column of the input that goes to `first`
};

// Copies input channels to planes: (channels, row planes, column planes, plane_length) floats.
struct SparsePack {
  const float* x;  // first channel of the first image
  int64_t channels, h, w, stride_h, stride_w;
  int64_t pitch;  // floats from a channel to the next
  const int64_t* row_start;  // for each row plane, the input row that is its row 0
  int64_t row_planes, column_planes, plane_length;
  const SparseRun* runs;  // (num_runs, column planes)
  int64_t num_runs;
  float* dst;
};

using SparseTileKernel = void (*)(const SparseTile&);

struct SparseKernels {
  int lanes, last_lanes;  // floats in a vector, and in the last one of a narrow tile: as many, or fewer
  // [narrow][T - 1]: T vectors of pixels
  SparseTileKernel tile_steps[2][kSparseMaxTile], tile_offsets[2][kSparseMaxTile];
  SparseTileKernel dense_steps[kDenseMaxTile], dense_offsets[kDenseMaxTile];
  void (*pack)(const SparsePack&);
};

extern const SparseKernels kSparseBaseline;
extern const SparseKernels kSparseAvx2;    // x86-64 only
extern const SparseKernels kSparseAvx512;  // x86-64 only

// The kernels for the instruction set in force.
const SparseKernels& sparse_kernels();

}  // namespace cnncomp
