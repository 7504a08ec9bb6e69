// The register tile of the int8 convolution. Included by the int8 translation units of each instruction set.
//
// PIXELS x BLOCKS*16 accumulators; per tap and quad of input channels each pixel's quad is broadcast and meets the
// weights of 16 channels at a time. int8 inputs have their top bit flipped (init holds the correction). Where products of bytes
// saturate, those are taken that cannot with the inputs at hand, and the weights of the others in two parts; at best the products
// of two quads are added before they are widened.
#pragma once

#include "int8_epilogue.h"

namespace cnncomp {
namespace {

// How a tile meets its inputs: by exact products of two kinds, or, of unsigned ones, by products of bytes that saturate, of
// single quads or of two.
enum Inputs : int { kUnsignedInputs, kSignedInputs, kBoundedInputs, kBoundedTwos };

// Of one vector's weights, what was left when they were parted, and which tap and channel it belongs to.
struct Place {
  int32_t tap, channel;
};

template <class S>
struct Remainders {
  int64_t* count;
  Place* place;
  uint8_t* weight;

  // Of the v-th vector of a panel of so many weights.
  Remainders(const ConvPanel& a, int64_t panel_bytes, int v) {
    const int64_t most = room(a);
    uint8_t* const from = a.parts + panel_bytes + v * (sizeof(int64_t) + most * (sizeof(Place) + S::kBytes));
    count = reinterpret_cast<int64_t*>(from);
    place = reinterpret_cast<Place*>(count + 1);
    weight = reinterpret_cast<uint8_t*>(place + most);
  }

  // How many there can be.
  static int64_t room(const ConvPanel& a) { return a.taps * a.quads + 8; }
};

// The remainders of one vector so far. They are met two at a time, which few need a zero between for.
template <class S>
struct Parts {
  Remainders<S> left;
  int64_t count = 0;
  typename S::Int last = S::set(0), last_most = last;

