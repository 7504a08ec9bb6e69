// The sparse micro-kernels with AVX-512: 16 pixels to a vector.
#if defined(__AVX512F__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds its own intrinsics' undefined vectors
#include <immintrin.h>

#include "conv2d_sparse_tile.h"

namespace cnncomp {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  static Vec broadcast(float v) { return _mm512_set1_ps(v); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // The operand that may be NaN comes second: then NaN stays, as in torch.clamp.
  static Vec clamp(Vec v, Vec lo, Vec hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, v)); }
  // The even elements of the two.
  static Vec even(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, i, b);
  }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

}  // namespace

const SparseKernels kSparseAvx512 = sparse_kernels_of<Avx512>();

}  // namespace cnncomp
#endif
