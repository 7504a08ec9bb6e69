// The sum of a vector's lanes. For files compiled per instruction set; V as in float128.h.
#pragma once

namespace cnncomp {
namespace {

template <class V>
float sum_of_lanes(typename V::Vec v) {
  alignas(64) float lane[V::kLanes];
  V::store(lane, v);
  for (int width = V::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  }
  return lane[0];
}

}  // namespace
}  // namespace cnncomp