  // Takes from w what is beyond its bounds. Adds one or two remainders.
  void take(typename S::Int& w, typename S::Int part, typename S::Int most, int64_t tap, int64_t channel) {
    if (count % 2 == 1 && !S::none(S::two_beyond(last_most, last, most, part))) add(S::set(0), tap, channel);
    add(part, tap, channel);
    last = part;
    last_most = most;
    w = S::sub_bytes(w, part);
  }
  void add(typename S::Int part, int64_t tap, int64_t channel) {
    S::store(left.weight + count * S::kBytes, part);
    left.place[count++] = {static_cast<int32_t>(tap), static_cast<int32_t>(channel)};
  }
  // Half of the pairs that could leave 16 bits.
  void bound(typename S::Int& w, typename S::Int most, int64_t tap, int64_t channel) {
    const auto beyond = S::pairs_beyond(most, w);
    if (__builtin_expect(!S::none(beyond), 0)) take(w, S::bit_and(S::halve_bytes(w), beyond), most, tap, channel);
  }
};

// Weights as they are, but for pairs whose products could be beyond 16 bits: of those one half, and the other in Remainders. With
// TWOS, the same of what the pairs of two quads add up to: of those the second. Returns whether Remainders are few enough to be
// worth while.
template <class S, int BLOCKS, bool TWOS>
bool part_weights(const ConvPanel& a) {
  constexpr int kPerBlock = kBlock / S::kLanes;
  const int64_t steps = a.taps * a.quads, block_bytes = steps * 4 * kBlock, channels = 4 * a.quads;
  const int64_t worth_while = TWOS ? steps / 3 : steps * 2 / 5;  // of a vector
  int64_t remainders = 0;
  for (int v = 0; v < BLOCKS * kPerBlock; v++) {
    Parts<S> parts{Remainders<S>(a, BLOCKS * block_bytes, v)};
    int64_t at = (v / kPerBlock) * block_bytes + (v % kPerBlock) * S::kBytes;
    for (int64_t tap = 0; tap < a.taps; tap++) {
      for (int64_t channel = 0; channel < channels; channel += 4, at += 4 * kBlock) {
        if (parts.count + 5 > Remainders<S>::room(a)) return false;  // four and a last one
        const auto most = S::broadcast(a.most + channel);
        auto w = S::load(a.weight + at);
        parts.bound(w, most, tap, channel);
        if constexpr (TWOS) {
          if (channel % 8 == 4) {
            const auto beyond = S::two_beyond(S::broadcast(a.most + channel - 4), S::load(a.parts + at - 4 * kBlock), most, w);
            if (!S::none(beyond)) parts.take(w, S::bit_and(w, beyond), most, tap, channel);
          }
        }
        S::store(a.parts + at, w);
      }
    }
    if (parts.count % 2 == 1) parts.add(S::set(0), 0, 0);
    *parts.left.count = parts.count;
    remainders += parts.count;
    if (remainders > (v + 1) * worth_while) return false;
  }
  return true;
}

// What accumulators start from where the least of each channel was taken from the inputs.
template <class S, int BLOCKS>
void add_least(const ConvPanel& a, int32_t* init) {
  constexpr int kPerBlock = kBlock / S::kLanes;
  for (int v = 0; v < BLOCKS * kPerBlock; v++) {
    const int8_t* weight = a.weight + (v / kPerBlock) * a.quads * 4 * kBlock + (v % kPerBlock) * S::kBytes;
    auto acc = S::load(a.init + v * S::kLanes);
    for (int64_t quad = 0; quad < a.quads; quad++, weight += 4 * kBlock)
      acc = S::dot(acc, S::input(S::broadcast(a.least + 4 * quad)), S::weight(S::load(weight)));
    S::store(init + v * S::kLanes, acc);
  }
}

// A tile's accumulators: V vectors of output channels for each pixel.
template <class S, int BLOCKS, int PIXELS>
using TileSums = typename S::Int[PIXELS][BLOCKS * kBlock / S::kLanes];

// sums += the quads of inputs at x[...] + c and their weights, `stride` bytes from block to block.
template <class S, int BLOCKS, int PIXELS, Inputs INPUTS>
inline __attribute__((always_inline)) void add_quad(TileSums<S, BLOCKS, PIXELS>& sums, const uint8_t* const (&x)[PIXELS],
                                                    int64_t c, const uint8_t* weight, int64_t stride) {
  constexpr int V = BLOCKS * kBlock / S::kLanes, kPerBlock = kBlock / S::kLanes;
  const auto from = [&](int v) { return weight + (v / kPerBlock) * stride + (v % kPerBlock) * S::kBytes; };
  if constexpr (INPUTS == kBoundedInputs) {
    typename S::Int w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = S::load(from(v));
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) {
      const auto input = S::broadcast(x[m] + c);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[m][v] = S::dot_bytes(sums[m][v], input, w[v]);
    }
  } else {
    const auto flip = S::set(static_cast<int32_t>(0x80808080u));
    typename S::Operand w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = S::weight(S::load(from(v)));
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) {
      const auto quad = S::broadcast(x[m] + c);
      const auto input = S::input(INPUTS == kSignedInputs ? S::bit_xor(quad, flip) : quad);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[m][v] = S::dot(sums[m][v], input, w[v]);
    }
  }
}

// The same of two quads, bounded together.
template <class S, int BLOCKS, int PIXELS>
inline __attribute__((always_inline)) void add_two_quads(TileSums<S, BLOCKS, PIXELS>& sums, const uint8_t* const (&x)[PIXELS],
                                                         int64_t c, const uint8_t* weight, int64_t stride) {
  constexpr int V = BLOCKS * kBlock / S::kLanes, kPerBlock = kBlock / S::kLanes;
  typename S::Int w[2][V];
#pragma GCC unroll 16
  for (int v = 0; v < 2 * V; v++)
    w[v / V][v % V] = S::load(weight + v / V * 4 * kBlock + v % V / kPerBlock * stride + v % kPerBlock * S::kBytes);
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; m++) {
    const auto x0 = S::broadcast(x[m] + c), x1 = S::broadcast(x[m] + c + 4);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sums[m][v] = S::dot_two(sums[m][v], x0, w[0][v], x1, w[1][v]);
  }
}

