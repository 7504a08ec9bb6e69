// Rows of activations, one source for every instruction set. Plain arrays only, for the reasons that conv2d_sparse_tile.h gives.
#pragma once

#include "activate_kernel.h"

namespace cnncomp {
namespace {

// e to the power of -v, for -87 <= v <= 87 (NaN for NaN): two to the nearest whole power of two, times a polynomial for the
// rest, which is at most half of ln 2; its coefficients make the greatest relative error least, 7.5e-8 before rounding.
template <class V>
inline __attribute__((always_inline)) typename V::Vec exponential_of_minus(typename V::Vec v) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: in a float of this size, there is no room for a fraction
  constexpr float kPolynomial[] = {-0.0082976548f, 0.0419154502f, -0.1666757464f, 0.4999889433f, -0.9999997020f, 1.0000001192f};
  typename V::Vec n = V::fma(v, V::broadcast(-kLog2E), V::broadcast(kRound));
  n = V::add(n, V::broadcast(-kRound));
  v = V::fma(n, V::broadcast(kLn2High), v);
  v = V::fma(n, V::broadcast(kLn2Low), v);
  typename V::Vec sum = V::broadcast(kPolynomial[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; i++) sum = V::fma(sum, v, V::broadcast(kPolynomial[i]));
  return V::times_pow2(sum, n);
}

// For v >= -87.
template <class V>
inline __attribute__((always_inline)) typename V::Vec sigmoid(typename V::Vec v) {
  const typename V::Vec one = V::broadcast(1.0f);
  return V::div(one, V::add(one, exponential_of_minus<V>(V::at_most(v, V::broadcast(87.0f)))));
}

template <class V>
inline __attribute__((always_inline)) typename V::Vec hardsigmoid(typename V::Vec v) {
  v = V::clamp(V::add(v, V::broadcast(3.0f)), V::broadcast(0.0f), V::broadcast(6.0f));
  return V::mul(v, V::broadcast(1.0f / 6.0f));
}

template <class V, Activation kind>
inline __attribute__((always_inline)) typename V::Vec activated(typename V::Vec v) {
  if constexpr (kind == Activation::sigmoid || kind == Activation::silu) {
    v = V::at_least(v, V::broadcast(-87.0f));  // where both are as good as 0
    return kind == Activation::silu ? V::mul(v, sigmoid<V>(v)) : sigmoid<V>(v);
  } else {
    return kind == Activation::hardswish ? V::mul(v, hardsigmoid<V>(v)) : hardsigmoid<V>(v);
  }
}

// out[i] = f(x[i])
template <class V, class F>
inline __attribute__((always_inline)) void map_row(const float* x, int64_t length, float* out, F f) {
  int64_t i = 0;
  for (; i + V::kLanes <= length; i += V::kLanes) V::store(out + i, f(V::load(x + i)));
  const int rest = static_cast<int>(length - i);
  if (rest > 0) V::store_first(out + i, f(V::load_between(x + i, 0, rest)), rest);
}

template <class V, Activation kind>
void activate_row(const float* x, int64_t length, float* out) {
  map_row<V>(x, length, out, [](typename V::Vec v) __attribute__((always_inline)) { return activated<V, kind>(v); });
}

template <class V>
void affine_row(const float* x, int64_t length, float scale, float shift, float lo, float hi, float* out) {
  const typename V::Vec a = V::broadcast(scale), b = V::broadcast(shift), low = V::broadcast(lo), high = V::broadcast(hi);
  map_row<V>(x, length, out, [=](typename V::Vec v) __attribute__((always_inline)) { return V::clamp(V::fma(v, a, b), low, high); });
}

template <class V>
constexpr ActivateKernels activate_kernels_of() {
  return {{activate_row<V, Activation::sigmoid>, activate_row<V, Activation::silu>, activate_row<V, Activation::hardsigmoid>,
           activate_row<V, Activation::hardswish>},
          affine_row<V>};
}

}  // namespace
}  // namespace cnncomp
