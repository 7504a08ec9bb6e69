// 3 x 3 depthwise convolution by dp4a: each product takes three neighbouring input columns of a channel at once.

#include "cuda/conv_params.cuh"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 128;

// sum + the products of four bytes, unsigned or signed ones of a, signed ones of b.
template <bool kSigned>
__device__ __forceinline__ int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  int32_t d;
  if constexpr (kSigned)
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  else
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  return d;
}

// Four channels of four columns to four columns of four channels, each a byte.
__device__ __forceinline__ void transpose(uint32_t (&v)[4]) {
  const uint32_t low01 = __byte_perm(v[0], v[1], 0x5140), low23 = __byte_perm(v[2], v[3], 0x5140);
  const uint32_t high01 = __byte_perm(v[0], v[1], 0x7362), high23 = __byte_perm(v[2], v[3], 0x7362);
  v[0] = __byte_perm(low01, low23, 0x5410), v[1] = __byte_perm(low01, low23, 0x7632);
  v[2] = __byte_perm(high01, high23, 0x5410), v[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace

// A 3 x 3 kernel, not dilated, with the same stride both ways; as many output as input channels, a multiple of 4; images and
// weights 4-byte aligned. A thread computes kRows output rows of four channels, of two columns where the stride is 1: both
// lie in the same four input columns, and the weights of the second are those of the first, one byte on.
template <int kStride, int kRows, bool kSigned>
__global__ void __launch_bounds__(kThreads) depthwise3x3_int8_kernel(const ConvParams p) {
  constexpr int kColumns = kStride == 1 ? 2 : 1, kInput = (kColumns - 1) * kStride + 3, kChannels = 4, kTaps = 9;
  const uint32_t vectors = p.epilogue.k / kChannels, columns = (p.q + kColumns - 1) / kColumns, rows = (p.p + kRows - 1) / kRows;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x, place = index / vectors, strip = place / columns;
  const int channel = index % vectors * kChannels, q0 = place % columns * kColumns, p0 = strip % rows * kRows;
  const int image = strip / rows, h0 = p0 * kStride - p.pad_h, w0 = q0 * kStride - p.pad_w;
  if (image >= p.n) return;

  uint32_t packed[kTaps], taps[kChannels][3];  // three weights of a row of the kernel, and a zero
#pragma unroll
  for (int i = 0; i < kTaps; ++i) packed[i] = __ldg(reinterpret_cast<const uint32_t*>(p.weight + channel * kTaps) + i);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const int at = c * kTaps + r * 3;
      taps[c][r] = __funnelshift_r(packed[at / 4], packed[min(at / 4 + 1, kTaps - 1)], at % 4 * 8) & 0xffffff;
    }
  }

  // Places outside of the image are read at its border, and count as zeros: a load that nothing decides about can go early.
  uint32_t inside = 0;  // the columns' bytes
  const int8_t* column[kInput];
#pragma unroll
  for (int j = 0; j < kInput; ++j) {
    if (static_cast<uint32_t>(w0 + j) < static_cast<uint32_t>(p.w)) inside |= 0xffu << (8 * j);
    const int64_t first = (static_cast<int64_t>(image) * p.h + min(max(h0, 0), p.h - 1)) * p.w;
    column[j] = p.x + (first + min(max(w0 + j, 0), p.w - 1)) * p.c + channel;
  }
  int32_t acc[kRows][kColumns][kChannels] = {};
#pragma unroll
  for (int i = 0; i < (kRows - 1) * kStride + 3; ++i) {
    const uint32_t mask = static_cast<uint32_t>(h0 + i) < static_cast<uint32_t>(p.h) ? inside : 0;
    const int64_t to_next = static_cast<uint32_t>(h0 + i) < static_cast<uint32_t>(p.h - 1) ? static_cast<int64_t>(p.w) * p.c : 0;
    uint32_t input[4] = {};
#pragma unroll
    for (int j = 0; j < kInput; ++j) {
      input[j] = __ldg(reinterpret_cast<const uint32_t*>(column[j]));
      column[j] += to_next;
    }
    transpose(input);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) input[c] &= mask;
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      const int r = i - o * kStride;
      if (r < 0 || r > 2) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) acc[o][j][c] = dot4<kSigned>(input[c], taps[c][r] << (8 * j), acc[o][j][c]);
    }
  }

  ChannelConstants<kChannels> constants;
  const int real = real_channels<kChannels>(p.epilogue, channel);
  const int64_t first = offset_of(p.epilogue, (static_cast<int64_t>(image) * p.p + p0) * p.q + q0, 0, channel);
  auto each = [&](auto finish) {
    int64_t offset = first;
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      if (p0 + o >= p.p) return;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (q0 + j < p.q) finish(acc[o][j], offset + j * p.epilogue.k);
      offset += static_cast<int64_t>(p.q) * p.epilogue.k;
    }
  };
  if (p.epilogue.bytes != 0) {
    if (real == kChannels)  // once for all three rows
      load_constants(constants, p.epilogue, 0, channel, kChannels);
    else
      load_constants(constants, p.epilogue, 0, channel, real);
    each([&](const auto& sums, int64_t offset) { finish_bytes(sums, constants, p.epilogue, offset, real); });
  } else {  // constants are loaded each time, for want of registers
    each([&](const auto& sums, int64_t offset) {
      load_constants(constants, p.epilogue, 0, channel, real);
      float t[kChannels];
      scale(t, sums, constants);
      finish_any(t, constants, p.epilogue.e, offset, real);
    });
  }
}

