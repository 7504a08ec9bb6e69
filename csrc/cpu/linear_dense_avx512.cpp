// The dot products of the dense linear layer with AVX-512.
#if defined(__AVX512F__)
#include "float512.h"
#include "linear_dense_dot.h"

namespace cnncomp {

const DotKernel kDotAvx512 = dot<Avx512>;

}  // namespace cnncomp
#endif
