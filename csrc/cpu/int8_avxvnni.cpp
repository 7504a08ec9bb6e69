// The int8 kernels with AVX-VNNI: 256-bit dot products of bytes.
#include "simd256.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

constexpr int kPixels[kMaxBlocks] = {6};  // 16 registers: 6 x 2 accumulators, the weights and the input

}  // namespace

const Int8Kernels kInt8AvxVnni = int8_kernels_of<12, Vec256, Vec128>(conv_one_block<Vec256, kPixels[0]>, kPixels);

}  // namespace cnncomp
