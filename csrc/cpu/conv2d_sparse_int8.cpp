#include "conv2d_sparse_int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv2d_sparse_scratch.h"
#include "int8_constants.h"
#include "parallel.h"

namespace cnncomp {
namespace {

constexpr int64_t kQuad = 4;      // weights that meet a lane
constexpr int64_t kRowRead = 16;  // bytes that are read from a row at a time

// What a plane of columns is: another one, some pixels on; or by itself, itself.
struct Shifted {
  int64_t plane, pixels;
};

// Output pixels are counted on grids whose rows are `pitch` apart, so that a tap is one offset for all of them. Pixels in
// columns q and up are computed for nothing. Where no tap shifts anything, all images are one grid without such columns.
struct Plan {
  int64_t p, q, pitch;
  Axis rows, columns;
  std::vector<Shifted> shifted;  // for each plane of columns
  int64_t most_shifted;
  bool one_grid;
  int64_t grids, pixels;  // pixels of each grid
  int64_t tile_vectors, tile, tiles, plane_length;
  int64_t group_c, group_k, blocks, k_ranges;
  int64_t element;                  // channels next to each other in a plane: a quad, or 1
  int64_t halves;                   // planes of an element: 2 where kernels split it
  int64_t quads, block_quads;       // elements of a group, of a block
  int64_t block_planes;             // elements of a block that there is room for
  int64_t plane_stride, element_stride;  // bytes
  bool bounded;                     // whether products of bytes can be added in pairs
  bool steps;                       // whether the planes lie in the order of the indices, so that no offsets are needed
  std::vector<int32_t> offset;      // bytes into the planes of a block, by index
  std::vector<uint8_t> zeros, tail; // rows outside the image; the last rows of the input, which may be read past their end
  int64_t tail_begin;               // offset in the input of the first row that is read from `tail`
  Int8Constants constants;

