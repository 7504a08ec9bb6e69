// The sparse and dense micro-kernels in plain C++: 4 pixels to a vector, one SSE2 or NEON register.
#include "conv2d_dense_tile.h"
#include "float128.h"

namespace cnncomp {

const SparseKernels kSparseBaseline = sparse_kernels_of<Baseline>();

}  // namespace cnncomp
