// The depthwise kernel in plain C++: 4 pixels to a vector.
#include "conv2d_depthwise_plane.h"
#include "float128.h"

namespace cnncomp {

const DepthwiseKernel kDepthwiseBaseline = depthwise_planes<Baseline>;

}  // namespace cnncomp
