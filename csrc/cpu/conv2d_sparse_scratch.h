// Memory and planning that the drivers of the sparse kernels share. Not for files compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace cnncomp {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements from a multiple of 64 bytes on; grows on demand, never shrinks, keeps nothing when it grows.
template <class T>
class AlignedArray {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<T*>(::operator new[](size * sizeof(T), kAlign)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
  int64_t size_ = 0;
};

using AlignedBuffer = AlignedArray<float>;

inline int64_t output_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1;
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
