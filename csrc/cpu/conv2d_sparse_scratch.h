// Checks and planning that the drivers of the sparse kernels share. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv2d_sparse_kernel.h"
#include "driver.h"

namespace cnncomp {

// Whether the last vector of a tile may be a narrow one where nobody wants the tile's last `unused` pixels.
inline bool is_narrow(const SparseKernels& kernels, int64_t unused) { return unused >= kernels.lanes - kernels.last_lanes; }

using AlignedBuffer = AlignedArray<float>;

// Throws std::invalid_argument, with the operator's name in front, for sizes that give no sparse convolution.
template <class Args>
void check_sparse_conv(const char* name, const Args& a) {
  const std::string op = name;
  if (a.groups < 1 || a.c % a.groups != 0 || a.k % a.groups != 0) {
    throw std::invalid_argument(op + ": c = " + std::to_string(a.c) + " and k = " + std::to_string(a.k) +
                                " must be multiples of groups = " + std::to_string(a.groups));
  }
  check_window(name, a);
  if (a.weights.block < 1 || a.weights.block * a.r * a.s > 65536) {
    throw std::invalid_argument(op + ": block = " + std::to_string(a.weights.block) + ", but 1 <= block and block * " +
                                std::to_string(a.r * a.s) + " taps <= 65536 are needed");
  }
}

// How one axis of the image is laid out in the packed copy: element j of a plane is the input at
// start[plane] + j * stride, and output o meets tap t at element o + shift[t] of plane[t].
struct Axis {
  std::vector<int64_t> start, plane, shift;
  int64_t span;  // the greatest shift

  // by_tap: a plane for each tap and no shifts. Otherwise a plane for each residue of the stride that a tap has.
  void lay_out(int64_t taps, int64_t stride, int64_t dilation, int64_t pad, bool by_tap) {
    start.clear();
    plane.clear();
    shift.clear();
    span = 0;
    for (int64_t t = 0; t < taps; t++) {
      const int64_t at = (by_tap ? t * dilation : t * dilation % stride) - pad;
      plane.push_back(std::find(start.begin(), start.end(), at) - start.begin());
      if (plane.back() == planes()) start.push_back(at);
      shift.push_back(by_tap ? 0 : t * dilation / stride);
      span = std::max(span, shift.back());
    }
  }
  int64_t planes() const { return static_cast<int64_t>(start.size()); }
};

// In how many ranges to cut the output channels so that `tasks` times that many tasks keep `threads` threads busy. More
// ranges pack the same input more often: the first number that leaves less than a fifth of the time idle will do.
int64_t count_k_ranges(int64_t tasks, int64_t threads, int64_t group_k);

// The first output channel of range `i` of `ranges`: each has an equal share of the non-zeros of one group.
// row_ptr: of the group's first block; there are `blocks` of them, each of group_k rows.
int64_t k_range_begin(const int32_t* row_ptr, int64_t blocks, int64_t group_k, int64_t i, int64_t ranges);

}  // namespace cnncomp
