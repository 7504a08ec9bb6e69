// The int8 kernels with AVX-512 VNNI.
#include "simd512.h"

#include "conv2d_int8_kernel.h"
#include "conv2d_scattered_int8_kernel.h"
#include "depthwise_int8_columns.h"
#include "quantize_kernel.h"

namespace cnncomp {
namespace {

// As many pixels as 32 registers hold accumulators for, next to the weights and the input; of two blocks fewer, so that the
// epilogue of one tile leaves room for the products of the next (measured on MobileNetV2's projections, Zen 4).
constexpr int kPixels[kMaxBlocks] = {14, 6, 8, 6};

void conv(const ConvPanel& a) {
  switch (a.blocks) {
    case 1: return conv_blocks<Vec512, 1, kPixels[0], 8>(a);
    case 2: return conv_blocks<Vec512, 2, kPixels[1], 8>(a);
    case 3: return conv_blocks<Vec512, 3, kPixels[2], 8>(a);
    default: return conv_blocks<Vec512, 4, kPixels[3], 6>(a);
  }
}

void depthwise(const DepthwisePanel& a) {
  depthwise_vectors<Vec128>(a, depthwise_vectors<Vec256>(a, depthwise_vectors<Vec512>(a, 0)));
}

}  // namespace

const Int8Kernels kInt8Avx512Vnni{4,
                           {kPixels[0], kPixels[1], kPixels[2], kPixels[3]},
                           conv,
                           depthwise,
                           {{depthwise_columns<3, 1, Vec512, Vec256, Vec128>, depthwise_columns<3, 2, Vec512, Vec256, Vec128>},
                            {depthwise_columns<5, 1, Vec512, Vec256, Vec128>, depthwise_columns<5, 2, Vec512, Vec256, Vec128>}},
                           sum_weights<Vec512>,
                           sum_rows<Vec512>,
                           quantize_flat<Vec512>,
                           quantize_planes<Vec512>,
                           max_rows<Vec512, false>,
                           max_rows<Vec512, true>,
                           sparse_int8_kernels<Vec512, 14>()};

}  // namespace cnncomp