namespace {

template <int kStride, int kRows>
int64_t threads_of(const Conv2d& conv) {
  return conv.n * ceil_div(conv.p(), kRows) * ceil_div(conv.q(), kStride == 1 ? 2 : 1) * (conv.k / 4);
}

template <int kStride, int kRows>
Launch plan_rows(const Conv2d& conv) {
  Launch launch;
  launch.kernel = "depthwise3x3_int8_" + std::to_string(kStride) + "_" + std::to_string(kRows) + (conv.x_signed ? "_s8" : "_u8");
  launch.function = reinterpret_cast<const void*>(conv.x_signed ? &depthwise3x3_int8_kernel<kStride, kRows, true>
                                                                : &depthwise3x3_int8_kernel<kStride, kRows, false>);
  launch.grid[0] = static_cast<uint32_t>(ceil_div(threads_of<kStride, kRows>(conv), kThreads));
  launch.block = kThreads;
  // To the epilogue all channels are one group: their numbers are global in this kernel.
  launch.set_params(conv_params(conv, epilogue_params(conv, conv.k, 4)));
  return launch;
}

// Rows of outputs share rows of inputs, if there are threads enough.
template <int kStride>
Launch plan_stride(const Conv2d& conv, int multiprocessors) {
  constexpr int64_t kEnough = 512;  // threads of a multiprocessor that keep its memory busy
  return threads_of<kStride, 4>(conv) >= kEnough * multiprocessors ? plan_rows<kStride, 4>(conv) : plan_rows<kStride, 1>(conv);
}

}  // namespace

bool depthwise3x3_fits(const Conv2d& conv) {
  return conv.r == 3 && conv.s == 3 && conv.dil_h == 1 && conv.dil_w == 1 && conv.stride_h == conv.stride_w &&
         conv.stride_h <= 2 && conv.k == conv.c && conv.c % 4 == 0 && aligned(conv.x, 4) && aligned(conv.weight, 4) &&
         threads_of<1, 1>(conv) <= INT32_MAX;  // they are counted in 32 bits
}

Launch plan_depthwise3x3_int8(const Conv2d& conv, int multiprocessors) {
  return conv.stride_h == 1 ? plan_stride<1>(conv, multiprocessors) : plan_stride<2>(conv, multiprocessors);
}

}  // namespace cnncomp::cuda
