// Sizes of a convolution as the kernels take them.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/schedule.cuh"

namespace cnncomp::cuda {

struct ConvParams {
  EpilogueParams epilogue;
  Schedule schedule;
  const int8_t* x;
  const int8_t* weight;
  int32_t n, h, w, c, p, q, r, s;
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t c_group, k_group;
  int32_t reduction;  // r * s * c_group
};

inline ConvParams conv_params(const Conv2d& c, const EpilogueParams& epilogue, const Schedule& schedule = {}) {
  const int32_t c_group = c.c / c.groups;
  return {epilogue,   schedule,
          static_cast<const int8_t*>(c.x),
          c.weight,   c.n,
          c.h,        c.w,
          c.c,        c.p(),
          c.q(),      c.r,
          c.s,        c.stride_h,
          c.stride_w, c.pad_h,
          c.pad_w,    c.dil_h,
          c.dil_w,    c_group,
          c.k / c.groups, c.r * c.s * c_group};
}

}  // namespace cnncomp::cuda
