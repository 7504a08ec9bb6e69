// The fp32 pools in plain C++.
#include "float128.h"
#include "pool2d_rows.h"

namespace cnncomp {

const PoolKernels kPoolBaseline = pool_kernels_of<Baseline>();

}  // namespace cnncomp
