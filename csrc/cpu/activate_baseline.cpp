// The activations in plain C++.
#include "activate_rows.h"
#include "float128.h"

namespace cnncomp {

const ActivateKernels kActivateBaseline = activate_kernels_of<Baseline>();

}  // namespace cnncomp
