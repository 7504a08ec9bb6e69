#include "conv2d_sparse.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv2d_sparse_kernel.h"
#include "conv2d_sparse_scratch.h"
#include "cpuid.h"
#include "parallel.h"
#include "pitch.h"

namespace cnncomp {
namespace {

// Output pixels are counted on grids whose rows are `pitch` apart, so that a tap is one offset for all of them. Pixels in
// columns q and up are computed for nothing. Where no tap shifts anything, all images are one grid without such columns.
struct Plan {
  int64_t call;  // a number of its own for each call
  int64_t p, q, pitch;
  Axis rows, columns;
  bool one_grid;
  int64_t grids, pixels;  // pixels of each grid
  int64_t lanes, vectors, row_tiles, tiles;  // vectors of a row of tiles: of an image's row, or of all its pixels
  int64_t together, packs;  // tiles that share one packed copy, and the number of copies
  int64_t plane_length;
  int64_t group_c, group_k, blocks, k_ranges;
  bool dense;
  bool linear;                  // every tap has a plane: input i is i planes away
  bool direct;                  // the input may serve as its own copy
  bool far;                     // too large for the second-level cache
  std::vector<int32_t> offset;  // otherwise: bytes into the packed planes, by index

  // The first pixel of a tile, and how many it has: in a row of tiles, all have the same number of vectors, or one more.
  int64_t tile_begin(int64_t tile) const { return tile / row_tiles * pitch + vectors_before(tile % row_tiles) * lanes; }
  int64_t tile_pixels(int64_t tile) const {
    return (vectors_before(tile % row_tiles + 1) - vectors_before(tile % row_tiles)) * lanes;
  }
  int64_t vectors_before(int64_t tile) const { return tile * vectors / row_tiles; }

  // The first output channel of one of k_ranges.
  int64_t k_begin(const Conv2dSparseArgs& a, int64_t group, int64_t range) const {
    if (dense) return std::min(group_k, ceil_div(group_k, kDenseRows) * range / k_ranges * kDenseRows);
    return k_range_begin(a.weights.row_ptr + group * blocks * group_k, blocks, group_k, range, k_ranges);
  }
};

// For each non-zero of a group, the bytes that its input lies behind the packed planes; kept from tile to tile.
class Offsets {
 public:
  // To be indexed like the weights' values.
  const int32_t* get(const Conv2dSparseArgs& a, const Plan& plan, int64_t group) {
    const int32_t* const row_ptr = a.weights.row_ptr + group * plan.blocks * plan.group_k;
    const int64_t begin = row_ptr[0], end = row_ptr[plan.blocks * plan.group_k];
    if (call_ != plan.call || group_ != group) {
      offsets_.resize(std::max<size_t>(end - begin, offsets_.size()));
      for (int64_t i = begin; i < end; i++) offsets_[i - begin] = plan.offset[a.weights.index[i]];
      call_ = plan.call;
      group_ = group;
    }
    return offsets_.data() - begin;
  }

