// The int8 kernels with AVX-512 without VNNI: products of bytes where none saturates, else of 16-bit pairs.
#include "simd512.h"

#include "int8_table.h"

namespace cnncomp {
namespace {

// As many pixels as 32 registers hold accumulators for, next to the weights and the input.
constexpr int kPixels[kMaxBlocks] = {14, 12, 7, 5};

void conv(const ConvPanel& a) {
  switch (a.blocks) {
    case 1: return conv_blocks<Vec512, 1, kPixels[0]>(a);
    case 2: return conv_blocks<Vec512, 2, kPixels[1]>(a);
    case 3: return conv_blocks<Vec512, 3, kPixels[2]>(a);
    default: return conv_blocks<Vec512, 4, kPixels[3]>(a);
  }
}

}  // namespace

const Int8Kernels kInt8Avx512 = int8_kernels_of<14, Vec512, Vec256, Vec128>(conv, kPixels);

}  // namespace cnncomp
