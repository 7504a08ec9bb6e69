// The sparse micro-kernels in plain C++: 4 pixels to a vector, one SSE2 or NEON register.
#include "conv2d_sparse_tile.h"

namespace cnncomp {
namespace {

struct Baseline {
  static constexpr int kLanes = 4;
  static constexpr int kChains = 8;  // multiply-adds in flight
  typedef float Vec __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

  static Vec broadcast(float v) { return Vec{v, v, v, v}; }
  static Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
  // Lanes [first, last), zero elsewhere; nothing else is read.
  static Vec load_between(const float* p, int first, int last) {
    Vec v = {};
    for (int i = 0; i < kLanes; i++) {
      if (first <= i && i < last) v[i] = p[i];
    }
    return v;
  }
  static void store_first(float* p, Vec v, int n) {
    for (int i = 0; i < n; i++) p[i] = v[i];
  }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // Comparisons with NaN are false: NaN stays, as in torch.clamp.
  static Vec clamp(Vec v, Vec lo, Vec hi) {
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
  }
  static Vec even(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
};

}  // namespace

const SparseKernels kSparseBaseline = sparse_kernels_of<Baseline>();

}  // namespace cnncomp