 private:
  std::vector<int32_t> offsets_;
  int64_t call_ = 0, group_ = 0;
};

struct Scratch {
  AlignedBuffer planes, partial;
  Offsets offsets;
  std::vector<SparseRun> runs;
  std::vector<SparseSegment> segments;
  std::vector<SparsePiece> pieces;
};

// In here, weights without a list of rows are dense.
bool is_dense(const Conv2dSparseArgs& a) { return a.weights.row_ptr == nullptr; }

bool is_pointwise(const Conv2dSparseArgs& a) {
  return a.r * a.s * a.stride_h * a.stride_w == 1 && a.pad_h + a.pad_w == 0;
}

// Says how far channels lie apart where the caller left it open.
void set_pitches(const char* name, Conv2dSparseArgs& a) {
  const int64_t p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h), q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  a.x_pitch = checked_pitch(name, a.x_pitch, a.h * a.w);
  a.out_pitch = checked_pitch(name, a.out_pitch, p * q);
  if (a.residual != nullptr) check_same_pitch(name, checked_pitch(name, a.residual_pitch, p * q), a.out_pitch);
}

// Grid pixels of all input channels that half of a second-level cache holds.
int64_t packed_pixels(const Plan& plan) {
  constexpr int64_t kBytes = 524288;
  return kBytes / (std::max<int64_t>(1, plan.group_c) * plan.rows.planes() * plan.columns.planes() * int64_t{sizeof(float)});
}

// The choices below were measured on a Zen 4 over the layers of ResNet-50; the margins are wide.
void choose_layout(const Conv2dSparseArgs& a, int64_t max_tile, Plan& plan) {
  plan.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
  plan.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  // Shifts cost `span` columns in each row and loads that cross cache lines; a plane per tap costs S copies.
  plan.columns.lay_out(a.s, a.stride_w, a.dil_w, a.pad_w, false);
  const bool column_by_tap = a.s <= 3 || plan.columns.span * 8 > plan.q;
  if (column_by_tap) plan.columns.lay_out(a.s, a.stride_w, a.dil_w, a.pad_w, true);
  plan.pitch = plan.q + plan.columns.span;
  // Shifts of rows cost a halo and no two images can share a tile; a plane per tap costs R copies.
  plan.rows.lay_out(a.r, a.stride_h, a.dil_h, a.pad_h, false);
  const int64_t halo = plan.rows.span * plan.pitch, pixels = std::max(max_tile, packed_pixels(plan) - halo);
  const bool far = plan.dense ? plan.rows.planes() * (pixels + halo) > a.r * pixels : halo > a.r * max_tile;
  const bool small = plan.p * plan.q <= 64;
  if (far || small) plan.rows.lay_out(a.r, a.stride_h, a.dil_h, a.pad_h, true);
  plan.one_grid = plan.rows.span == 0 && plan.columns.span == 0;
  plan.grids = plan.one_grid ? 1 : a.n;
  // Without shifts along a row, loads are aligned if the rows are: worth up to a seventh of waste.
  const int64_t aligned = ceil_div(plan.q, 8) * 8;
  if (column_by_tap && !plan.one_grid && 7 * aligned <= 8 * plan.q) plan.pitch = aligned;
  plan.pixels = plan.one_grid ? a.n * plan.p * plan.q : (plan.p - 1) * plan.pitch + plan.q;
}

// How many of `rows` rows of tiles, of so many pixels, are packed together, in half of a second-level cache: several where more
// than half of their inputs would be packed again for others. Where it is less, planes of one block and tile are better: they
// are still in the first-level cache.
int64_t choose_together(const Conv2dSparseArgs& a, const Plan& plan, int64_t rows, int64_t pixels, int64_t halo) {
  if (halo < pixels) return 1;
  const int64_t share = ceil_div(plan.grids * a.groups * rows, a.num_threads);  // of a thread
  return std::clamp<int64_t>((packed_pixels(plan) - halo) / pixels, 1, std::min(rows, share));
}

// As few tiles as the first-level cache allows: while a tile is computed, all of its inputs in a block of channels are read
// again and again. Tiles of more than kPixels gain nothing, but where so few channels are read that each row of weights is
// short; those of fewer than kVectors are short of sums to work on.
void choose_tile(const Conv2dSparseArgs& a, int64_t lanes, Plan& plan) {
  constexpr int64_t kBytes = 49152, kCache = 32768, kPixels = 112, kVectors = 4;
  const int64_t planes = plan.rows.planes() * plan.columns.planes();
  const int64_t bytes = std::min(a.weights.block, plan.group_c) * planes * static_cast<int64_t>(sizeof(float));
  const int64_t widest = kSparseMaxTile * lanes, pixels = bytes * widest <= kCache ? widest : kPixels;
  const int64_t most = plan.dense ? int64_t{kDenseMaxTile}
                                  : std::clamp(std::min(pixels, kBytes / bytes) / lanes, kVectors, int64_t{kSparseMaxTile});
  plan.lanes = lanes;
  // Rows with gaps between them have tiles of their own where those are full.
  const bool by_row = plan.dense && plan.pitch > plan.q && plan.q % lanes == 0;
  plan.vectors = ceil_div(by_row ? plan.q : plan.pixels, lanes);
  plan.row_tiles = ceil_div(plan.vectors, most);
  plan.tiles = plan.row_tiles * (by_row ? plan.p : 1);
  const int64_t rows = by_row ? plan.p : plan.tiles, pixels_of_row = by_row ? plan.pitch : ceil_div(plan.vectors, rows) * lanes;
  const int64_t halo = plan.rows.span * plan.pitch + plan.columns.span;
  const int64_t together = choose_together(a, plan, rows, pixels_of_row, halo);
  plan.together = together * (by_row ? plan.row_tiles : 1);
  plan.packs = ceil_div(plan.tiles, plan.together);
  // Planes of an even number of cache lines would compete for a part of the cache.
  const int64_t reach = together * pixels_of_row + halo;
  plan.plane_length = (ceil_div(reach, kSparseMaxLanes) | (plan.together > 1)) * kSparseMaxLanes;
}

void make_offsets(const Conv2dSparseArgs& a, Plan& plan) {
  const int64_t block = std::min(a.weights.block, plan.group_c);
  const int64_t planes = plan.rows.planes() * plan.columns.planes();
  if (block * planes * plan.plane_length > INT32_MAX / 4) {
    throw std::invalid_argument("conv2d_sparse: a block of " + std::to_string(block) +
                                " input channels is too large for this image");
  }
  plan.linear = plan.rows.span == 0 && plan.columns.span == 0 && planes == a.r * a.s;
  plan.far = a.n * a.c * a.x_pitch * static_cast<int64_t>(sizeof(float)) > (int64_t{2} << 20);
  // A copy of one tile of several lies closer together: it pays where each input is read often.
  const bool seldom = plan.dense ? plan.group_c <= 32 : plan.group_k <= 256;
  plan.direct = is_pointwise(a) && (seldom || plan.tiles == 1) && a.x_pitch % kSparseMaxLanes == 0;
  plan.offset.clear();
  if (plan.linear) return;
  for (int64_t c = 0; c < block; c++) {
    for (int64_t r = 0; r < a.r; r++) {
      for (int64_t s = 0; s < a.s; s++) {
        const int64_t plane = c * planes + plan.rows.plane[r] * plan.columns.planes() + plan.columns.plane[s];
        const int64_t shift = plan.rows.shift[r] * plan.pitch + plan.columns.shift[s];
        plan.offset.push_back(static_cast<int32_t>((plane * plan.plane_length + shift) * 4));
      }
    }
  }
}

void make_plan(const Conv2dSparseArgs& a, const SparseKernels& kernels, Plan& plan) {
  static std::atomic<int64_t> calls = 0;
  plan.call = ++calls;
  plan.group_c = a.c / a.groups;
  plan.group_k = a.k / a.groups;
  plan.blocks = ceil_div(plan.group_c, a.weights.block);
  plan.dense = is_dense(a);
  choose_layout(a, kernels.lanes * (plan.dense ? kDenseMaxTile : kSparseMaxTile), plan);
  choose_tile(a, kernels.lanes, plan);
  make_offsets(a, plan);
  const int64_t rows = plan.dense ? ceil_div(plan.group_k, kDenseRows) : plan.group_k;
  plan.k_ranges = count_k_ranges(plan.grids * a.groups * plan.packs, a.num_threads, rows);
}

// The runs that fill a plane from grid pixel `begin` on, in order, as every column plane needs them.
void make_runs(const Conv2dSparseArgs& a, const Plan& plan, int64_t grid, int64_t begin, std::vector<SparseRun>& runs) {
  runs.clear();
  const int64_t image_pixels = plan.one_grid ? plan.p * plan.q : INT64_MAX;
  const int64_t pixels = plan.one_grid ? plan.pixels : (plan.p + plan.rows.span) * plan.pitch;
  const int64_t end = std::min(pixels, begin + plan.plane_length);
  for (int64_t i = begin; i < end;) {
    const int64_t image = grid + i / image_pixels, pixel = i % image_pixels;
    const int64_t row = pixel / plan.pitch, column = pixel % plan.pitch;
    const int64_t length = std::min(plan.pitch - column, end - i);
    for (const int64_t start : plan.columns.start) {
      const int64_t at = start + column * a.stride_w;
      const int64_t first = std::clamp<int64_t>(at < 0 ? ceil_div(-at, a.stride_w) : 0, 0, length);
      const int64_t last = std::clamp<int64_t>(at < a.w ? ceil_div(a.w - at, a.stride_w) : 0, first, length);
      runs.push_back({length, first, last, row, image * a.c * a.x_pitch, at + first * a.stride_w});
    }
    i += length;
  }
  // The rest is only for lanes that are thrown away: not to meet stale denormals.
  for (size_t p = 0; end < begin + plan.plane_length && p < plan.columns.start.size(); p++) {
    runs.push_back({begin + plan.plane_length - end, 0, 0, 0, 0, 0});
  }
}

// The stretches of output that the grid pixels [begin, end) are.
void make_segments(const Conv2dSparseArgs& a, const Plan& plan, int64_t grid, int64_t begin, int64_t end,
                   std::vector<SparseSegment>& segments) {
  segments.clear();
  // Where rows follow each other without a gap, a stretch ends only with the image.
  const bool gapless = plan.pitch == plan.q;
  const int64_t image_pixels = plan.p * plan.q, image_out = a.k * a.out_pitch;
  const int64_t valid = gapless ? image_pixels : plan.q, step = gapless ? image_pixels : plan.pitch;
  for (int64_t i = begin; i < end;) {
    const int64_t at = i % step, line = i / step;
    const int64_t out = gapless ? (grid + line) * image_out : grid * image_out + line * plan.q;
    if (at < valid) segments.push_back({i - begin, std::min(valid - at, end - i), out + at});
    i += step - at;
  }
}

// The segments cut into what the tile's vectors hold. False where a vector holds two, or one that begins inside it.
bool make_pieces(const std::vector<SparseSegment>& segments, int64_t lanes, int64_t vectors, std::vector<SparsePiece>& pieces) {
  pieces.assign(vectors, {0, 0});
  for (const SparseSegment& s : segments) {
    if (s.tile_begin % lanes != 0) return false;
    for (int64_t i = 0; i < s.length; i += lanes) {
      pieces[(s.tile_begin + i) / lanes] = {s.out_begin + i, std::min(lanes, s.length - i)};
    }
  }
  return true;
}

// Copies `channels` input channels from `first` on to the planes of the grid pixels that scratch.runs were made for.
void pack(const Conv2dSparseArgs& a, const Plan& plan, const SparseKernels& kernels, int64_t first, int64_t channels,
          const Scratch& scratch, float* planes) {
  kernels.pack({a.x + first * a.x_pitch, channels, a.h, a.w, a.stride_h, a.stride_w, a.x_pitch, plan.rows.start.data(), plan.rows.planes(),
                plan.columns.planes(), plan.plane_length, scratch.runs.data(),
                static_cast<int64_t>(scratch.runs.size()) / plan.columns.planes(), planes});
}

// Where a tile's inputs are: in the image itself, in planes that hold all channels, or to be packed block by block.
struct Inputs {
  const float* image;
  const float* planes;
};

// All blocks of input channels for one tile of one group; t holds what does not depend on the block.
void run_blocks(const Conv2dSparseArgs& a, const Plan& plan, const SparseKernels& kernels, int64_t group, int64_t tile_vectors,
                bool narrow, Inputs inputs, Scratch& scratch, SparseTile& t) {
  const float* const direct = inputs.image;
  const int64_t channel = plan.rows.planes() * plan.columns.planes() * plan.plane_length;
  const int64_t block = std::min(a.weights.block, plan.group_c);
  constexpr int64_t kFloat = sizeof(float);
  t.step = direct != nullptr ? a.x_pitch * kFloat : plan.linear ? plan.plane_length * kFloat : 0;
  const SparseTileKernel* const tiles = plan.dense ? t.step != 0 ? kernels.dense_steps : kernels.dense_offsets
                                        : t.step != 0 ? kernels.tile_steps[narrow] : kernels.tile_offsets[narrow];
  if (t.step == 0) t.offset = plan.dense ? plan.offset.data() : scratch.offsets.get(a, plan, group);
  for (int64_t b = 0; b < plan.blocks; b++) {
    const int64_t c = group * plan.group_c + b * block, channels = std::min(block, plan.group_c - b * block);
    if (direct != nullptr) {
      t.x = direct + c * a.x_pitch;
    } else if (inputs.planes != nullptr) {
      t.x = inputs.planes + b * block * channel;
    } else {
      float* const planes = scratch.planes.get(block * channel);
      pack(a, plan, kernels, c, channels, scratch, planes);
      t.x = planes;
    }
    t.next = nullptr;
    if (direct != nullptr && plan.far) {  // the next block, or the first one of the tile behind
      const int64_t next = (b + 1) % plan.blocks * block, pixels = b + 1 == plan.blocks ? tile_vectors * plan.lanes : 0;
      t.next = direct + (group * plan.group_c + next) * a.x_pitch + pixels;
      t.next_channels = std::min(block, plan.group_c - next);
    }
    if (plan.dense) {
      t.count = channels * a.r * a.s;
      t.values = a.weights.values + (group * plan.blocks + b) * ceil_div(plan.group_k, kDenseRows) * t.block_floats;
    } else {
      t.row_ptr = a.weights.row_ptr + (group * plan.blocks + b) * plan.group_k;
    }
    t.first_block = b == 0;
    t.last_block = b + 1 == plan.blocks;
    tiles[tile_vectors - 1](t);
  }
}

// One tile; t holds what does not depend on it. planes: of the tile's first pixel, or null.
void run_tile(const Conv2dSparseArgs& a, const Plan& plan, const SparseKernels& kernels, int64_t grid, int64_t group, int64_t tile,
              const float* planes, Scratch& scratch, SparseTile& t) {
  const int64_t begin = plan.tile_begin(tile), full = plan.tile_pixels(tile);
  const int64_t end = std::min(plan.pixels, begin + full);
  make_segments(a, plan, grid, begin, end, scratch.segments);
  const int64_t image_pixels = plan.p * plan.q, image = begin / image_pixels, pixel = begin % image_pixels;
  // The input itself serves as the copy where a whole tile of it is there to be read.
  const bool direct = plan.direct && pixel + full <= a.x_pitch && scratch.segments.size() == 1;
  if (!direct && planes == nullptr) make_runs(a, plan, grid, begin, scratch.runs);
  const bool narrow = is_narrow(kernels, full - (end - begin));
  if (end == plan.pixels && scratch.segments.size() == 1) {  // whole vectors, where there is room behind the last pixel
    const int64_t used = narrow ? full - kernels.lanes + kernels.last_lanes : full;
    SparseSegment& s = scratch.segments[0];
    if (s.tile_begin == 0 && s.out_begin % (a.k * a.out_pitch) + used <= a.out_pitch) s.length = used;
  }
  t.partial = plan.blocks > 1 ? scratch.partial.get((t.k_end - t.k_begin) * full) : nullptr;
  t.segments = scratch.segments.data();
  t.num_segments = static_cast<int64_t>(scratch.segments.size());
  const bool whole = make_pieces(scratch.segments, plan.lanes, full / plan.lanes, scratch.pieces);
  t.pieces = whole ? scratch.pieces.data() : nullptr;
  const float* const input = direct ? a.x + image * a.c * a.x_pitch + pixel : nullptr;
  run_blocks(a, plan, kernels, group, full / plan.lanes, narrow, {input, planes}, scratch, t);
}

// The tiles that are packed together, of one group, for a range of its output channels.
void run_task(const Conv2dSparseArgs& a, const Plan& plan, const SparseKernels& kernels, int64_t task) {
  static thread_local Scratch scratch;
  const int64_t k_range = task % plan.k_ranges;
  const int64_t copy = task / plan.k_ranges % plan.packs;
  const int64_t group = task / plan.k_ranges / plan.packs % a.groups;
  const int64_t grid = task / plan.k_ranges / plan.packs / a.groups;
  const int64_t k = group * plan.group_k;

  SparseTile t;
  t.values = a.weights.values;
  t.index = a.weights.index;
  t.block_floats = std::min(a.weights.block, plan.group_c) * a.r * a.s * kDenseRows;
  t.k_begin = plan.k_begin(a, group, k_range);
  t.k_end = plan.k_begin(a, group, k_range + 1);
  t.bias = a.bias != nullptr ? a.bias + k : nullptr;
  t.residual = a.residual != nullptr ? a.residual + k * a.out_pitch : nullptr;
  t.out = a.out + k * a.out_pitch;
  t.out_stride_k = a.out_pitch;
  t.lo = a.lo;
  t.hi = a.hi;

  const int64_t first = copy * plan.together, last = std::min(plan.tiles, first + plan.together);
  float* planes = nullptr;
  if (plan.together > 1) {
    make_runs(a, plan, grid, plan.tile_begin(first), scratch.runs);
    planes = scratch.planes.get(plan.group_c * plan.rows.planes() * plan.columns.planes() * plan.plane_length);
    pack(a, plan, kernels, group * plan.group_c, plan.group_c, scratch, planes);
  }
  for (int64_t tile = first; tile < last; tile++) {
    const float* const own = planes == nullptr ? nullptr : planes + plan.tile_begin(tile) - plan.tile_begin(first);
    run_tile(a, plan, kernels, grid, group, tile, own, scratch, t);
  }
}

void run(const char* name, Conv2dSparseArgs args) {
  static thread_local Plan plan;
  check_sparse_conv(name, args);
  set_pitches(name, args);
  if (args.n == 0 || args.k == 0) return;
  if (is_pointwise(args)) {
    args.w *= args.h;  // no tap looks at another row: an image is one long row
    args.h = 1;
  }
  const SparseKernels& kernels = sparse_kernels();
  make_plan(args, kernels, plan);
  const Plan& p = plan;  // the one of this thread, for all threads
  parallel_for(args.num_threads, p.grids * args.groups * p.packs * p.k_ranges,
               [&](int64_t task) { run_task(args, p, kernels, task); });
}

}  // namespace

