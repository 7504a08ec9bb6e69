// The depthwise kernel with AVX-512: 16 pixels to a vector.
#if defined(__AVX512F__)
#include "conv2d_depthwise_plane.h"
#include "float512.h"

namespace cnncomp {

const DepthwiseKernel kDepthwiseAvx512 = depthwise_planes<Avx512, HalfAvx512>;

}  // namespace cnncomp
#endif
