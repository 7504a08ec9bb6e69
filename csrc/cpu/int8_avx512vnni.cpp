// The int8 kernels with AVX-512 VNNI.
#include "simd512.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

// As many pixels as 32 registers hold accumulators for, next to the weights and the input; of two blocks fewer, so that the
// epilogue of one tile leaves room for the products of the next (measured on MobileNetV2's projections, Zen 4).
constexpr int kPixels[kMaxBlocks] = {14, 6, 8, 6};

void conv(const ConvPanel& a) {
  switch (a.blocks) {
    case 1: return conv_blocks<Vec512, 1, kPixels[0], 8>(a);
    case 2: return conv_blocks<Vec512, 2, kPixels[1], 8>(a);
    case 3: return conv_blocks<Vec512, 3, kPixels[2], 8>(a);
    default: return conv_blocks<Vec512, 4, kPixels[3], 6>(a);
  }
}

}  // namespace

const Int8Kernels kInt8Avx512Vnni = int8_kernels_of<14, Vec512, Vec256, Vec128>(conv, kPixels);

}  // namespace cnncomp
