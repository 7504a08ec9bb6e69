// What the drivers of the int8 kernels and the kernels, compiled once per instruction set, say to each other.
// Plain data only: a kernel's translation unit must emit no inline function that the linker could pick for the rest.
#pragma once

#include <cstdint>

namespace cnncomp {

enum Dtype : int { kU8 = 0, kS8 = 1, kF32 = 2 };

constexpr int kBlock = 16;        // output channels that meet one quad of inputs
constexpr int kMaxBlocks = 4;     // blocks in a panel of weights
constexpr int kChannelPad = 64;   // constants can be read up to a multiple of this many channels
constexpr int kMaxPixels = 16;    // pixels in a register tile, at most

// What comes before the clamp.
enum Nonlinearity : int { kNone = 0, kSilu = 1, kHardswish = 2 };

// t = acc * scale[k] + bias[k] (+ shift[k] * window sum) (+ residual * residual_scale); (t = nonlinearity(t) * out_factor;)
// t = min(max(t, lo), hi[k]); rounded to even for 8 bit.
struct Int8Epilogue {
  const float *scale, *bias, *hi;  // of the first channel
  float lo, residual_scale;
  Dtype residual_dtype, out_dtype;
  const char* residual;  // of the first pixel and channel, or null
  char* out;             // of the first pixel and channel
  int64_t stride;        // elements from pixel to pixel, in out and residual
  int64_t channels;      // to be written; those beyond the last are computed and dropped
  const float* shift;    // of the first channel, or null
  const int32_t* window;     // with a shift: sums of the inputs under the window, of the first pixel on, or ...
  bool window_per_channel;   // ... of the first channel on, for one pixel
  bool bytes;                // out and residual are 8 bit, and what is rounded fits int32 before it is clamped
  uint8_t lo_byte;           // lo and hi, rounded to outputs
  const uint8_t* hi_bytes;   // of the first channel, or null where clamping to them changes nothing
  Nonlinearity nonlinearity;
  float out_factor;  // behind a nonlinearity
};

// A panel: up to kMaxBlocks blocks of output channels, any number of pixels.
struct ConvPanel {
  const uint8_t* const* rows;  // (pixels, taps): where the channels of the input pixel under a tap begin
  int64_t pixels, taps, quads;
  bool x_signed;
  const int8_t* weight;    // (blocks, taps, quads, 16, 4)
  int64_t blocks;
  const int32_t* init;     // (blocks * 16): what the accumulators start from
  Int8Epilogue epilogue;
  int64_t next_blocks;     // of the panel behind this one, 0 for none: they are fetched into the cache meanwhile
  // Where products of bytes saturate (Int8Kernels::range): the largest input of each channel under any of the pixels' taps, padding
  // among them, all unsigned; and for its weights in parts 9/4 of the panel's bytes and 1024 for each block; or null.
  const uint8_t* most;
  uint8_t* parts;
  const uint8_t* least;    // with one tap: what was taken from the inputs of each channel, and init does not know of; or null
};

struct DepthwisePanel {
  const uint8_t* const* rows;  // (pixels, 4 * quads), and 16 * blocks bytes can be read from each
  int64_t pixels, quads;       // quads of taps
  bool x_signed;
  const int8_t* weight;  // (blocks, quads, 16, 4)
  int64_t blocks;
  const int32_t* init;
  int8_t* scratch;  // quads * 256 bytes, at a multiple of 64
  Int8Epilogue epilogue;
};

// Rows of output pixels of a window that moves by one or two columns; no residual, no shift.
struct DepthwiseColumns {
  const uint8_t* const* rows;  // (rows, taps of a column): where the input row under a tap begins
  int64_t num_rows, q;         // of the output
  int64_t w, c, pad;           // of the input; channels can be read up to whole blocks
  const uint8_t* zeros;        // for the channels of a pixel outside
  bool x_signed;
  const int8_t* weight;        // (blocks, columns, quads of a column, 16, 4)
  int64_t block, end;          // the blocks of channels to compute, the first a multiple of four
  const int32_t* init;
  int8_t* scratch;             // columns * quads * 256 bytes, at a multiple of 64
  Int8Epilogue epilogue;       // from channel 0 on
};

using DepthwiseColumnsFn = void (*)(const DepthwiseColumns&);

constexpr int kSparseInt8MaxTile = 14;  // vectors of pixels

constexpr int kScatteredInt8MaxTile = 2;

// Copies the channels of some pixels to planes of quads, or of single channels: dst (quads, quad_stride bytes); of channels up
// to a multiple of 16 are written.
struct SparseInt8Gather {
  const uint8_t* const* rows;  // where the channels of each pixel begin; 16 bytes can be read from any of them
  int64_t pixels;              // a multiple of 16
  int64_t channel, quads;      // the first channel, and how many quads from there
  bool x_signed;
  uint8_t* dst;
  int64_t quad_stride;
  int64_t odd;                 // bytes from the even halves of a quad's pixels to the odd ones, if kernels split them
};

// One tile of output pixels, one block of input channels, a range of output channels.
struct SparseInt8Tile {
  const int8_t* values;
  const uint16_t* index;   // one for each quad of values, or one for each value
  const int32_t* row_ptr;  // of this block: row k is [row_ptr[k], row_ptr[k + 1])
  int64_t k_begin, k_end;
  const uint8_t* x;       // of this block
  int64_t step;           // index * step bytes from x is what a weight meets; or, where that is 0, ...
  const int32_t* offset;  // ... as many as is said here for each index
  int64_t odd;            // see SparseInt8Gather
  bool bounded;           // whether SparseInt8Kernels::bounded said so of the values
  const int32_t* init;    // of channel 0: what the sums start from
  int32_t* sums;          // (k_end - k_begin, tile): over the blocks so far
  bool first_block;
  // With the last block the tile may go on: to floats in the place of sums, or, unless `bytes` is null, to 8-bit outputs.
  bool floats;              // the outputs, but for a residual
  uint8_t* bytes;           // (k_end - k_begin, byte_stride): the outputs, pixel by pixel
  const uint8_t* residual;  // like bytes, or null; or else ...
  const float* addend;      // ... a residual of floats that is laid out like sums, or null; lo and hi are 8-bit numbers then
  int64_t byte_stride;      // the tile's pixels, rounded up to whole vectors of bytes
  Int8Epilogue epilogue;    // its constants are those of channel 0
};

// 8-bit pixels between planes of channels, as a tile has them, and rows of channels, as tensors have them.
struct SparseInt8Turn {
  uint8_t* planes;  // (channels, stride)
  int64_t stride;
  uint8_t* const* rows;  // where the channels of each pixel begin
  int64_t pixels;        // a multiple of 16
  int64_t channel, channels;  // the first in the rows, and how many, a multiple of 16
};

// Pixels of a tile that are consecutive in the output, too.
struct SparseInt8Segment {
  int64_t tile_begin, length;
  int64_t out_begin;  // output pixel
};

constexpr int kSparseInt8Channels = 64;  // that are finished at a time: bytes of a cache line

// Up to kSparseInt8Channels output channels of one tile, from sums to any outputs.
struct SparseInt8Finish {
  const int32_t* sums;        // (channels rounded up to 16, tile)
  int64_t tile;               // pixels, a multiple of the vector's lanes
  int64_t channel, channels;  // the first, a multiple of 16, and how many
  int32_t* turned;            // scratch: (16, tile)
  const SparseInt8Segment* segments;
  int64_t num_segments;
  Int8Epilogue epilogue;  // its pointers are of output pixel 0 and channel 0 of the group
};

struct SparseInt8Kernels {
  int lanes;     // pixels in a vector
  int max_tile;  // vectors in a tile
  bool splits;   // whether quads of pixels lie in their planes as 16-bit halves: all even ones, then all odd ones
  void (*tile[kSparseInt8MaxTile])(const SparseInt8Tile&);  // tile[T - 1]: T vectors of pixels
  void (*gather)(const SparseInt8Gather&);
  void (*finish)(const SparseInt8Finish&);
  void (*planes_to_rows)(const SparseInt8Turn&);
  void (*rows_to_planes)(const SparseInt8Turn&);
  int32_t (*sum_quads)(const int8_t* values, int64_t count);
  // For non-zeros at random, on planes of single channels: a vector holds 4 * lanes pixels.
  void (*scattered_tile[kScatteredInt8MaxTile])(const SparseInt8Tile&);
  void (*scattered_gather)(const SparseInt8Gather&);
  // Where products of bytes saturate, whether no sum of two can with these weights, of any inputs; else null.
  bool (*bounded)(const int8_t* quads, int64_t count);
};

struct QuantizeRange {
  float inv_scale, lo, hi;
};

struct Int8Kernels {
  int max_blocks;               // of a ConvPanel
  int max_pixels[kMaxBlocks];   // pixels in the register tile of 1, 2, ... blocks
  void (*conv)(const ConvPanel&);
  void (*depthwise)(const DepthwisePanel&);
  // To bytes without a nonlinearity, to any outputs; of 3x3 and 5x5 windows; stride 1 and 2 along the row.
  DepthwiseColumnsFn depthwise_columns[2][2][2];
  // sums[i] = sum of the weights of channel i in one block of (quads, 16, 4).
  void (*sum_weights)(const int8_t* block, int64_t quads, int32_t* sums);
  // sums[i] = sum of `channels` inputs under each of the taps of pixel i. rows: (pixels, taps).
  void (*sum_rows)(const uint8_t* const* rows, int64_t pixels, int64_t taps, int64_t channels, bool x_signed,
                   int32_t* sums);
  void (*quantize_flat)(const float* x, int64_t count, const QuantizeRange&, uint8_t* out);
  // x: pixels of c planes, plane_stride floats apart; out (pixels, c).
  void (*quantize_planes)(const float* x, int64_t plane_stride, int64_t c, int64_t pixels, const QuantizeRange&,
                          uint8_t* out);
  // out[i] = max over rows[0..count) of row[i]; count >= 1.
  void (*max_rows_u8)(const uint8_t* const* rows, int64_t count, int64_t c, uint8_t* out);
  void (*max_rows_s8)(const uint8_t* const* rows, int64_t count, int64_t c, uint8_t* out);
  // Where products of bytes saturate, and conv is faster if it knows what inputs are at most; else null. The least and the largest
  // of each channel of consecutive pixels, whose bits `flip` are flipped; and those pixels less the least.
  void (*range)(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, uint8_t* least, uint8_t* most);
  void (*lower)(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, const uint8_t* least, uint8_t* to);
  SparseInt8Kernels sparse;
  // Dot products are of signed bytes: conv sees unsigned inputs as x - 128, else signed ones as x + 128.
  bool flips_unsigned = false;
};

extern const Int8Kernels kInt8Baseline;
extern const Int8Kernels kInt8Avx2;        // this and the following: x86-64 only
extern const Int8Kernels kInt8AvxVnni;
extern const Int8Kernels kInt8Avx512;
extern const Int8Kernels kInt8Avx512Vnni;
extern const Int8Kernels kInt8Dotprod;     // this and the following: 64-bit ARM only
extern const Int8Kernels kInt8I8mm;

// The kernels for the instruction set in force.
const Int8Kernels& int8_kernels();

}  // namespace cnncomp
