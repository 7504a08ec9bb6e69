// The fp32 pools with AVX-512.
#if defined(__AVX512F__)
#include "float512.h"
#include "pool2d_rows.h"

namespace cnncomp {

const PoolKernels kPoolAvx512 = pool_kernels_of<Avx512>();

}  // namespace cnncomp
#endif
