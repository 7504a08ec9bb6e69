// conv2d_sparse and linear_sparse.
#include <optional>

#include "check.h"
#include "cpu/conv2d_sparse.h"
#include "cpu/linear_sparse.h"

namespace check {
namespace {

// Random weights in the layout of docs/design.md ("sparse fp32, CPU").
class Weights {
 public:
  Weights(Random& random, int64_t groups, int64_t group_c, int64_t group_k, int64_t taps)
      : block_(random.whole(1, group_c + 2)), parts_(random, groups, group_c, group_k, taps, block_),
        values_(parts_.values), index_(parts_.index), row_ptr_(parts_.row_ptr) {}

  cnncomp::SparseWeights packed() const { return {values_.data(), index_.data(), row_ptr_.data(), block_}; }

 private:
  struct Parts {
    std::vector<float> values;
    std::vector<uint16_t> index;
    std::vector<int32_t> row_ptr{0};
    Parts(Random& random, int64_t groups, int64_t group_c, int64_t group_k, int64_t taps, int64_t block) {
      const double density = random.one_of<double>({0.0, 0.05, 0.3, 1.0});
      for (int64_t g = 0; g < groups; g++) {
        for (int64_t c = 0; c < group_c; c += block) {
          for (int64_t k = 0; k < group_k; k++) {
            for (int64_t i = 0; i < std::min(block, group_c - c) * taps; i++) {
              if (!random.chance(density)) continue;
              values.push_back(random.real(-1, 1));
              index.push_back(static_cast<uint16_t>(i));
            }
            row_ptr.push_back(static_cast<int32_t>(values.size()));
          }
        }
      }
    }
  };
  int64_t block_;
  Parts parts_;
  Buffer<float> values_;
  Buffer<uint16_t> index_;
  Buffer<int32_t> row_ptr_;
};

void conv2d_sparse(Random& random) {
  const ConvSizes z(random);
  const Weights weights(random, z.groups, z.c / z.groups, z.k / z.groups, z.r * z.s);
  const int64_t pixels = z.p * z.q, images = z.n * z.k;
  const bool gaps = random.chance(0.5);
  const int64_t x_pitch = z.h * z.w + (gaps ? random.whole(0, 40) : 0), out_pitch = pixels + (gaps ? random.whole(0, 40) : 0);
  const Buffer<float> x(random.many<float>(z.n * z.c * x_pitch)), bias(random.many<float>(z.k));
  const Buffer<float> residual(random.many<float>(images * out_pitch));
  const bool with_bias = random.chance(0.5), with_residual = random.chance(0.5);
  const float lo = random.chance(0.5) ? 0.0f : -1e30f, hi = random.chance(0.5) ? 1.0f : 1e30f;
  same_everywhere("conv2d_sparse" + z.text(), images * pixels * 4, true, [&](char* to, int threads) {
    const Gapped out(images, pixels, out_pitch);
    cnncomp::conv2d_sparse({x.data(), z.n, z.c, z.h, z.w, weights.packed(), z.k, z.r, z.s, z.stride_h, z.stride_w, z.pad_h,
                            z.pad_w, z.dil_h, z.dil_w, z.groups, with_bias ? bias.data() : nullptr,
                            with_residual ? residual.data() : nullptr, lo, hi, out.data(), threads, x_pitch, out_pitch,
                            out_pitch});
    out.copy(to);
  });
}

void linear_sparse(Random& random) {
  const int64_t m = random.whole(1, 120), c = random.whole(1, 150), k = random.whole(1, 80);
  const Weights weights(random, 1, c, k, 1);
  const Buffer<float> x(random.many<float>(m * c)), bias(random.many<float>(k)), residual(random.many<float>(m * k));
  const bool with_bias = random.chance(0.5), with_residual = random.chance(0.5);
  const std::string what = "linear_sparse m=" + std::to_string(m) + " c=" + std::to_string(c) + " k=" + std::to_string(k);
  same_everywhere(what, m * k * 4, true, [&](char* to, int threads) {
    cnncomp::linear_sparse({x.data(), m, c, weights.packed(), k, with_bias ? bias.data() : nullptr,
                            with_residual ? residual.data() : nullptr, 0.0f, 6.0f, reinterpret_cast<float*>(to), threads});
  });
}

const Registration conv("conv2d_sparse", conv2d_sparse), linear("linear_sparse", linear_sparse);

}  // namespace
}  // namespace check