const SparseKernels& sparse_kernels() {
  return CNNCOMP_FP32_KERNELS(kSparse);
}

int64_t count_k_ranges(int64_t tasks, int64_t threads, int64_t group_k) {
  int64_t ranges = 1;
  for (; ranges < std::min(threads, group_k); ranges++) {
    const int64_t rounds = ceil_div(tasks * ranges, threads);
    if (tasks * ranges * 5 > rounds * threads * 4) break;
  }
  return ranges;
}

int64_t k_range_begin(const int32_t* row_ptr, int64_t blocks, int64_t group_k, int64_t i, int64_t ranges) {
  if (i == 0) return 0;
  if (i == ranges) return group_k;
  const auto work = [&](int64_t k) {  // of the rows before k; loading and storing its sums counts for a row, too
    int64_t sum = 4 * blocks * k;
    for (int64_t b = 0; b < blocks; b++) sum += row_ptr[b * group_k + k] - row_ptr[b * group_k];
    return sum;
  };
  const int64_t share = work(group_k) * i / ranges;
  int64_t low = 0, high = group_k;  // the first k with work(k) >= share
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(middle) < share) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

void conv2d_sparse(const Conv2dSparseArgs& args) { run("conv2d_sparse", args); }

void conv2d_dense(const Conv2dDenseArgs& a) {
  run("conv2d_dense",
      {a.x, a.n, a.c, a.h, a.w, {a.weights.values, nullptr, nullptr, a.weights.block}, a.k, a.r, a.s, a.stride_h, a.stride_w,
       a.pad_h, a.pad_w, a.dil_h, a.dil_w, a.groups, a.bias, a.residual, a.lo, a.hi, a.out, a.num_threads, a.x_pitch,
       a.residual_pitch, a.out_pitch});
}

}  // namespace cnncomp