template <class S, int BLOCKS, int PIXELS>
inline __attribute__((always_inline)) void add_remainders(TileSums<S, BLOCKS, PIXELS>& sums, const ConvPanel& a,
                                                          const uint8_t* const* rows) {
#pragma GCC unroll 16
  for (int v = 0; v < BLOCKS * kBlock / S::kLanes; v++) {
    const Remainders<S> left(a, BLOCKS * a.taps * a.quads * 4 * kBlock, v);
    for (int64_t i = 0; i < *left.count; i += 2) {
      const auto w0 = S::load(left.weight + i * S::kBytes), w1 = S::load(left.weight + (i + 1) * S::kBytes);
      const Place p0 = left.place[i], p1 = left.place[i + 1];
#pragma GCC unroll 16
      for (int m = 0; m < PIXELS; m++) {
        const uint8_t* const* const row = rows + m * a.taps;
        const auto x0 = S::broadcast(row[p0.tap] + p0.channel), x1 = S::broadcast(row[p1.tap] + p1.channel);
        sums[m][v] = S::dot_two(sums[m][v], x0, w0, x1, w1);
      }
    }
  }
}

// The sums go to `out`, or, where that is null and the inputs are unsigned, through the epilogue. ahead: a block of weights to
// fetch into the cache.
template <class S, int BLOCKS, int PIXELS, Inputs INPUTS>
void conv_tile(const ConvPanel& a, int64_t pixel, int32_t* out, const ByteBounds<BLOCKS>& bounds, const int8_t* ahead) {
  constexpr int V = BLOCKS * kBlock / S::kLanes;
  constexpr bool kBounded = INPUTS == kBoundedInputs || INPUTS == kBoundedTwos;
  TileSums<S, BLOCKS, PIXELS> acc;
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
    const auto init = S::load(a.init + v * S::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) acc[m][v] = init;
  }
  const int64_t taps = a.taps, channels = 4 * a.quads, block_stride = taps * channels * kBlock;
  const uint8_t* weight = kBounded ? a.parts : reinterpret_cast<const uint8_t*>(a.weight);
  const uint8_t* const* rows = a.rows + pixel * taps;
  const auto next = [&](int quads) __attribute__((always_inline)) {
    weight += quads * 4 * kBlock;
    if (ahead == nullptr) return;
    for (int i = 0; i < quads; i++, ahead += 4 * kBlock) __builtin_prefetch(ahead, 0, 2);
  };
  for (int64_t tap = 0; tap < taps; tap++) {
    const uint8_t* x[PIXELS];
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) x[m] = rows[m * taps + tap];
    int64_t c = 0;
    if constexpr (INPUTS == kBoundedTwos) {
      for (; c + 8 <= channels; c += 8, next(2)) add_two_quads<S, BLOCKS, PIXELS>(acc, x, c, weight, block_stride);
    }
    constexpr Inputs kSingle = kBounded ? kBoundedInputs : INPUTS;
    for (; c < channels; c += 4, next(1)) add_quad<S, BLOCKS, PIXELS, kSingle>(acc, x, c, weight, block_stride);
  }
  if constexpr (kBounded) add_remainders<S, BLOCKS, PIXELS>(acc, a, rows);
  if constexpr (INPUTS != kSignedInputs) {
    if (out == nullptr) return store_tile<S, BLOCKS, PIXELS>(acc, a.epilogue, bounds, pixel);
  }
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) S::store(out + m * BLOCKS * kBlock + v * S::kLanes, acc[m][v]);
}

template <int BLOCKS>
using ConvTile = void (*)(const ConvPanel&, int64_t, int32_t*, const ByteBounds<BLOCKS>&, const int8_t*);

// tile[PIXELS - 1] for PIXELS up to MAX.
template <class S, int BLOCKS, int MAX, Inputs INPUTS>
struct ConvTiles {
  ConvTile<BLOCKS> tile[MAX];
  constexpr ConvTiles() : tile() { fill<MAX>(); }

 private:
  template <int PIXELS>
  constexpr void fill() {
    tile[PIXELS - 1] = conv_tile<S, BLOCKS, PIXELS, INPUTS>;
    if constexpr (PIXELS > 1) fill<PIXELS - 1>();
  }
};

