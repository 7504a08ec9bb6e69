// conv2d_dense, linear_dense and the fp32 pools.
#include "check.h"
#include "cpu/conv2d_sparse.h"
#include "cpu/linear_dense.h"
#include "cpu/pool2d.h"

namespace check {
namespace {

void conv2d_dense(Random& random) {
  const ConvSizes z(random);
  const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups, block = random.whole(1, group_c);
  const int64_t blocks = (group_c + block - 1) / block, out = z.n * z.k * z.p * z.q;
  const Buffer<float> weights(random.many<float>(z.groups * blocks * ((group_k + 7) / 8) * block * z.r * z.s * 8));
  const Buffer<float> x(random.many<float>(z.n * z.c * z.h * z.w)), bias(random.many<float>(z.k));
  const Buffer<float> residual(random.many<float>(out));
  const bool with_bias = random.chance(0.5), with_residual = random.chance(0.5);
  same_everywhere("conv2d_dense" + z.text(), out * 4, true, [&](char* to, int threads) {
    cnncomp::conv2d_dense({x.data(), z.n, z.c, z.h, z.w, {weights.data(), block}, z.k, z.r, z.s, z.stride_h, z.stride_w,
                           z.pad_h, z.pad_w, z.dil_h, z.dil_w, z.groups, with_bias ? bias.data() : nullptr,
                           with_residual ? residual.data() : nullptr, 0.0f, 1.0f, reinterpret_cast<float*>(to), threads});
  });
}

void linear_dense(Random& random) {
  const int64_t m = random.whole(1, 9), c = random.whole(1, 150), k = random.whole(1, 80);
  const Buffer<float> x(random.many<float>(m * c)), weight(random.many<float>(k * c)), bias(random.many<float>(k));
  const Buffer<float> residual(random.many<float>(m * k));
  const bool with_bias = random.chance(0.5), with_residual = random.chance(0.5);
  const std::string what = "linear_dense m=" + std::to_string(m) + " c=" + std::to_string(c) + " k=" + std::to_string(k);
  same_everywhere(what, m * k * 4, true, [&](char* to, int threads) {
    cnncomp::linear_dense({x.data(), m, c, weight.data(), k, with_bias ? bias.data() : nullptr,
                           with_residual ? residual.data() : nullptr, 0.0f, 6.0f, reinterpret_cast<float*>(to), threads});
  });
}

void pools(Random& random) {
  const ConvSizes z(random);
  const Buffer<float> x(random.many<float>(z.n * z.c * z.h * z.w));
  const bool ceil_mode = random.chance(0.5);
  const auto more = [&](int64_t in, int64_t pad, int64_t reach, int64_t stride, int64_t size) {
    return size + (ceil_mode && (in + 2 * pad - reach) % stride != 0 && size * stride < in + pad);
  };
  const int64_t p = more(z.h, z.pad_h, z.dil_h * (z.r - 1) + 1, z.stride_h, z.p);
  const int64_t q = more(z.w, z.pad_w, z.dil_w * (z.s - 1) + 1, z.stride_w, z.q);
  same_everywhere("max_pool2d" + z.text(), z.n * z.c * p * q * 4, true, [&](char* to, int threads) {
    cnncomp::max_pool2d({x.data(), z.n, z.c, z.h, z.w, z.r, z.s, z.stride_h, z.stride_w, z.pad_h, z.pad_w, z.dil_h, z.dil_w,
                         reinterpret_cast<float*>(to), threads, 0, 0, ceil_mode});
  });
  const bool last = random.chance(0.5);
  same_everywhere("mean_pool2d" + z.text(), z.n * z.c * 4, true, [&](char* to, int threads) {
    cnncomp::mean_pool2d({x.data(), z.n, z.c, z.h * z.w, last, reinterpret_cast<float*>(to), threads});
  });
}

const Registration conv("conv2d_dense", conv2d_dense), linear("linear_dense", linear_dense), pool("pool2d", pools);

}  // namespace
}  // namespace check
