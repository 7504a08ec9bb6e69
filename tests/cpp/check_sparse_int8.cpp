// conv2d_sparse_int8, of quads and of scattered non-zeros, and two of them whose outputs are added.
#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "cpu/conv2d_sparse_int8.h"

namespace check {
namespace {

// Random weights in the layouts of docs/design.md ("sparse int8, CPU"; "sparse int8 at random, CPU").
class Weights {
 public:
  Weights(Random& random, const ConvSizes& z, bool scattered)
      : scattered_(scattered), block_(random.whole(1, z.c / z.groups + 2)), parts_(random, z, scattered, block_),
        values_(parts_.values), index_(parts_.index), row_ptr_(parts_.row_ptr) {}

  cnncomp::SparseInt8Weights packed() const {
    return {values_.data(), index_.data(), row_ptr_.data(), block_, scattered_};
  }

 private:
  struct Parts {
    std::vector<int8_t> values;
    std::vector<uint16_t> index;
    std::vector<int32_t> row_ptr{0};
    Parts(Random& random, const ConvSizes& z, bool scattered, int64_t block) {
      const double density = random.one_of<double>({0.0, 0.05, 0.3, 1.0});
      const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups;
      const int64_t elements = scattered ? group_c : (group_c + 3) / 4;
      RandomWeight weight(random);
      for (int64_t g = 0; g < z.groups; g++) {
        for (int64_t first = 0; first < elements; first += block) {
          for (int64_t k = 0; k < group_k; k++) {
            add_row(random, weight, density, std::min(block, elements - first) * z.r * z.s, scattered ? 1 : 4);
            row_ptr.push_back(static_cast<int32_t>(values.size() / 4));
          }
        }
      }
    }

    // Of `count` places for `width` values each; filled up to four with weight 0 at place 0.
    void add_row(Random& random, RandomWeight& weight, double density, int64_t count, int64_t width) {
      for (int64_t i = 0; i < count; i++) {
        if (!random.chance(density)) continue;
        for (int64_t j = 0; j < width; j++) values.push_back(weight());
        index.push_back(static_cast<uint16_t>(i));
      }
      for (; values.size() % 4 != 0; index.push_back(0)) values.push_back(0);
    }
  };
  bool scattered_;
  int64_t block_;
  Parts parts_;
  Buffer<int8_t> values_;
  Buffer<uint16_t> index_;
  Buffer<int32_t> row_ptr_;
};

// Scale, bias and hi of k channels, hi the greatest 8-bit number or less.
std::vector<float> constants_of(Random& random, int64_t k, cnncomp::Dtype out) {
  std::vector<float> constants = random.many<float>(3 * k);
  for (int64_t i = 0; i < k; i++) {
    constants[i] *= 1e-2f;
    constants[2 * k + i] = (out == cnncomp::kU8 ? 255.0f : 127.0f) - (random.chance(0.2) ? 30.0f : 0.0f);
  }
  return constants;
}

float least(cnncomp::Dtype out) { return out == cnncomp::kU8 ? 0.0f : -128.0f; }

void conv2d_sparse_int8(Random& random) {
  const ConvSizes z(random);
  const bool scattered = random.chance(0.5), x_signed = random.chance(0.5), with_residual = random.chance(0.5);
  const Weights weights(random, z, scattered);
  const auto out_dtype = random.one_of({cnncomp::kU8, cnncomp::kS8, cnncomp::kF32});
  const auto residual_dtype = random.one_of({cnncomp::kU8, cnncomp::kS8, cnncomp::kF32});
  const int64_t out = z.n * z.p * z.q * z.k, bytes = out * (out_dtype == cnncomp::kF32 ? 4 : 1);
  const Buffer<uint8_t> x(random.many<uint8_t>(z.n * z.h * z.w * z.c));
  const Buffer<float> constants(constants_of(random, z.k, out_dtype));
  // Any bytes could be NaN.
  const Buffer<float> float_residual(random.many<float>(residual_dtype == cnncomp::kF32 ? out : 0));
  const Buffer<uint8_t> byte_residual(random.many<uint8_t>(residual_dtype == cnncomp::kF32 ? 0 : out));
  const char* residual = !with_residual                       ? nullptr
                         : residual_dtype == cnncomp::kF32 ? reinterpret_cast<const char*>(float_residual.data())
                                                             : reinterpret_cast<const char*>(byte_residual.data());
  const auto nonlinearity = random.one_of({cnncomp::kNone, cnncomp::kSilu, cnncomp::kHardswish});
  const std::string what = std::string("conv2d_sparse_int8") + (scattered ? " scattered" : "");
  same_everywhere(what + z.text(), bytes, false, [&](char* to, int threads) {
    cnncomp::conv2d_sparse_int8({x.data(), x_signed, z.n, z.h, z.w, z.c, weights.packed(), z.k, z.r, z.s, z.stride_h,
                                 z.stride_w, z.pad_h, z.pad_w, z.dil_h, z.dil_w, z.groups, constants.data(), residual,
                                 residual_dtype, 0.5f, least(out_dtype), to, out_dtype, threads, nonlinearity, 1.7f});
  });
}

// Sizes of two convolutions with outputs of one shape; mostly such that they go together.
struct Pair {
  ConvSizes first, second;

