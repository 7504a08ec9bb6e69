#include "linear_sparse.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "conv2d_sparse_kernel.h"
#include "conv2d_sparse_scratch.h"
#include "parallel.h"

namespace cnncomp {
namespace {

// The rows of x are the pixels of a 1x1 convolution, once x is transposed; what comes out is transposed back. That holds
// for one row, too: gathering the inputs of each output instead won a fifth there, and lost from two rows on (Zen 4).
struct Plan {
  int64_t tile_vectors, tile, tiles, blocks, k_ranges;
};

struct Scratch {
  AlignedBuffer x, y, partial;
};

// dst (columns, dst_stride) = transpose of src (rows, columns) with rows src_stride apart; zeros from `rows` to dst_stride.
void transpose(const float* src, int64_t src_stride, int64_t rows, int64_t columns, float* dst, int64_t dst_stride) {
  constexpr int64_t kBlock = 16;  // floats in a cache line
  for (int64_t j = 0; j < columns; j += kBlock) {
    const int64_t end = std::min(columns, j + kBlock);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t l = j; l < end; l++) dst[l * dst_stride + i] = src[i * src_stride + l];
    }
    for (int64_t l = j; l < end; l++) std::fill(dst + l * dst_stride + rows, dst + (l + 1) * dst_stride, 0.0f);
  }
}

// Rows [begin, end), columns [k_begin, k_end) of out from y (k, tile).
void finish(const LinearSparseArgs& a, const float* y, int64_t tile, int64_t begin, int64_t end, int64_t k_begin,
            int64_t k_end) {
  constexpr int64_t kBlock = 16;
  for (int64_t j = k_begin; j < k_end; j += kBlock) {
    for (int64_t i = begin; i < end; i++) {
      for (int64_t k = j; k < std::min(k_end, j + kBlock); k++) {
        float t = y[k * tile + i - begin];
        if (a.residual != nullptr) t += a.residual[i * a.k + k];
        a.out[i * a.k + k] = clamp(t, a.lo, a.hi);
      }
    }
  }
}

void make_plan(const LinearSparseArgs& a, const SparseKernels& kernels, Plan& plan) {
  const int64_t vectors = ceil_div(a.m, kernels.lanes);
  plan.tile_vectors = ceil_div(vectors, ceil_div(vectors, kSparseMaxTile));
  plan.tile = plan.tile_vectors * kernels.lanes;
  plan.tiles = ceil_div(a.m, plan.tile);
  plan.blocks = ceil_div(a.c, a.weights.block);
  plan.k_ranges = count_k_ranges(plan.tiles, a.num_threads, a.k);
}

void run_task(const LinearSparseArgs& a, const Plan& plan, const SparseKernels& kernels, int64_t task) {
  static thread_local Scratch scratch;
  const int64_t k_range = task % plan.k_ranges, begin = task / plan.k_ranges * plan.tile;
  const int64_t rows = std::min(plan.tile, a.m - begin);
  const int64_t block = std::min(a.weights.block, a.c);
  const SparseSegment all{0, plan.tile, 0};
  SparseTile t;
  t.values = a.weights.values;
  t.index = a.weights.index;
  t.k_begin = k_range_begin(a.weights.row_ptr, plan.blocks, a.k, k_range, plan.k_ranges);
  t.k_end = k_range_begin(a.weights.row_ptr, plan.blocks, a.k, k_range + 1, plan.k_ranges);
  float* const x = scratch.x.get(block * plan.tile);
  t.x = x;
  t.step = plan.tile * static_cast<int64_t>(sizeof(float));
  t.offset = nullptr;
  t.next = nullptr;
  t.partial = scratch.partial.get((t.k_end - t.k_begin) * plan.tile);
  t.bias = a.bias;
  t.residual = nullptr;
  t.out = scratch.y.get(a.k * plan.tile);
  t.out_stride_k = plan.tile;
  t.segments = &all;
  t.num_segments = 1;
  t.pieces = nullptr;
  t.lo = -std::numeric_limits<float>::infinity();
  t.hi = std::numeric_limits<float>::infinity();
  for (int64_t b = 0; b < plan.blocks; b++) {
    transpose(a.x + begin * a.c + b * block, a.c, rows, std::min(block, a.c - b * block), x, plan.tile);
    t.row_ptr = a.weights.row_ptr + b * a.k;
    t.first_block = b == 0;
    t.last_block = b + 1 == plan.blocks;
    kernels.tile_steps[is_narrow(kernels, plan.tile - rows)][plan.tile_vectors - 1](t);
  }
  finish(a, t.out, plan.tile, begin, begin + rows, t.k_begin, t.k_end);
}

}  // namespace

void linear_sparse(const LinearSparseArgs& args) {
  static thread_local Plan plan;
  if (args.weights.block < 1 || args.weights.block > 65536) {
    throw std::invalid_argument("linear_sparse: block = " + std::to_string(args.weights.block) + ", not in 1..65536");
  }
  if (args.m == 0 || args.k == 0) return;
  const SparseKernels& kernels = sparse_kernels();
  make_plan(args, kernels, plan);
  const Plan& p = plan;  // the one of this thread, for all threads
  parallel_for(args.num_threads, p.tiles * p.k_ranges, [&](int64_t task) { run_task(args, p, kernels, task); });
}

}  // namespace cnncomp
