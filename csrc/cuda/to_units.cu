// NHWC activations into units of eight images, channel by channel, as the kernels of runs of outputs gather them
// (vectors_tile.cuh): (C, N / 8, H, W, 8), for 8 bits (C / 4, N / 8, H, W, 8, 4), zeros where the last unit is filled up.

#include "cuda/epilogue.cuh"
#include "cuda/sparse_division.cuh"

namespace cnncomp::cuda {

struct UnitsParams {
  const uint4* x;
  uint4* out;
  int32_t n, units, chunks;  // images; pixels of all units; pieces of 16 bytes of a pixel's channels
  Divisor image, pairs;      // pixels of an image; pairs of such pieces
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A thread takes 16 bytes of channels of eight images, of bytes of four, at one pixel. A warp takes two neighbouring pieces of the
// channels at neighbouring pixels: both sides move whole sectors.
template <int kElement>
__global__ void __launch_bounds__(128) to_units_kernel(const UnitsParams p) {
  constexpr int kUnit = 8, kParts = kElement == 2 ? 1 : 2, kImages = kUnit / kParts, kPixels = 16 / kParts;
  const int warp = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int at = divide(warp, p.pairs), chunk = (warp - at * p.pairs.value) * 2 + lane / kParts % 2;
  const int unit = at * kPixels + lane / (2 * kParts);
  if (unit >= p.units || chunk >= p.chunks) return;
  const int block = divide(unit, p.image), rest = unit - block * p.image.value, part = lane % kParts;
  uint4 v[kImages];
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    const int image = block * kUnit + part * kImages + i;
    const int64_t from = (static_cast<int64_t>(image) * p.image.value + rest) * p.chunks + chunk;
    v[i] = image < p.n ? __ldg(p.x + from) : make_uint4(0, 0, 0, 0);
  }
  constexpr int kRows = kElement == 2 ? 8 : 4;  // of the output, in a piece
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    uint4* to = p.out + (static_cast<int64_t>(chunk * kRows + i) * p.units + unit) * kParts + part;
    if constexpr (kElement == 2) {
      auto two = [&](int j) {
        return __byte_perm(word_of(v[2 * j], i / 2), word_of(v[2 * j + 1], i / 2), i % 2 ? 0x7632 : 0x5410);
      };
      *to = make_uint4(two(0), two(1), two(2), two(3));
    } else {
      *to = make_uint4(word_of(v[0], i), word_of(v[1], i), word_of(v[2], i), word_of(v[3], i));
    }
  }
}

Launch plan_to_units(const Conv2d& c) {
  const int element = size_of(c.x_dtype), pixels = element == 2 ? 16 : 8;
  Launch launch;
  launch.kernel = "to_units_" + std::to_string(element) + "_bytes";
  if (element > 2) throw std::invalid_argument("to_units: elements of " + std::to_string(element) + " bytes, expected 1 or 2");
  if (int64_t{c.c} * element % 16 || !aligned(c.x, 16) || !aligned(c.epilogue.out, 16))
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(c.c) +
                                " channels, expected whole pieces of 16 bytes, and aligned tensors");
  UnitsParams p = {};
  const int64_t units = ceil_div(c.n, 8) * c.h * c.w;
  p.x = static_cast<const uint4*>(c.x), p.out = static_cast<uint4*>(c.epilogue.out);
  p.n = c.n, p.units = static_cast<int32_t>(units), p.chunks = c.c * element / 16;
  p.image = divisor(c.h * c.w), p.pairs = divisor((p.chunks + 1) / 2);
  const int64_t warps = ceil_div(units, pixels) * p.pairs.value;
  if (warps * 32 > INT32_MAX || units * 8 > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(units) + " pixels of eight images are too many");
  launch.function = element == 2 ? reinterpret_cast<const void*>(&to_units_kernel<2>)
                                 : reinterpret_cast<const void*>(&to_units_kernel<1>);
  launch.grid[0] = static_cast<uint32_t>(ceil_div(warps, 4));
  launch.block = 128;
  launch.set_params(p);
  return launch;
}

}  // namespace cnncomp::cuda
