// The activations with AVX2 and FMA.
#if defined(__AVX2__) && defined(__FMA__)
#include "activate_rows.h"
#include "float256.h"

namespace cnncomp {

const ActivateKernels kActivateAvx2 = activate_kernels_of<Avx2>();

}  // namespace cnncomp
#endif