  int64_t planes() const { return rows.planes() * columns.planes(); }
  int64_t half_bytes() const { return plane_length * element; }
  int64_t block_bytes() const { return planes() * block_planes * plane_length * element * halves; }
};

struct Scratch {
  AlignedArray<uint8_t> planes, addend_planes, bytes, residual;
  AlignedArray<int32_t> sums, addend, turned;
  std::vector<const uint8_t*> pointers;
  std::vector<SparseInt8Segment> segments;
  std::vector<uint8_t> spare;
  std::vector<uint8_t*> out_rows, residual_rows;
};

// Planes of columns that are a multiple of the stride apart differ by so many pixels, if a row of the grid has room for them
// behind its last output.
void find_shifted(const Conv2dSparseInt8Args& a, Plan& plan) {
  plan.shifted.clear();
  plan.most_shifted = 0;
  const std::vector<int64_t>& start = plan.columns.start;
  for (int64_t i = 0; i < plan.columns.planes(); i++) {
    Shifted found{i, 0};
    for (int64_t j = 0; j < i && found.plane == i; j++) {
      const int64_t apart = start[i] - start[j];
      if (plan.shifted[j].plane == j && apart % a.stride_w == 0 && apart / a.stride_w <= plan.pitch - plan.q)
        found = {j, apart / a.stride_w};
    }
    plan.shifted.push_back(found);
    plan.most_shifted = std::max(plan.most_shifted, found.pixels);
  }
}

// Loads that split no cache line are twice as fast: a plane for each tap of a row, and rows that begin at whole vectors, or
// else a plane for each row of taps, too.
void choose_layout(const Conv2dSparseInt8Args& a, int64_t lanes, Plan& plan) {
  plan.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
  plan.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  const int64_t aligned = ceil_div(plan.q, lanes) * lanes;
  const bool worth = 7 * aligned <= 8 * plan.q;
  plan.columns.lay_out(a.s, a.stride_w, a.dil_w, a.pad_w, true);
  plan.rows.lay_out(a.r, a.stride_h, a.dil_h, a.pad_h, !worth);
  plan.one_grid = plan.rows.span == 0;
  plan.pitch = plan.one_grid ? plan.q : aligned;
  plan.grids = plan.one_grid ? 1 : a.n;
  plan.pixels = plan.one_grid ? a.n * plan.p * plan.q : (plan.p - 1) * plan.pitch + plan.q;
  find_shifted(a, plan);
}

// Tiles of one size, such that what a tile reads of a block of input channels stays in the first-level cache, but not so small
// that the weights are read more often than that is worth. Of at most `limit` vectors.
void choose_tile(const SparseInt8Kernels& kernels, int64_t limit, Plan& plan) {
  constexpr int64_t kCache = 28 << 10;
  const int64_t fits = kCache / (kQuad * plan.halves * plan.block_quads * plan.planes()) - plan.rows.span * plan.pitch;
  constexpr int64_t kLeast = 112;  // pixels; measured on a Zen 4 core over ResNet-50's layers
  const int64_t least = std::min<int64_t>(kLeast / kernels.lanes, kernels.max_tile);
  const bool quads = plan.element == kQuad;
  const int64_t lanes = quads ? kernels.lanes : kQuad * kernels.lanes;
  const int64_t most =
      quads ? std::clamp<int64_t>(fits / kernels.lanes, least, kernels.max_tile) : kScatteredInt8MaxTile;
  const int64_t vectors = ceil_div(plan.pixels, lanes);
  plan.tile_vectors = ceil_div(vectors, ceil_div(vectors, std::min(most, limit)));
  plan.tile = plan.tile_vectors * lanes;
  plan.tiles = ceil_div(plan.pixels, plan.tile);
  plan.plane_length = ceil_div(plan.tile + plan.rows.span * plan.pitch + plan.most_shifted, kBlock) * kBlock;
}

// Within a block: (elements, planes, plane_length) where each tap has a plane of its own, else the planes of one kind lie
// together: (planes, elements, plane_length).
void make_offsets(const Conv2dSparseInt8Args& a, Plan& plan) {
  if (plan.block_bytes() > INT32_MAX) {
    throw std::invalid_argument("conv2d_sparse_int8: a block of " + std::to_string(plan.block_quads) +
                                " (quads of) channels is too large for this image");
  }
  plan.offset.clear();
  const int64_t plane_bytes = plan.half_bytes() * plan.halves;
  plan.steps = plan.rows.span == 0 && plan.planes() == a.r * a.s;
  plan.plane_stride = plan.steps ? plane_bytes : plan.block_planes * plane_bytes;
  plan.element_stride = plan.steps ? plan.planes() * plane_bytes : plane_bytes;
  if (plan.steps) return;
  for (int64_t quad = 0; quad < plan.block_quads; quad++) {
    for (int64_t r = 0; r < a.r; r++) {
      for (int64_t s = 0; s < a.s; s++) {
        const int64_t plane = plan.rows.plane[r] * plan.columns.planes() + plan.columns.plane[s];
        const int64_t pixels = plan.rows.shift[r] * plan.pitch;
        plan.offset.push_back(static_cast<int32_t>(plane * plan.plane_stride + quad * plan.element_stride + pixels * plan.element));
      }
    }
  }
}

// No row is read past the tensor: the last pixels' rows lie in a copy that zeros follow.
void guard_rows(const Conv2dSparseInt8Args& a, Plan& plan) {
  const int64_t size = a.n * a.h * a.w * a.c, read = ceil_div(a.c, kRowRead) * kRowRead + kRowRead;
  plan.zeros.assign(read, 0);
  const int64_t guarded = std::min(a.n * a.h * a.w, ceil_div(read, a.c)) * a.c;
  plan.tail_begin = size - guarded;
  plan.tail.assign(guarded + read, 0);
  if (guarded > 0) std::memcpy(plan.tail.data(), a.x + plan.tail_begin, guarded);
}

void make_constants(const Conv2dSparseInt8Args& a, const SparseInt8Kernels& kernels, Plan& plan) {
  plan.constants.assign(a.constants, 3, a.groups, plan.group_k);
  if (!a.x_signed) return;
  // The kernels see x + 128.
  for (int64_t g = 0; g < a.groups; g++) {
    int32_t* init = plan.constants.init(g);
    for (int64_t b = 0; b < plan.blocks; b++) {
      const int32_t* row_ptr = a.weights.row_ptr + (g * plan.blocks + b) * plan.group_k;
      for (int64_t k = 0; k < plan.group_k; k++)
        init[k] -= 128 * kernels.sum_quads(a.weights.values + kQuad * row_ptr[k], row_ptr[k + 1] - row_ptr[k]);
    }
  }
}

// Quads of weights of output channel k.
int64_t count_quads(const Conv2dSparseInt8Args& a, const Plan& plan, int64_t k) {
  int64_t count = 0;
  const int32_t* row_ptr = a.weights.row_ptr + k / plan.group_k * plan.blocks * plan.group_k + k % plan.group_k;
  for (int64_t b = 0; b < plan.blocks; b++, row_ptr += plan.group_k) count += row_ptr[1] - row_ptr[0];
  return count;
}

// Whether the epilogue may round before it clamps, and pack: the bounds keep the number below 2^30. Any sum is at most 2^31;
// only channels of few weights, or none, have larger scales.
bool fits_bytes(const Conv2dSparseInt8Args& a, const Plan& plan) {
  constexpr float kLargest = 255 * 128 * kQuad;  // that a quad adds to a sum
  if (a.out_dtype == kF32 || a.nonlinearity != kNone || plan.group_k % kBlock != 0 || std::isnan(a.lo)) return false;
  if (a.residual != nullptr && (a.residual_dtype == kF32 || !(std::abs(a.residual_scale) < 0x1p20f))) return false;
  for (int64_t k = 0; k < a.k; k++) {
    const float scale = std::abs(a.constants[k]);
    if (!(std::abs(a.constants[a.k + k]) < 0x1p28f) || std::isnan(a.constants[2 * a.k + k])) return false;
    if (!(scale < 0.25f) && !(scale * kLargest * static_cast<float>(count_quads(a, plan, k)) < 0x1p29f)) return false;
  }
  return true;
}

void make_plan(const Conv2dSparseInt8Args& a, const SparseInt8Kernels& kernels, Plan& plan,
               int64_t limit = kSparseInt8MaxTile) {
  plan.group_c = a.c / a.groups;
  plan.group_k = a.k / a.groups;
  plan.element = a.weights.scattered ? 1 : kQuad;
  plan.halves = kernels.splits && !a.weights.scattered ? 2 : 1;
  plan.quads = ceil_div(plan.group_c, plan.element);
  plan.block_quads = std::min(a.weights.block, plan.quads);
  plan.blocks = ceil_div(plan.quads, a.weights.block);
  plan.block_planes = a.weights.scattered ? ceil_div(plan.block_quads, kBlock) * kBlock : plan.block_quads;
  choose_layout(a, kernels.lanes * kQuad / plan.element, plan);
  choose_tile(kernels, limit, plan);
  make_offsets(a, plan);
  guard_rows(a, plan);
  make_constants(a, kernels, plan);
  plan.bounded = a.weights.scattered && kernels.bounded != nullptr &&
                 kernels.bounded(a.weights.values, a.weights.row_ptr[a.groups * plan.blocks * plan.group_k]);
  plan.constants.set_bytes(a, fits_bytes(a, plan));
  plan.k_ranges = count_k_ranges(plan.grids * a.groups * plan.tiles, a.num_threads, ceil_div(plan.group_k, kBlock));
}

// For each pixel of a plane, from grid pixel `begin` on: where its channels begin.
void point(const Conv2dSparseInt8Args& a, const Plan& plan, int64_t grid, int64_t begin, int64_t row_start,
           int64_t column_start, const uint8_t** pointers) {
  const int64_t image_rows = plan.one_grid ? plan.p : INT64_MAX, step = a.stride_w * a.c;
  // The columns whose pixel is inside the image.
  const int64_t first = column_start < 0 ? ceil_div(-column_start, a.stride_w) : 0;
  const int64_t last = column_start < a.w ? ceil_div(a.w - column_start, a.stride_w) : 0;
  int64_t column = begin % plan.pitch, row = begin / plan.pitch;
  int64_t image = grid + row / image_rows;
  row %= image_rows;
  for (int64_t i = 0; i < plan.plane_length;) {
    const int64_t h = row_start + row * a.stride_h, end = std::min(plan.pitch, column + plan.plane_length - i);
    const bool inside = image < a.n && h >= 0 && h < a.h;
    const int64_t from = inside ? std::clamp(first, column, end) : end, to = std::clamp(last, from, end);
    const int64_t at = ((image * a.h + h) * a.w + column_start) * a.c;
    for (; column < from; column++) pointers[i++] = plan.zeros.data();
    for (; column < to; column++) {
      const int64_t offset = at + column * step;
      pointers[i++] = offset < plan.tail_begin ? a.x + offset : plan.tail.data() + (offset - plan.tail_begin);
    }
    for (; column < end; column++) pointers[i++] = plan.zeros.data();
    column = 0;
    if (++row == image_rows) row = 0, ++image;
  }
}

// What a task is: a tile of a grid, a group, a range of its output channels.
struct Task {
  int64_t grid, begin, end, group, k_begin, k_end;

