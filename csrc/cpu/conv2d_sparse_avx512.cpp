// The sparse and dense micro-kernels with AVX-512: 16 pixels to a vector.
#if defined(__AVX512F__)
#include "conv2d_dense_tile.h"
#include "float512.h"

namespace cnncomp {

const SparseKernels kSparseAvx512 = sparse_kernels_of<Avx512, HalfAvx512>();

}  // namespace cnncomp
#endif
