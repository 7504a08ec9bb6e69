// The sparse and dense micro-kernels with AVX2 and FMA: 8 pixels to a vector.
#if defined(__AVX2__) && defined(__FMA__)
#include "conv2d_dense_tile.h"
#include "float256.h"

namespace cnncomp {

const SparseKernels kSparseAvx2 = sparse_kernels_of<Avx2>();

}  // namespace cnncomp
#endif