  Task(const Conv2dSparseInt8Args& a, const Plan& plan, int64_t task) {
    const int64_t k_range = task % plan.k_ranges, tile = task / plan.k_ranges % plan.tiles;
    group = task / plan.k_ranges / plan.tiles % a.groups;
    grid = task / plan.k_ranges / plan.tiles / a.groups;
    begin = tile * plan.tile;
    end = std::min(plan.pixels, begin + plan.tile);
    const int32_t* const row_ptr = a.weights.row_ptr + group * plan.blocks * plan.group_k;
    const auto boundary = [&](int64_t i) {
      if (i == plan.k_ranges) return plan.group_k;
      return k_range_begin(row_ptr, plan.blocks, plan.group_k, i, plan.k_ranges) / kBlock * kBlock;
    };
    k_begin = boundary(k_range);
    k_end = boundary(k_range + 1);
  }
};

// Plane i of all elements of a block, from the one that it is shifted from.
void shift_planes(const Plan& plan, int64_t i, const Shifted& shifted, uint8_t* block) {
  const int64_t stride = plan.element_stride, from = i - i % plan.columns.planes() + shifted.plane;
  const int64_t bytes = (plan.tile + plan.rows.span * plan.pitch) * plan.element;
  uint8_t* to = block + i * plan.plane_stride;
  const uint8_t* x = block + from * plan.plane_stride + shifted.pixels * plan.element;
  for (int64_t quad = 0; quad < plan.block_quads; quad++, to += stride, x += stride)
    for (int64_t half = 0; half < plan.halves; half++)
      std::memcpy(to + half * plan.half_bytes(), x + half * plan.half_bytes(), bytes);
}

// Copies all that a tile reads of a group, one block of input channels after the other.
const uint8_t* copy_planes(const Conv2dSparseInt8Args& a, const Plan& plan, const SparseInt8Kernels& kernels,
                           const Task& part, Scratch& scratch, AlignedArray<uint8_t>& array) {
  const auto gather = a.weights.scattered ? kernels.scattered_gather : kernels.gather;
  const int64_t block_bytes = plan.block_bytes();
  uint8_t* const planes = array.get(plan.blocks * block_bytes);
  scratch.pointers.resize(plan.plane_length);
  for (int64_t i = 0; i < plan.planes(); i++) {
    const Shifted& shifted = plan.shifted[i % plan.columns.planes()];
    if (shifted.pixels != 0) {
      for (int64_t b = 0; b < plan.blocks; b++) shift_planes(plan, i, shifted, planes + b * block_bytes);
      continue;
    }
    const int64_t row_start = plan.rows.start[i / plan.columns.planes()];
    point(a, plan, part.grid, part.begin, row_start, plan.columns.start[i % plan.columns.planes()], scratch.pointers.data());
    for (int64_t b = 0; b < plan.blocks; b++) {
      const int64_t quad = b * plan.block_quads;
      gather({scratch.pointers.data(), plan.plane_length, part.group * plan.group_c + quad * plan.element,
              std::min(plan.block_quads, plan.quads - quad), a.x_signed,
              planes + b * block_bytes + i * plan.plane_stride, plan.element_stride, plan.half_bytes()});
    }
  }
  return planes;
}

// The stretches of output that the grid pixels [begin, end) are.
void make_segments(const Plan& plan, int64_t grid, int64_t begin, int64_t end, std::vector<SparseInt8Segment>& segments) {
  segments.clear();
  if (plan.one_grid) {
    segments.push_back({0, end - begin, begin});
    return;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t column = i % plan.pitch, row = i / plan.pitch;
    if (column < plan.q) {
      segments.push_back({i - begin, std::min(plan.q - column, end - i), (grid * plan.p + row) * plan.q + column});
    }
    i += plan.pitch - column;
  }
}

// Where each pixel of the tile lies in memory of one byte per channel; pixels that are none lie in `spare`.
uint8_t* const* make_rows(const Plan& plan, const Scratch& scratch, uint8_t* base, int64_t stride, uint8_t* spare,
                          std::vector<uint8_t*>& rows) {
  rows.assign(ceil_div(plan.tile, kBlock) * kBlock, spare);
  for (const SparseInt8Segment& s : scratch.segments)
    for (int64_t i = 0; i < s.length; i++) rows[s.tile_begin + i] = base + (s.out_begin + i) * stride;
  return rows.data();
}

// A tile's 8-bit outputs and residual, up to kSparseInt8Channels of them at a time: where they lie as planes and as rows.
struct Turns {
  SparseInt8Turn out, residual;

