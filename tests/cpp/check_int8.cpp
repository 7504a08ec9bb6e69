// conv2d_int8 (dense, grouped, depthwise), max_pool2d_int8 and quantize.
#include "check.h"
#include "cpu/conv2d_int8.h"
#include "cpu/driver.h"
#include "cpu/max_pool2d_int8.h"
#include "cpu/quantize.h"

namespace check {
namespace {

int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple; }

// Random weights in the layouts of docs/design.md ("int8, CPU"), zero where they pad.
std::vector<int8_t> dense_weights(Random& random, const ConvSizes& z) {
  const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups, taps = z.r * z.s;
  const int64_t blocks = up(group_k, 16), quads = up(group_c, 4);
  std::vector<int8_t> packed(static_cast<size_t>(z.groups * blocks * taps * quads * 64));
  RandomWeight weight(random);
  for (int64_t g = 0; g < z.groups; g++)
    for (int64_t k = 0; k < group_k; k++)
      for (int64_t t = 0; t < taps; t++)
        for (int64_t c = 0; c < group_c; c++)
          packed[((((g * blocks + k / 16) * taps + t) * quads + c / 4) * 16 + k % 16) * 4 + c % 4] = weight();
  return packed;
}

std::vector<int8_t> depthwise_weights(Random& random, const ConvSizes& z) {
  const int64_t columns = z.r == 1 ? 1 : z.s, length = z.r == 1 ? z.s : z.r, quads = up(length, 4);
  std::vector<int8_t> packed(static_cast<size_t>(up(z.c, 16) * columns * quads * 64));
  RandomWeight weight(random);
  for (int64_t c = 0; c < z.c; c++)
    for (int64_t s = 0; s < columns; s++)
      for (int64_t t = 0; t < length; t++)
        packed[(((c / 16 * columns + s) * quads + t / 4) * 16 + c % 16) * 4 + t % 4] = weight();
  return packed;
}

void conv2d_int8(Random& random) {
  ConvSizes z(random);
  const bool depthwise = random.chance(0.4);
  if (depthwise) z.groups = z.k = z.c = random.whole(2, 150);
  const bool shifted = random.chance(0.3), x_signed = random.chance(0.5), with_residual = random.chance(0.5);
  const auto out_dtype = random.one_of({cnncomp::kU8, cnncomp::kS8, cnncomp::kF32});
  const auto residual_dtype = random.one_of({cnncomp::kU8, cnncomp::kS8, cnncomp::kF32});
  const int64_t out = z.n * z.p * z.q * z.k, bytes = out * (out_dtype == cnncomp::kF32 ? 4 : 1);
  const Buffer<uint8_t> x(random.many<uint8_t>(z.n * z.h * z.w * z.c));
  const Buffer<int8_t> weights(depthwise ? depthwise_weights(random, z) : dense_weights(random, z));
  std::vector<float> constants = random.many<float>((shifted ? 4 : 3) * z.k);
  for (int64_t k = 0; k < z.k; k++) {
    constants[k] *= 1e-2f;
    constants[2 * z.k + k] = out_dtype == cnncomp::kU8 ? 255.0f : 127.0f;
  }
  const Buffer<float> packed_constants(constants);
  // Floats in [-1, 1] are as good as any bytes, and the other way round they could be NaN.
  const Buffer<float> float_residual(random.many<float>(residual_dtype == cnncomp::kF32 ? out : 0));
  const Buffer<uint8_t> byte_residual(random.many<uint8_t>(residual_dtype == cnncomp::kF32 ? 0 : out));
  const char* residual = !with_residual                       ? nullptr
                         : residual_dtype == cnncomp::kF32 ? reinterpret_cast<const char*>(float_residual.data())
                                                             : reinterpret_cast<const char*>(byte_residual.data());
  const float lo = out_dtype == cnncomp::kU8 ? 0.0f : -128.0f;
  const auto nonlinearity = random.one_of({cnncomp::kNone, cnncomp::kSilu, cnncomp::kHardswish});
  const std::string what = std::string("conv2d_int8") + (depthwise ? " depthwise" : "") + (shifted ? " shifted" : "");
  same_everywhere(what + z.text(), bytes, false, [&](char* to, int threads) {
    cnncomp::conv2d_int8({x.data(), x_signed, z.n, z.h, z.w, z.c, weights.data(), z.k, z.r, z.s, z.stride_h, z.stride_w,
                          z.pad_h, z.pad_w, z.dil_h, z.dil_w, z.groups, depthwise, packed_constants.data(), residual,
                          residual_dtype, 0.5f, lo, to, out_dtype, threads, shifted, nonlinearity, 1.7f});
  });
}

void max_pool2d_int8(Random& random) {
  const ConvSizes z(random);
  const bool x_signed = random.chance(0.5), ceil_mode = random.chance(0.5);
  const int64_t p = cnncomp::pooled_size(z.h, z.r, z.stride_h, z.pad_h, z.dil_h, ceil_mode);
  const int64_t q = cnncomp::pooled_size(z.w, z.s, z.stride_w, z.pad_w, z.dil_w, ceil_mode);
  const Buffer<uint8_t> x(random.many<uint8_t>(z.n * z.h * z.w * z.c));
  same_everywhere("max_pool2d_int8" + z.text(), z.n * p * q * z.c, false, [&](char* to, int threads) {
    cnncomp::max_pool2d_int8({x.data(), x_signed, z.n, z.h, z.w, z.c, z.r, z.s, z.stride_h, z.stride_w, z.pad_h, z.pad_w,
                              z.dil_h, z.dil_w, reinterpret_cast<uint8_t*>(to), threads, ceil_mode});
  });
}

void quantize(Random& random) {
  const int64_t n = random.whole(1, 3), c = random.whole(1, 70), h = random.whole(1, 30), w = random.whole(1, 30);
  const bool channels_last = random.chance(0.5), out_signed = random.chance(0.5);
  const Buffer<float> x(random.many<float>(n * c * h * w));
  const std::string what = "quantize n=" + std::to_string(n) + " c=" + std::to_string(c) + " h=" + std::to_string(h) +
                           " w=" + std::to_string(w) + (channels_last ? " channels_last" : "");
  same_everywhere(what, x.size(), false, [&](char* to, int threads) {
    cnncomp::quantize({x.data(), n, c, h, w, channels_last, reinterpret_cast<uint8_t*>(to), out_signed, 150.0f, threads});
  });
}

const Registration conv("conv2d_int8", conv2d_int8), pool("max_pool2d_int8", max_pool2d_int8), q("quantize", quantize);

}  // namespace
}  // namespace check
