// The dot products of the dense linear layer in plain C++.
#include "float128.h"
#include "linear_dense_dot.h"

namespace cnncomp {

const DotKernel kDotBaseline = dot<Baseline>;

}  // namespace cnncomp