// Sums of few quads: all weights stay in registers, and the products of a pixel are followed by its epilogue, which goes
// through other units of the processor. One tap, unsigned inputs. Returns how many pixels it did: the last ones may be left.
template <class S, int BLOCKS, int QUADS>
int64_t conv_few_quads(const ConvPanel& a, const ByteBounds<BLOCKS>& bounds) {
  constexpr int V = BLOCKS * kBlock / S::kLanes, kPerBlock = kBlock / S::kLanes;
  constexpr int PIXELS = V < 4 && 4 % V == 0 ? 4 / V : 1;  // that fill the vectors of bytes
  typename S::Operand w[QUADS][V];
#pragma GCC unroll 16
  for (int quad = 0; quad < QUADS; quad++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      w[quad][v] = S::weight(S::load(a.weight + ((v / kPerBlock) * QUADS + quad) * 4 * kBlock + (v % kPerBlock) * S::kBytes));
  int64_t pixel = 0;
  for (; pixel + PIXELS <= a.pixels; pixel += PIXELS) {
    typename S::Int acc[PIXELS][V];
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) {
      const uint8_t* const x = a.rows[pixel + m];
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] = S::load(a.init + v * S::kLanes);
#pragma GCC unroll 16
      for (int quad = 0; quad < QUADS; quad++) {
        const auto input = S::input(S::broadcast(x + 4 * quad));
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) acc[m][v] = S::dot(acc[m][v], input, w[quad][v]);
      }
    }
    store_tile<S, BLOCKS, PIXELS>(acc, a.epilogue, bounds, pixel);
  }
  return pixel;
}

// The same for any number of quads up to QUADS; beyond it does nothing.
template <class S, int BLOCKS, int QUADS>
int64_t conv_up_to_quads(const ConvPanel& a, const ByteBounds<BLOCKS>& bounds) {
  if constexpr (QUADS > 0) {
    if (a.quads == QUADS) return conv_few_quads<S, BLOCKS, QUADS>(a, bounds);
    return conv_up_to_quads<S, BLOCKS, QUADS - 1>(a, bounds);
  }
  return 0;
}

constexpr int kEpiloguePixels = 28;

// tile[PIXELS - 1] for PIXELS up to max.
template <int BLOCKS>
struct ChosenTiles {
  const ConvTile<BLOCKS>* tile;
  int64_t max;
};

// The fastest tiles that are exact. MAX, EXACT, TWOS: see conv_blocks.
template <class S, int BLOCKS, int MAX, int EXACT, int TWOS>
ChosenTiles<BLOCKS> choose_tiles(const ConvPanel& a) {
  static constexpr ConvTiles<S, BLOCKS, EXACT, kUnsignedInputs> unsigned_tiles;
  static constexpr ConvTiles<S, BLOCKS, EXACT, kSignedInputs> signed_tiles;
  if constexpr (S::kSaturates) {
    static constexpr ConvTiles<S, BLOCKS, MAX, kBoundedInputs> bounded_tiles;
    if constexpr (TWOS > 0) {
      static constexpr ConvTiles<S, BLOCKS, TWOS, kBoundedTwos> two_tiles;
      if (a.most != nullptr && a.quads > 1 && part_weights<S, BLOCKS, true>(a)) return {two_tiles.tile, TWOS};
    }
    if (a.most != nullptr && part_weights<S, BLOCKS, false>(a)) return {bounded_tiles.tile, MAX};
  }
  return {a.x_signed ? signed_tiles.tile : unsigned_tiles.tile, EXACT};
}

