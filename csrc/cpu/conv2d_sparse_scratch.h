// Memory and planning that the drivers of the sparse kernels share. Not for files compiled per instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "conv2d_sparse.h"

namespace cnncomp {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats at a multiple of 64 bytes; grows on demand, never shrinks, keeps nothing when it grows.
class AlignedBuffer {
 public:
  float* get(int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<float*>(::operator new[](size * sizeof(float), kAlign)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(float* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<float, Delete> data_;
  int64_t size_ = 0;
};

// In how many ranges to cut the output channels so that `tasks` times that many tasks keep `threads` threads busy. More
// ranges pack the same input more often: the first number that leaves less than a fifth of the time idle will do.
int64_t count_k_ranges(int64_t tasks, int64_t threads, int64_t group_k);

// The first output channel of range `i` of `ranges`: each has an equal share of the non-zeros of one group.
// row_ptr: of the group's first block; there are `blocks` of them, each of group_k rows.
int64_t k_range_begin(const int32_t* row_ptr, int64_t blocks, int64_t group_k, int64_t i, int64_t ranges);

}  // namespace cnncomp
