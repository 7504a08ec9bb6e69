// The int8 kernels for any processor: SSE2 on x86, NEON on 64-bit ARM, plain C++ elsewhere.
#include "simd128.h"

#include "conv2d_int8_kernel.h"
#include "conv2d_scattered_int8_kernel.h"
#include "depthwise_int8_columns.h"
#include "quantize_kernel.h"

namespace cnncomp {
namespace {

void conv(const ConvPanel& a) { conv_blocks<Vec128, 1, 2>(a); }

void depthwise(const DepthwisePanel& a) { depthwise_vectors<Vec128>(a, 0); }

}  // namespace

const Int8Kernels kInt8Baseline{1,
                                {2},
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
                                sparse_int8_kernels<Vec128, 8>()};

}  // namespace cnncomp