  explicit Pair(Random& random) : first(random), second(random) {
    if (random.chance(0.8)) {
      second.k = 16 * random.whole(1, 9);
      second.groups = second.r = second.s = second.dil_h = second.dil_w = 1;
      second.pad_h = second.pad_w = 0;
      second.p = (second.h - 1) / second.stride_h + 1;
      second.q = (second.w - 1) / second.stride_w + 1;
    }
    first.n = second.n, first.k = second.k, first.h = first.p = second.p, first.w = first.q = second.q;
    first.groups = first.r = first.s = first.stride_h = first.stride_w = first.dil_h = first.dil_w = 1;
    first.pad_h = first.pad_w = 0;
  }
};

void conv2d_sparse_int8_sum(Random& random) {
  const Pair z(random);
  const ConvSizes &f = z.first, &s = z.second;
  const Weights first_weights(random, f, random.chance(0.1)), weights(random, s, random.chance(0.1));
  const auto out_dtype = random.one_of({cnncomp::kU8, cnncomp::kS8});
  const bool first_signed = random.chance(0.5), x_signed = random.chance(0.5);
  const int64_t out = s.n * s.p * s.q * s.k;
  const Buffer<uint8_t> first_x(random.many<uint8_t>(f.n * f.h * f.w * f.c)), x(random.many<uint8_t>(s.n * s.h * s.w * s.c));
  const Buffer<float> first_constants(constants_of(random, f.k, cnncomp::kU8)), constants(constants_of(random, s.k, out_dtype));
  same_everywhere("conv2d_sparse_int8_sum" + f.text() + s.text(), out, false, [&](char* to, int threads) {
    const Buffer<float> middle(out);
    char* const residual = reinterpret_cast<char*>(middle.data());
    const cnncomp::Conv2dSparseInt8Args first{
        first_x.data(), first_signed, f.n, f.h, f.w, f.c, first_weights.packed(), f.k, f.r, f.s, f.stride_h, f.stride_w,
        f.pad_h, f.pad_w, f.dil_h, f.dil_w, f.groups, first_constants.data(), nullptr, cnncomp::kU8, 1.0f, -1e30f, residual,
        cnncomp::kF32, threads};
    cnncomp::Conv2dSparseInt8Args second{
        x.data(), x_signed, s.n, s.h, s.w, s.c, weights.packed(), s.k, s.r, s.s, s.stride_h, s.stride_w,
        s.pad_h, s.pad_w, s.dil_h, s.dil_w, s.groups, constants.data(), residual, cnncomp::kF32, 0.7f, least(out_dtype), to,
        out_dtype, threads};
    cnncomp::conv2d_sparse_int8_sum(first, second);
    const Buffer<char> in_turn(out);
    second.out = in_turn.data();
    cnncomp::conv2d_sparse_int8(first);
    cnncomp::conv2d_sparse_int8(second);
    if (std::memcmp(to, in_turn.data(), static_cast<size_t>(out)) != 0)
      throw std::runtime_error("conv2d_sparse_int8_sum" + f.text() + s.text() + ": not the bytes of both in turn");
  });
}

const Registration conv("conv2d_sparse_int8", conv2d_sparse_int8), sum("conv2d_sparse_int8_sum", conv2d_sparse_int8_sum);

}  // namespace
}  // namespace check
