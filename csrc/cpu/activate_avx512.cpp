// The activations with AVX-512.
#if defined(__AVX512F__)
#include "activate_rows.h"
#include "float512.h"

namespace cnncomp {

const ActivateKernels kActivateAvx512 = activate_kernels_of<Avx512>();

}  // namespace cnncomp
#endif
