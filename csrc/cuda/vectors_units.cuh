// Epilogue and store of the kernels that gather, as NHWC or in the units of images that the next such kernel reads.
#pragma once

#include "cuda/vectors_tile.cuh"

namespace cnncomp::cuda {

// Word k of lane q, of each kWords lanes, to word q of lane k. All lanes of a warp take part.
template <int kWords>
__device__ __forceinline__ void turn_lanes(uint32_t (&words)[kWords]) {
#pragma unroll
  for (int far = 1; far < kWords; far *= 2) {
    const bool upper = threadIdx.x & far;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (i & far) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? words[i] : words[i + far], far);
      words[i] = upper ? got : words[i];
      words[i + far] = upper ? words[i + far] : got;
    }
  }
}

// The epilogue of a word of neighbouring values; `residual`: their word of it.
template <typename Narrow, int kValues, typename Sum>
__device__ __forceinline__ uint32_t finish_word(const Sum (&acc)[kValues], const ChannelConstants<kValues>& c, const Epilogue& e,
                                                uint32_t residual) {
  static_assert(kValues * sizeof(Narrow) == 4, "a word");
  float t[kValues], r[kValues];
  scale(t, acc, c);
  alignas(4) Narrow values[kValues];
  *reinterpret_cast<uint32_t*>(values) = residual;
  const int flip = e.residual_dtype == DType::kInt8 ? 0x80 : 0;  // s8 = (byte ^ 0x80) - 0x80
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if constexpr (sizeof(Narrow) == 1)
      r[i] = __int2float_rn((values[i] ^ flip) - flip);
    else
      r[i] = to_float(values[i]);
  }
  if (e.residual != nullptr) add_residual(t, r, e.residual_scale);
  clamp(t, e.lo, c.hi);
  if constexpr (sizeof(Narrow) == 1) {
    return round_to_bytes(t[0], t[1], t[2], t[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) round_to(values[i], t[i]);
    return *reinterpret_cast<const uint32_t*>(values);
  }
}

// Of the sums of kTiles neighbouring mma tiles, the pieces of whole words that a thread moves at once, so that a warp moves whole
// sectors. Halves: a channel of eight images at one pixel, for which four lanes with two images each of four pixels exchange them
// (two tiles: four images, and two lanes). Bytes: eight images of a channel; or four images of four channels, of which two lanes
// with eight images each exchange the halves.
template <typename Tile, typename Narrow>
struct UnitsPiece {
  static constexpr bool kHalves = Tile::kElement == 2, kFours = Tile::kColumns == 4;
  static constexpr int kTiles = Tile::kTilesP < 4 ? Tile::kTilesP : 4, kValues = 4 / Tile::kElement;
  static constexpr int kWords = kHalves ? kTiles : kFours ? 4 : 2, kCount = kFours ? 2 : Tile::kVec;
  static constexpr int kTogether = kFours ? 2 : 1;  // that are exchanged
  using W = typename Word<4 * kWords>::type;

  // Which of the warp's units the first piece is of after the exchange, and the bytes from there on to it.
  __device__ __forceinline__ static int unit(int j, int lane) {
    return kHalves ? j + lane % kWords : kFours ? Tile::unit(j, lane & ~1) : Tile::unit(j, lane);
  }
  __device__ __forceinline__ static int within(int j, int lane) {
    return kHalves ? lane % 4 / kWords * kWords * 4 : kFours ? lane % 2 * 16 : Tile::image(j, lane, 0);
  }

