// The fp32 pools with AVX2 and FMA.
#if defined(__AVX2__) && defined(__FMA__)
#include "float256.h"
#include "pool2d_rows.h"

namespace cnncomp {

const PoolKernels kPoolAvx2 = pool_kernels_of<Avx2>();

}  // namespace cnncomp
#endif
