// The int8 kernels with ARM's dot products of signed bytes (FEAT_DotProd).
#include "simd128.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

constexpr int kPixels[kMaxBlocks] = {6};  // 32 registers: 6 x 4 accumulators, the weights, the input and its flipped bits

}  // namespace

const Int8Kernels kInt8Dotprod = int8_kernels_of<14, Vec128>(conv_one_block<Vec128Less128, kPixels[0]>, kPixels, true);

}  // namespace cnncomp