  // Its own inverse.
  __device__ __forceinline__ static void exchange(uint32_t (&words)[kTogether][kWords]) {
    if constexpr (kHalves) turn_lanes(words[0]);
    if constexpr (kFours) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t pair[2] = {words[0][w], words[1][w]};
        turn_lanes(pair);
        words[0][w] = pair[0], words[1][w] = pair[1];
      }
    }
  }

  template <typename Sum>
  __device__ __forceinline__ static void finish(uint32_t (&words)[kWords], const VectorsSums<Tile, Sum>& acc, int j, int i,
                                                const ChannelConstants<Tile::kVec>& constants, const Epilogue& e) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      Sum sums[kValues];
      ChannelConstants<kValues> c;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int channel = kFours ? v : i, tile = kHalves || kFours ? j + w : j + v, image = kHalves ? v : kFours ? i : w;
        sums[v] = acc.value[channel / 2][tile][channel % 2 * 2 + image];
        c.scale[v] = constants.scale[channel], c.bias[v] = constants.bias[channel], c.hi[v] = constants.hi[channel];
      }
      words[w] = finish_word<Narrow>(sums, c, e, words[w]);
    }
  }
};

template <typename Tile, typename Narrow, typename Sum>
__device__ __forceinline__ void store_units(const VectorsSums<Tile, Sum>& acc, const VectorsParams& p,
                                            const VectorsPlace<Tile>& place) {
  using Piece = UnitsPiece<Tile, Narrow>;
  using W = typename Piece::W;
  constexpr int kVec = Tile::kVec, kUnitBytes = Tile::kUnit * Tile::kElement * Tile::kColumns;
  const int lane = threadIdx.x % 32;
  const int channel = (place.run - place.group * p.group_runs) * Tile::kRun + lane / 4 * kVec;
  const ChannelConstants<kVec> constants = load_constants<kVec>(p.epilogue, place.group, channel);
  const Epilogue& e = p.epilogue.e;
  const int64_t channel_bytes = static_cast<int64_t>(p.units) * kUnitBytes;
  const int64_t first = (place.group * p.epilogue.limit + channel) / Tile::kColumns * channel_bytes;
  const int8_t* residual = static_cast<const int8_t*>(e.residual);
  int8_t* out = static_cast<int8_t*>(e.out);
  const int warp_unit = place.unit0 + threadIdx.x / 32 * (Tile::kWarpP / Tile::kUnit);
#pragma unroll
  for (int j = 0; j < Tile::kTilesP; j += Piece::kTiles) {
    const int unit = warp_unit + Piece::unit(j, lane);
    const int64_t at = first + static_cast<int64_t>(unit) * kUnitBytes + Piece::within(j, lane);
#pragma unroll
    for (int i = 0; i < Piece::kCount; i += Piece::kTogether) {
      // Of pieces i and, of fours, i + 1, at the next unit.
      auto inside = [&](int k) { return channel < p.epilogue.limit && unit + k < p.units; };
      auto offset = [&](int k) { return at + (Piece::kFours ? k * kUnitBytes : i * channel_bytes); };
      alignas(16) uint32_t words[Piece::kTogether][Piece::kWords] = {};
      if (residual != nullptr) {
#pragma unroll
        for (int k = 0; k < Piece::kTogether; ++k)
          if (inside(k)) *reinterpret_cast<W*>(words[k]) = __ldg(reinterpret_cast<const W*>(residual + offset(k)));
        Piece::exchange(words);
      }
#pragma unroll
      for (int k = 0; k < Piece::kTogether; ++k) Piece::finish(words[k], acc, j, i + k, constants, e);
      Piece::exchange(words);
#pragma unroll
      for (int k = 0; k < Piece::kTogether; ++k)
        if (inside(k)) *reinterpret_cast<W*>(out + offset(k)) = *reinterpret_cast<const W*>(words[k]);
    }
  }
}

template <typename Tile, typename Narrow, typename Sum>
__device__ __forceinline__ void store_outputs(const VectorsSums<Tile, Sum>& acc, const VectorsParams& p,
                                              const VectorsPlace<Tile>& place) {
  if (p.out_units)
    store_units<Tile, Narrow>(acc, p, place);
  else
    store_vectors<Tile, Narrow>(acc, p, place);
}

}  // namespace cnncomp::cuda