  Turns(const Conv2dSparseInt8Args& a, const Plan& plan, const SparseInt8Tile& t, Scratch& scratch) : out(), residual() {
    scratch.spare.resize(plan.group_k);
    out.pixels = ceil_div(plan.tile, kBlock) * kBlock;
    out.stride = t.byte_stride;
    out.planes = scratch.bytes.get(kSparseInt8Channels * out.stride);
    residual = out;
    uint8_t* const spare = scratch.spare.data();
    out.rows = make_rows(plan, scratch, reinterpret_cast<uint8_t*>(t.epilogue.out), a.k, spare, scratch.out_rows);
    if (a.residual == nullptr || a.residual_dtype == kF32) return;
    residual.planes = scratch.residual.get(kSparseInt8Channels * out.stride);
    // Rows that are only read.
    const auto from = reinterpret_cast<uint8_t*>(const_cast<char*>(t.epilogue.residual));
    residual.rows = make_rows(plan, scratch, from, a.k, spare, scratch.residual_rows);
  }
};

// A convolution whose outputs, floats, another one adds to its own: they are seen a tile at a time.
struct Addend {
  const Conv2dSparseInt8Args& a;
  const Plan& plan;
};

SparseInt8Tile make_tile(const Conv2dSparseInt8Args& a, const Plan& plan, const SparseInt8Kernels& kernels, int64_t group,
                         AlignedArray<int32_t>& sums) {
  SparseInt8Tile t{};
  t.values = a.weights.values;
  t.index = a.weights.index;
  t.step = plan.steps ? plan.plane_stride : 0;
  t.offset = plan.offset.data();
  t.odd = plan.half_bytes();
  t.bounded = plan.bounded;
  t.init = plan.constants.init(group);
  // They stay in cache while the blocks of input channels go by.
  t.sums = sums.get(kSparseInt8Channels * plan.tile);
  t.byte_stride = ceil_div(plan.tile, 4 * kernels.lanes) * 4 * kernels.lanes;
  t.epilogue = plan.constants.epilogue(a, 0, group, 0);
  return t;
}

// The tile's sums of the channels [t.k_begin, t.k_end), or outputs: floats, or with `turns` bytes.
void run_blocks(const Conv2dSparseInt8Args& a, const Plan& plan, const SparseInt8Kernels& kernels, const uint8_t* planes,
                int64_t group, bool floats, const Turns* turns, SparseInt8Tile& t) {
  const int32_t* const row_ptr = a.weights.row_ptr + group * plan.blocks * plan.group_k;
  const auto tile = (a.weights.scattered ? kernels.scattered_tile : kernels.tile)[plan.tile_vectors - 1];
  for (int64_t b = 0; b < plan.blocks; b++) {
    const bool last = b + 1 == plan.blocks;
    t.x = planes + b * plan.block_bytes();
    t.row_ptr = row_ptr + b * plan.group_k;
    t.first_block = b == 0;
    t.floats = floats && last;
    t.bytes = turns != nullptr && last ? turns->out.planes : nullptr;
    tile(t);
  }
}

void run_task(const Conv2dSparseInt8Args& a, const Plan& plan, const Addend* addend, const SparseInt8Kernels& kernels,
              int64_t task) {
  static thread_local Scratch scratch;
  const Task part(a, plan, task);
  if (part.k_begin == part.k_end) return;
  const uint8_t* const planes = copy_planes(a, plan, kernels, part, scratch, scratch.planes);
  make_segments(plan, part.grid, part.begin, part.end, scratch.segments);
  SparseInt8Tile t = make_tile(a, plan, kernels, part.group, scratch.sums), added{};
  const uint8_t* addend_planes = nullptr;
  if (addend != nullptr) {
    addend_planes = copy_planes(addend->a, addend->plan, kernels, part, scratch, scratch.addend_planes);
    added = make_tile(addend->a, addend->plan, kernels, part.group, scratch.addend);
    t.addend = reinterpret_cast<const float*>(added.sums);
  }
  std::optional<Turns> turns;
  if (plan.constants.bytes()) turns.emplace(a, plan, t, scratch);
  SparseInt8Finish f{t.sums, plan.tile, 0, 0, nullptr, scratch.segments.data(), 0, t.epilogue};
  f.num_segments = static_cast<int64_t>(scratch.segments.size());
  for (int64_t k = part.k_begin; k < part.k_end; k += kSparseInt8Channels) {
    t.k_begin = f.channel = k;
    t.k_end = std::min(k + kSparseInt8Channels, part.k_end);
    const int64_t channels = f.channels = t.k_end - k;
    if (addend != nullptr) {
      added.k_begin = k, added.k_end = t.k_end;
      run_blocks(addend->a, addend->plan, kernels, addend_planes, part.group, true, nullptr, added);
    } else if (turns && a.residual != nullptr) {
      turns->residual.channel = k, turns->residual.channels = channels;
      kernels.rows_to_planes(turns->residual);
      t.residual = turns->residual.planes;
    }
    run_blocks(a, plan, kernels, planes, part.group, false, turns ? &*turns : nullptr, t);
    if (turns) {
      turns->out.channel = k, turns->out.channels = channels;
      kernels.planes_to_rows(turns->out);
    } else {
      f.turned = scratch.turned.get(plan.tile * kBlock);
      kernels.finish(f);
    }
  }
}

void run_plan(const Conv2dSparseInt8Args& a, const Plan& plan, const Addend* addend, const SparseInt8Kernels& kernels) {
  parallel_for(a.num_threads, plan.grids * a.groups * plan.tiles * plan.k_ranges,
               [&](int64_t task) { run_task(a, plan, addend, kernels, task); });
}

// Whether `first`, whose outputs are the residual of `a`, can be added tile by tile as floats.
bool can_add(const Conv2dSparseInt8Args& first, const Conv2dSparseInt8Args& a) {
  if (first.weights.scattered || a.weights.scattered || first.groups != 1 || a.groups != 1) return false;
  if (first.nonlinearity != kNone || a.nonlinearity != kNone) return false;
  if (first.out_dtype != kF32 || first.residual != nullptr || first.n != a.n || first.k != a.k) return false;
  if (a.residual_dtype != kF32 || a.out_dtype == kF32 || a.k % kBlock != 0) return false;
  const float least = a.out_dtype == kS8 ? -128.0f : 0.0f, most = a.out_dtype == kS8 ? 127.0f : 255.0f;
  if (!(a.lo >= least)) return false;
  return std::all_of(a.constants + 2 * a.k, a.constants + 3 * a.k, [&](float hi) { return hi <= most; });
}

// The same pixels in tiles of one size; false where there are none.
bool plan_together(const Conv2dSparseInt8Args& first, const Conv2dSparseInt8Args& a, const SparseInt8Kernels& kernels,
                   Plan& first_plan, Plan& plan) {
  make_plan(first, kernels, first_plan);
  make_plan(a, kernels, plan);
  const int64_t vectors = std::min(first_plan.tile_vectors, plan.tile_vectors);
  if (first_plan.tile_vectors > vectors) make_plan(first, kernels, first_plan, vectors);
  if (plan.tile_vectors > vectors) make_plan(a, kernels, plan, vectors);
  return first_plan.p == plan.p && first_plan.q == plan.q && first_plan.pitch == plan.pitch &&
         first_plan.one_grid == plan.one_grid && first_plan.tile == plan.tile;
}

}  // namespace

void conv2d_sparse_int8(const Conv2dSparseInt8Args& args) {
  static thread_local Plan plan;
  check_sparse_conv("conv2d_sparse_int8", args);
  if (args.n == 0 || args.k == 0) return;
  const SparseInt8Kernels& kernels = int8_kernels().sparse;
  make_plan(args, kernels, plan);
  run_plan(args, plan, nullptr, kernels);  // the plan of this thread, for all threads
}

void conv2d_sparse_int8_sum(const Conv2dSparseInt8Args& first, const Conv2dSparseInt8Args& args) {
  static thread_local Plan first_plan, plan;
  check_sparse_conv("conv2d_sparse_int8", first);
  check_sparse_conv("conv2d_sparse_int8", args);
  const SparseInt8Kernels& kernels = int8_kernels().sparse;
  if (args.n == 0 || args.k == 0 || !can_add(first, args) || !plan_together(first, args, kernels, first_plan, plan)) {
    conv2d_sparse_int8(first);
    conv2d_sparse_int8(args);
    return;
  }
  plan.constants.set_bytes(args, true);
  const Addend addend{first, first_plan};
  run_plan(args, plan, &addend, kernels);
}

}  // namespace cnncomp
