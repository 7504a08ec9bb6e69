// 8-bit NHWC activations into units of sixteen images, channel by channel, as conv2d_vnm_int8 gathers them (vnm_tile.cuh):
// (C, N / 16, H, W, 16), zeros where the last unit is filled up. Up to eight images are one unit of eight.

#include "cuda/epilogue.cuh"
#include "cuda/sparse_division.cuh"
#include "cuda/turn_bytes.cuh"

namespace cnncomp::cuda {

struct ByteUnitsParams {
  const uint32_t* x;
  uint32_t* out;
  int32_t n, units, words;  // images; pixels of all units; fours of a pixel's channels
  Divisor image, eights;    // pixels of an image; eights of such fours
};

// A thread takes four channels of a unit's images at one pixel, a warp eight neighbouring fours at four neighbouring pixels: both
// sides move whole sectors.
template <int kUnit>
__global__ void __launch_bounds__(128) to_byte_units_kernel(const ByteUnitsParams p) {
  const int warp = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int at = divide(warp, p.eights), word = (warp - at * p.eights.value) * 8 + lane % 8, unit = at * 4 + lane / 8;
  if (unit >= p.units || word >= p.words) return;
  const int block = divide(unit, p.image), rest = unit - block * p.image.value;
  uint32_t v[kUnit / 4][4];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const int image = block * kUnit + i;
    const int64_t from = (static_cast<int64_t>(image) * p.image.value + rest) * p.words + word;
    v[i / 4][i % 4] = image < p.n ? __ldg(p.x + from) : 0;
  }
#pragma unroll
  for (int i = 0; i < kUnit / 4; ++i) turn_bytes(v[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t* to = p.out + (static_cast<int64_t>(word * 4 + i) * p.units + unit) * (kUnit / 4);
    if constexpr (kUnit == 16)
      *reinterpret_cast<uint4*>(to) = make_uint4(v[0][i], v[1][i], v[2][i], v[3][i]);
    else
      *reinterpret_cast<uint2*>(to) = make_uint2(v[0][i], v[1][i]);
  }
}

Launch plan_to_byte_units(const Conv2d& c) {
  Launch launch;
  const int unit = c.n > 8 ? 16 : 8;
  launch.kernel = "to_byte_units_" + std::to_string(unit) + "_images";
  if (size_of(c.x_dtype) != 1 || c.c % 16 || !aligned(c.x, 16) || !aligned(c.epilogue.out, 16))
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(c.c) + " channels of " +
                                std::to_string(size_of(c.x_dtype)) +
                                " bytes, expected a multiple of 16 of one byte, and aligned tensors");
  ByteUnitsParams p = {};
  const int64_t units = ceil_div(c.n, unit) * c.h * c.w;
  p.x = static_cast<const uint32_t*>(c.x), p.out = static_cast<uint32_t*>(c.epilogue.out);
  p.n = c.n, p.units = static_cast<int32_t>(units), p.words = c.c / 4;
  p.image = divisor(c.h * c.w), p.eights = divisor((p.words + 7) / 8);
  const int64_t warps = ceil_div(units, 4) * p.eights.value;
  if (warps * 32 > INT32_MAX || units * unit > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(units) + " pixels of units are too many");
  launch.function = unit == 16 ? reinterpret_cast<const void*>(&to_byte_units_kernel<16>)
                               : reinterpret_cast<const void*>(&to_byte_units_kernel<8>);
  launch.grid[0] = static_cast<uint32_t>(ceil_div(warps, 4));
  launch.block = 128;
  launch.set_params(p);
  return launch;
}

}  // namespace cnncomp::cuda
