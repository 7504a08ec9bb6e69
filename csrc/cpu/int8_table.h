// The table of int8 kernels of an instruction set. Included by the int8 translation units of each.
#pragma once

#include "conv2d_int8_kernel.h"
#include "conv2d_scattered_int8_kernel.h"
#include "depthwise_int8_columns.h"
#include "quantize_kernel.h"

namespace cnncomp {
namespace {

// Panels of one block.
template <class S, int PIXELS, int EXACT = PIXELS, int TWOS = 0>
void conv_one_block(const ConvPanel& a) { conv_blocks<S, 1, PIXELS, 0, EXACT, TWOS>(a); }

// By vectors of each of the types in turn, the widest first.
template <class... S>
void depthwise(const DepthwisePanel& a) {
  int64_t channel = 0;
  ((channel = depthwise_vectors<S>(a, channel)), ...);
}

template <class S>
constexpr auto range_or_null() {
  if constexpr (S::kSaturates) return channel_range<S>;
  else return static_cast<decltype(Int8Kernels::range)>(nullptr);
}

template <class S>
constexpr auto lower_or_null() {
  if constexpr (S::kSaturates) return lower_channels<S>;
  else return static_cast<decltype(Int8Kernels::lower)>(nullptr);
}

// Of vectors S, and narrower ones for the channels that are left. TILE: vectors in a tile of a sparse convolution; pixels: in
// conv's register tile of 1, 2, ... blocks.
template <int TILE, class S, class... Narrower>
constexpr Int8Kernels int8_kernels_of(void (*conv)(const ConvPanel&), const int (&pixels)[kMaxBlocks],
                                      bool flips_unsigned = false) {
  int max_blocks = 0;
  while (max_blocks < kMaxBlocks && pixels[max_blocks] > 0) max_blocks++;
  return {max_blocks,
          {pixels[0], pixels[1], pixels[2], pixels[3]},
          conv,
          depthwise<S, Narrower...>,
          {{{depthwise_columns<3, 1, false, S, Narrower...>, depthwise_columns<3, 2, false, S, Narrower...>},
            {depthwise_columns<5, 1, false, S, Narrower...>, depthwise_columns<5, 2, false, S, Narrower...>}},
           {{depthwise_columns<3, 1, true, S, Narrower...>, depthwise_columns<3, 2, true, S, Narrower...>},
            {depthwise_columns<5, 1, true, S, Narrower...>, depthwise_columns<5, 2, true, S, Narrower...>}}},
          sum_weights<S>,
          sum_rows<S>,
          quantize_flat<S>,
          quantize_planes<S>,
          max_rows<S, false>,
          max_rows<S, true>,
          range_or_null<S>(),
          lower_or_null<S>(),
          sparse_int8_kernels<S, TILE>(),
          flips_unsigned};
}

}  // namespace
}  // namespace cnncomp
