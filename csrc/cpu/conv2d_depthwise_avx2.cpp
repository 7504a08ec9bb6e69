// The depthwise kernel with AVX2 and FMA: 8 pixels to a vector.
#if defined(__AVX2__) && defined(__FMA__)
#include "conv2d_depthwise_plane.h"
#include "float256.h"

namespace cnncomp {

const DepthwiseKernel kDepthwiseAvx2 = depthwise_planes<Avx2>;

}  // namespace cnncomp
#endif
