// The int8 kernels with ARM's dot products of unsigned by signed bytes (FEAT_I8MM).
#include "simd128.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

constexpr int kPixels[kMaxBlocks] = {6};  // 32 registers: 6 x 4 accumulators, the weights and the input

}  // namespace

const Int8Kernels kInt8I8mm = int8_kernels_of<14, Vec128>(conv_one_block<Vec128, kPixels[0]>, kPixels);

}  // namespace cnncomp
