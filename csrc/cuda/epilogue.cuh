// The one epilogue (docs/design.md, "Numbers") for kVec neighbouring output channels of one pixel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/activation.cuh"
#include "cuda/arch.cuh"
#include "cuda/launch.h"

namespace cnncomp::cuda {

struct EpilogueParams {
  Epilogue e;
  int32_t k;        // output channels of all groups: the row length of out and residual
  int32_t limit;    // output channels of one group of the grid
  int32_t vectors;  // 1: channels come in whole aligned vectors, so no element has to be looked at alone
  int32_t bytes;    // 8-bit output and no activation but a clamp, 1: and no residual, 2: an 8-bit residual; else 0
};

// Parameters for a kernel whose grid has `limit` channels a group and whose threads hold `vec` neighbouring ones.
inline EpilogueParams epilogue_params(const Conv2d& conv, int32_t limit, int vec) {
  const Epilogue& e = conv.epilogue;
  auto fits = [&](const void* p, DType type) { return aligned(p, type == DType::kFloat32 ? 16 : vec * size_of(type)); };
  const bool vectors = vec >= 4 && limit % vec == 0 && aligned(e.constants, 16) &&
                       fits(e.out, e.out_dtype) && fits(e.residual, e.residual_dtype);
  const bool bytes = size_of(e.out_dtype) == 1 && e.activation == Activation::kNone;
  const int with_residual = size_of(e.residual_dtype) == 1 ? 2 : 0;
  return {e, conv.k, limit, vectors ? 1 : 0, !bytes ? 0 : e.residual == nullptr ? 1 : with_residual};
}

template <int kVec>
struct ChannelConstants {
  float scale[kVec], bias[kVec], hi[kVec];
};

// What kBytes neighbouring bytes are moved as.
template <int kBytes>
struct Word {
  using type = uint8_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Loads kVec floats from a row of constants or a float residual; whole vectors are 16-byte aligned.
template <int kVec>
__device__ __forceinline__ void load_floats(float (&out)[kVec], const float* src, int real) {
  if (kVec % 4 == 0 && real == kVec) {
#pragma unroll
    for (int i = 0; i + 3 < kVec; i += 4) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(src + i));
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = i < -real ? __ldg(src + i) : 0.0f;
  }
}

template <int kVec>
__device__ __forceinline__ void store_floats(const float (&t)[kVec], float* dst, int real) {
  if (real == kVec) {
#pragma unroll
    for (int i = 0; i + 3 < kVec; i += 4)
      *reinterpret_cast<float4*>(dst + i) = make_float4(t[i], t[i + 1], t[i + 2], t[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < -real) dst[i] = t[i];
  }
}

__device__ __forceinline__ float to_float(int32_t v) { return __int2float_rn(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void round_to(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

template <typename Half, int kVec>
__device__ __forceinline__ void load_halves(float (&out)[kVec], const Half* src, int real) {
  alignas(2 * kVec) Half values[kVec];
  using W = typename Word<2 * kVec>::type;
  if (real == kVec) *reinterpret_cast<W*>(values) = __ldg(reinterpret_cast<const W*>(src));
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (real != kVec) round_to(values[i], 0.0f);
    if (i < -real) values[i] = src[i];
    out[i] = to_float(values[i]);
  }
}

template <typename Half, int kVec>
__device__ __forceinline__ void store_halves(const float (&t)[kVec], Half* dst, int real) {
  alignas(2 * kVec) Half values[kVec];
  using W = typename Word<2 * kVec>::type;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    round_to(values[i], t[i]);
    if (i < -real) dst[i] = values[i];
  }
  if (real == kVec) *reinterpret_cast<W*>(dst) = *reinterpret_cast<const W*>(values);
}

// How many of kVec channels from `channel` of a group exist: kVec if they may be moved as vectors, else minus their number.
template <int kVec>
__device__ __forceinline__ int real_channels(const EpilogueParams& p, int channel) {
  const int left = min(max(p.limit - channel, 0), kVec);
  return p.vectors && left == kVec ? kVec : -left;
}

template <int kVec>
__device__ __forceinline__ ChannelConstants<kVec> load_constants(const EpilogueParams& p, int group, int channel) {
  ChannelConstants<kVec> c;
  const int real = real_channels<kVec>(p, channel);
  const float* row = p.e.constants + group * p.limit + channel;
  auto load = [&](int count) {
    load_floats(c.scale, row, count);
    load_floats(c.bias, row + p.k, count);
    load_floats(c.hi, row + 2 * static_cast<int64_t>(p.k), count);
  };
  if (real == kVec)  // once for all three
    load(kVec);
  else
    load(real);
  return c;
}

template <int kVec>
__device__ __forceinline__ void load_bytes(float (&out)[kVec], const uint8_t* src, DType type, int real) {
  const int flip = type == DType::kInt8 ? 0x80 : 0;  // s8 = (byte ^ 0x80) - 0x80
  alignas(kVec) uint8_t bytes[kVec] = {};
  if (real == kVec) {
    using W = typename Word<kVec>::type;
    *reinterpret_cast<W*>(bytes) = __ldg(reinterpret_cast<const W*>(src));
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < -real) bytes[i] = __ldg(src + i);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = __int2float_rn((bytes[i] ^ flip) - flip);
}

// Rounds four values half to even, to neighbouring bytes; they are in the range of the 8-bit type already. 1.5 * 2^23 leaves no
// bits for a fraction, so the sum is rounded and ends in the integer, at the rate of additions, not of conversions.
__device__ __forceinline__ uint32_t round_to_bytes(float a, float b, float c, float d) {
  auto rounded = [](float t) { return __float_as_uint(__fadd_rn(t, 12582912.0f)); };
  return __byte_perm(__byte_perm(rounded(a), rounded(b), 0x0040), __byte_perm(rounded(c), rounded(d), 0x0040), 0x5410);
}

template <int kVec>
__device__ __forceinline__ void store_bytes(const float (&t)[kVec], uint8_t* dst, int real) {
  if constexpr (kVec % 4 == 0) {
    alignas(kVec) uint32_t words[kVec / 4];
#pragma unroll
    for (int i = 0; i < kVec / 4; ++i) words[i] = round_to_bytes(t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
    using W = typename Word<kVec>::type;
    if (real == kVec) {
      *reinterpret_cast<W*>(dst) = *reinterpret_cast<const W*>(words);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < -real) dst[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < -real || real == kVec) dst[i] = static_cast<uint8_t>(round_to_bytes(t[i], 0.0f, 0.0f, 0.0f));
  }
}

// Calls f with a pointer to what `type` is in memory; Narrow is uint8_t, for any, or the one type besides float32.
template <typename Narrow, typename F>
__device__ __forceinline__ void with_type(DType type, F&& f) {
  if (type == DType::kFloat32) return f(static_cast<float*>(nullptr));
  if constexpr (sizeof(Narrow) == 1) {
    if (type == DType::kFloat16) return f(static_cast<__half*>(nullptr));
    if (type == DType::kBfloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  }
  f(static_cast<Narrow*>(nullptr));
}

// Where a channel's value of a pixel lies in out and residual.
__device__ __forceinline__ int64_t offset_of(const EpilogueParams& p, int64_t pixel, int group, int channel) {
  return pixel * p.k + group * p.limit + channel;
}

template <int kVec>
__device__ __forceinline__ void add_residual(float (&t)[kVec], const float (&residual)[kVec], float scale) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) t[i] = __fadd_rn(t[i], __fmul_rn(residual[i], scale));
}

template <int kVec>
__device__ __forceinline__ void clamp(float (&t)[kVec], float lo, const float (&hi)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) t[i] = smaller(larger(t[i], lo), hi[i]);
}

// What comes after scale and bias, for all types and activations, of one channel or of a whole vector.
template <typename Narrow, int kVec>
__device__ __forceinline__ void finish_whole(float (&t)[kVec], const float (&hi)[kVec], const Epilogue& e, int64_t offset) {
  constexpr int kReal = kVec == 1 ? -1 : kVec;
  if (e.residual != nullptr) {
    float residual[kVec];
    with_type<Narrow>(e.residual_dtype, [&](auto* type) {
      const auto* src = static_cast<const std::remove_pointer_t<decltype(type)>*>(e.residual) + offset;
      if constexpr (sizeof(*type) == 4) load_floats(residual, src, kReal);
      if constexpr (sizeof(*type) == 2) load_halves(residual, src, kReal);
      if constexpr (sizeof(*type) == 1) load_bytes(residual, src, e.residual_dtype, kReal);
    });
    add_residual(t, residual, e.residual_scale);
  }
  if constexpr (sizeof(Narrow) == 1) {
    if (e.activation != Activation::kNone) activate(t, e.activation, e.out_factor);
  }
  clamp(t, e.lo, hi);
  with_type<Narrow>(e.out_dtype, [&](auto* type) {
    auto* dst = static_cast<decltype(type)>(e.out) + offset;
    if constexpr (sizeof(*type) == 4) store_floats(t, dst, kReal);
    if constexpr (sizeof(*type) == 2) store_halves(t, dst, kReal);
    if constexpr (sizeof(*type) == 1) store_bytes(t, dst, kReal);
  });
}

// values[i] without an address: registers have none.
template <int kVec>
__device__ __forceinline__ float element(const float (&values)[kVec], int i) {
  float found = values[0];
#pragma unroll
  for (int j = 1; j < kVec; ++j) found = i == j ? values[j] : found;
  return found;
}

// The same of `real` channels, of real_channels. Those of no whole vector go one by one, in a loop, for there are many copies of
// this code in a kernel.
template <typename Narrow, int kVec>
__device__ __forceinline__ void finish_any(float (&t)[kVec], const ChannelConstants<kVec>& c, const Epilogue& e, int64_t offset,
                                           int real) {
  if (kVec > 1 && real == kVec) return finish_whole<Narrow>(t, c.hi, e, offset);
#pragma unroll 1
  for (int i = 0; i < -real; ++i) {
    float one[1] = {element(t, i)};
    const float hi[1] = {element(c.hi, i)};
    finish_whole<Narrow>(one, hi, e, offset + i);
  }
}

// Scales, clamps, rounds and stores `acc` at `offset`; `real` of real_channels, not 0. Narrow: what is not float32 in memory,
// uint8_t where it may be any. Bytes, which layers in a chain give each other, come first and pay for nothing else.
template <int kVec, typename Narrow = uint8_t, typename Sum>
__device__ __forceinline__ void finish_at(const Sum (&acc)[kVec], const ChannelConstants<kVec>& c, const EpilogueParams& p,
                                          int64_t offset, int real) {
  float t[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) t[i] = __fadd_rn(__fmul_rn(to_float(acc[i]), c.scale[i]), c.bias[i]);
  if (sizeof(Narrow) == 1 && p.bytes != 0) {
    if (p.bytes == 2) {
      float residual[kVec];
      load_bytes(residual, static_cast<const uint8_t*>(p.e.residual) + offset, p.e.residual_dtype, real);
      add_residual(t, residual, p.e.residual_scale);
    }
    clamp(t, p.e.lo, c.hi);
    store_bytes(t, static_cast<uint8_t*>(p.e.out) + offset, real);
  } else {
    finish_any<Narrow>(t, c, p.e, offset, real);
  }
}

// The same of channels `channel`... of `group` at output pixel `pixel`.
template <int kVec, typename Narrow = uint8_t, typename Sum>
__device__ __forceinline__ void finish(const Sum (&acc)[kVec], const ChannelConstants<kVec>& c, const EpilogueParams& p,
                                       int64_t pixel, int group, int channel) {
  const int real = real_channels<kVec>(p, channel);
  if (real != 0) finish_at<kVec, Narrow>(acc, c, p, offset_of(p, pixel, group, channel), real);
}

}  // namespace cnncomp::cuda
