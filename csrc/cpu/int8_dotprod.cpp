// The int8 kernels with ARM's dot products of signed bytes (FEAT_DotProd).
#include "simd128.h"

#include "conv2d_int8_kernel.h"
#include "conv2d_scattered_int8_kernel.h"
#include "depthwise_int8_columns.h"
#include "quantize_kernel.h"

namespace cnncomp {
namespace {

// 32 registers: 6 x 4 accumulators, the weights, the input and its flipped bits.
void conv(const ConvPanel& a) { conv_blocks<Vec128Less128, 1, 6>(a); }

void depthwise(const DepthwisePanel& a) { depthwise_vectors<Vec128>(a, 0); }

}  // namespace

const Int8Kernels kInt8Dotprod{1,
                               {6},
                               conv,
                               depthwise,
                               {{depthwise_columns<3, 1, Vec128>, depthwise_columns<3, 2, Vec128>},
                                {depthwise_columns<5, 1, Vec128>, depthwise_columns<5, 2, Vec128>}},
                               sum_weights<Vec128>,
                               sum_rows<Vec128>,
                               quantize_flat<Vec128>,
                               quantize_planes<Vec128>,
                               max_rows<Vec128, false>,
                               max_rows<Vec128, true>,
                               sparse_int8_kernels<Vec128, 14>(),
                               true};

}  // namespace cnncomp
