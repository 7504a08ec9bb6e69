// The dot products of the dense linear layer with AVX2 and FMA.
#if defined(__AVX2__) && defined(__FMA__)
#include "float256.h"
#include "linear_dense_dot.h"

namespace cnncomp {

const DotKernel kDotAvx2 = dot<Avx2>;

}  // namespace cnncomp
#endif
