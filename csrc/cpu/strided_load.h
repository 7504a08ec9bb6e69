// Loads at the end of a row, and of every second or every n-th float. For files compiled per instruction set; V as in float128.h.
#pragma once

#include <cstdint>

namespace cnncomp {
namespace {

// row[at + i], zero from `width` on; nothing is read from there.
template <class V>
inline __attribute__((always_inline)) typename V::Vec load_inside(const float* row, int64_t at, int64_t width) {
  const int64_t left = width - at;
  return V::load_between(row + (left > 0 ? at : 0), 0, static_cast<int>(left < 0 ? 0 : left < V::kLanes ? left : V::kLanes));
}

// p[2 * i] for first <= i < last, zero in the other lanes; nothing else is read past p[2 * (last - 1)].
template <class V>
typename V::Vec every_second(const float* p, int first, int last) {
  const int low = 2 * first, high = 2 * last - 1;
  return V::even(V::load_between(p, low, high), V::load_between(p + V::kLanes, low - V::kLanes, high - V::kLanes));
}

// p[stride * i] for first <= i < last, zero in the other lanes.
template <class V>
typename V::Vec every_nth(const float* p, int first, int last, int64_t stride) {
  alignas(64) float v[V::kLanes] = {};
  for (int i = first > 0 ? first : 0; i < last && i < V::kLanes; i++) v[i] = p[i * stride];
  return V::load(v);
}

}  // namespace
}  // namespace cnncomp
