// The int8 kernels with AVX-VNNI: 256-bit dot products of bytes.
#include "simd256.h"

#include "conv2d_int8_kernel.h"
#include "conv2d_scattered_int8_kernel.h"
#include "depthwise_int8_columns.h"
#include "quantize_kernel.h"

namespace cnncomp {
namespace {

// 16 registers: 6 x 2 accumulators, the weights and the input.
void conv(const ConvPanel& a) { conv_blocks<Vec256, 1, 6>(a); }

void depthwise(const DepthwisePanel& a) { depthwise_vectors<Vec128>(a, depthwise_vectors<Vec256>(a, 0)); }

}  // namespace

const Int8Kernels kInt8AvxVnni{1,
                           {6},
                           conv,
                           depthwise,
                           {{depthwise_columns<3, 1, Vec256, Vec128>, depthwise_columns<3, 2, Vec256, Vec128>},
                            {depthwise_columns<5, 1, Vec256, Vec128>, depthwise_columns<5, 2, Vec256, Vec128>}},
                           sum_weights<Vec256>,
                           sum_rows<Vec256>,
                           quantize_flat<Vec256>,
                           quantize_planes<Vec256>,
                           max_rows<Vec256, false>,
                           max_rows<Vec256, true>,
                           sparse_int8_kernels<Vec256, 12>()};

}  // namespace cnncomp
