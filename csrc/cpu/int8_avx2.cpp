// The int8 kernels with AVX2: products of bytes where none saturates, else of 16-bit pairs.
#include "simd256.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

// 16 registers: 6 x 2 accumulators, the weights and the input; weights of 16-bit pairs or two quads take two more, inputs one.
constexpr int kPixels[kMaxBlocks] = {6}, kExact = 4, kTwos = 4;

}  // namespace

const Int8Kernels kInt8Avx2 = int8_kernels_of<10, Vec256, Vec128>(conv_one_block<Vec256, kPixels[0], kExact, kTwos>, kPixels);

}  // namespace cnncomp