// MAX: pixels in a tile; where products of bytes saturate, EXACT of them if 16-bit pairs are taken and TWOS if two quads at a time,
// of which weights and input take more registers. FEW: quads whose weights fit in the registers.
template <class S, int BLOCKS, int MAX, int FEW = 0, int EXACT = MAX, int TWOS = 0>
void conv_blocks(const ConvPanel& panel) {
  ConvPanel a = panel;
  const auto [tiles, max] = choose_tiles<S, BLOCKS, MAX, EXACT, TWOS>(a);
  alignas(64) int32_t init[BLOCKS * kBlock];
  if constexpr (S::kSaturates) {
    if (a.least != nullptr) {
      add_least<S, BLOCKS>(a, init);
      a.init = init;
    }
  }
  const Int8Epilogue& e = a.epilogue;
  const ByteBounds<BLOCKS> bounds(e);
  // Signed inputs, which for most layers were flipped before, are not worth kernels of their own; they go through memory.
  // Nor are nonlinearities, which take longer than that way.
  const bool direct = e.shift == nullptr && !a.x_signed && e.nonlinearity == kNone &&
                      (e.out_dtype != kF32 || e.channels >= BLOCKS * kBlock);
  // A residual is read up to whole blocks of channels.
  const bool past = e.residual != nullptr && e.channels < BLOCKS * kBlock;
  const EpilogueFn finish = epilogue_of<S, BLOCKS>(e);
  // The epilogue takes several tiles at a time; their sums stay in the first-level cache.
  const int64_t at_once = kEpiloguePixels / max;
  alignas(64) int32_t acc[kEpiloguePixels * BLOCKS * kBlock];
  // Tiles of equal size, give or take one: no tile is left with a single pixel.
  const int64_t first = direct && !past && a.taps == 1 ? conv_up_to_quads<S, BLOCKS, FEW>(a, bounds) : 0;
  const int64_t pixels = a.pixels - first, count = (pixels + max - 1) / max;
  int64_t done = first, end = first;
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = end;
    end = first + pixels * (i + 1) / count;
    const bool through = direct && (!past || (a.pixels - end) * e.stride >= kBlock);
    tiles[end - begin - 1](a, begin, through ? nullptr : acc + (begin - done) * BLOCKS * kBlock, bounds,
                           i < a.next_blocks ? a.weight + (BLOCKS + i) * a.taps * a.quads * 4 * kBlock : nullptr);
    if (through) {
      done = end;
      continue;
    }
    if (i % at_once == at_once - 1 || i == count - 1) {
      finish(acc, BLOCKS * kBlock, end - done, e, done, 0);
      done = end;
    }
  }
}

template <class S>
void sum_weights(const int8_t* block, int64_t quads, int32_t* sums) {
  constexpr int V = kBlock / S::kLanes;
  typename S::Int acc[V];
  for (int v = 0; v < V; v++) acc[v] = S::set(0);
  const auto ones = S::input(S::set(0x01010101));
  for (int64_t i = 0; i < quads; i++, block += 4 * kBlock)
    for (int v = 0; v < V; v++) acc[v] = S::dot(acc[v], ones, S::weight(S::load(block + v * S::kBytes)));
  for (int v = 0; v < V; v++) S::store(sums + v * S::kLanes, acc[v]);
}

template <class S>
int64_t sum_row(const uint8_t* row, int64_t from, int64_t channels, typename S::Int flip, typename S::Int& acc) {
  const auto ones = S::weight(S::set(0x01010101));
  for (; from + S::kBytes <= channels; from += S::kBytes)
    acc = S::dot(acc, S::input(S::bit_xor(S::load(row + from), flip)), ones);
  return from;
}

template <class S>
void sum_rows(const uint8_t* const* rows, int64_t pixels, int64_t taps, int64_t channels, bool x_signed, int32_t* sums) {
  const uint8_t flip = x_signed ? 0x80 : 0;
  const auto flips = static_cast<int32_t>(flip * 0x01010101u);
  const auto flip_wide = S::set(flips), zero = S::set(0);
  const auto flip_narrow = Vec128::set(flips);
  for (int64_t p = 0; p < pixels; p++) {
    auto wide = zero;
    auto narrow = Vec128::set(0);
    int32_t sum = x_signed ? static_cast<int32_t>(-128 * taps * channels) : 0;
    for (int64_t tap = 0; tap < taps; tap++) {
      const uint8_t* row = rows[p * taps + tap];
      int64_t c = sum_row<S>(row, 0, channels, flip_wide, wide);
      c = sum_row<Vec128>(row, c, channels, flip_narrow, narrow);
      for (; c < channels; c++) sum += row[c] ^ flip;
    }
    int32_t lanes[S::kLanes + Vec128::kLanes];
    S::store(lanes, wide);
    Vec128::store(lanes + S::kLanes, narrow);
    for (const int32_t lane : lanes) sum += lane;
    sums[p] = sum;
  }
}

}  // namespace
}  // namespace cnncomp
