// mma and mma.sp. PTX ISA 9.7.14.5 (matrix fragments for mma) and 9.7.14.6 (mma.sp with its metadata).
//
// With e = 32 / bits elements in a register, lane 4 * g + t holds of the k x 8 matrix b in register i, element j:
// column g, row t * e + j + 4 * e * i. A 16-row a alternates rows g and g + 8 from register to register.

#include <algorithm>
#include <cmath>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "tensor.h"

namespace ptx {

float element_float(Element type, const uint8_t* at) {
  switch (type) {
    case kF16: {
      half h;
      std::memcpy(&h, at, 2);
      return static_cast<float>(h);
    }
    case kBF16: {
      bfloat b;
      std::memcpy(&b, at, 2);
      return to_float(b);
    }
    default: {  // tf32: the hardware does not look at the lowest 13 bits
      uint32_t u;
      std::memcpy(&u, at, 4);
      return bits_of<float>(u & ~0x1fffu);
    }
  }
}

namespace {

struct Shape {
  int m, n, k;
  Element a, b;
  bool integer, half_sums, saturate;
};

// Rows of a or columns of b as bytes: out[row * pitch + k * bytes].
void gather(Warp& w, const Operand* ops, int registers, int rows, int bytes, int pitch, uint8_t* out) {
  const int per = 4 / bytes, halves = rows / 8;
  for (int i = 0; i < registers; ++i) {
    const uint32_t* r = w.at_slot<uint32_t>(ops[i].slot);
    const int up = i % halves * 8, k0 = i / halves * 4 * per;
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(out + (lane / 4 + up) * pitch + (k0 + lane % 4 * per) * bytes, &r[lane], 4);
  }
}

// The 8-bit product, 8 rows at a time: of each word of four bytes along k the even ones and the odd ones as 16-bit integers, whose
// products are added in pairs.
using Words8 = int32_t __attribute__((vector_size(32)));
using Longs4 = int64_t __attribute__((vector_size(32)));
using Shorts16 = int16_t __attribute__((vector_size(32)));
using Unsigned16 = uint16_t __attribute__((vector_size(32)));

// Sums of neighbouring products.
Words8 add_products(Shorts16 a, Shorts16 b) {
#ifdef __AVX2__
  return reinterpret_cast<Words8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Words8 sums;
  for (int i = 0; i < 8; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

struct Bytes {  // of eight words
  Shorts16 even, odd;
  Bytes() = default;
  Bytes(Words8 words, bool is_signed) {
    if (is_signed) {
      const auto v = reinterpret_cast<Shorts16>(words);
      even = v << 8 >> 8, odd = v >> 8;
    } else {
      const auto v = reinterpret_cast<Unsigned16>(words);
      even = reinterpret_cast<Shorts16>(v & 255), odd = reinterpret_cast<Shorts16>(v >> 8);
    }
  }
};

void turn_pairs(Longs4* x) {  // four times four
  const Longs4 low = {0, 4, 2, 6}, high = {1, 5, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
  const Longs4 a = __builtin_shuffle(x[0], x[1], low), b = __builtin_shuffle(x[0], x[1], high);
  const Longs4 c = __builtin_shuffle(x[2], x[3], low), d = __builtin_shuffle(x[2], x[3], high);
  x[0] = __builtin_shuffle(a, c, left), x[1] = __builtin_shuffle(b, d, left);
  x[2] = __builtin_shuffle(a, c, right), x[3] = __builtin_shuffle(b, d, right);
}
// A register's lanes 4 * g + t to one vector over g for each t, and back.
void by_quarter(const int32_t* lanes, Words8* out) {
  Longs4 x[4];
  for (int j = 0; j < 4; ++j) {
    Words8 v;
    std::memcpy(&v, lanes + 8 * j, 32);
    x[j] = reinterpret_cast<Longs4>(__builtin_shuffle(v, Words8{0, 4, 1, 5, 2, 6, 3, 7}));
  }
  turn_pairs(x);
  std::memcpy(out, x, sizeof(x));
}
void by_lane(const Words8* quarters, int32_t* lanes) {
  Longs4 x[4];
  std::memcpy(x, quarters, sizeof(x));
  turn_pairs(x);
  for (int j = 0; j < 4; ++j) {
    const Words8 v = __builtin_shuffle(reinterpret_cast<Words8>(x[j]), Words8{0, 2, 4, 6, 1, 3, 5, 7});
    std::memcpy(lanes + 8 * j, &v, 32);
  }
}

// a: of each four elements of k, words of the rows; b: registers. Gives the lanes of each output register.
void multiply_integer(Warp& w, const Shape& s, const Words8* a, const Operand* ob, int32_t (*sums)[kLanes]) {
  const int halves = s.m / 8, depth = s.k / 4;
  Bytes rows[2 * 16];
  alignas(32) int32_t even[4][kLanes], odd[4][kLanes];  // of b, by register and lane
  for (int i = 0; i < depth * halves; ++i) rows[i] = Bytes(a[i], s.a == kS8);
  for (int i = 0; i < depth / 4; ++i)
    for (int l = 0; l < kLanes; l += 8) {
      Words8 v;
      std::memcpy(&v, w.at_slot<int32_t>(ob[i].slot) + l, 32);
      const Bytes bytes(v, s.b == kS8);
      std::memcpy(&even[i][l], &bytes.even, 32);
      std::memcpy(&odd[i][l], &bytes.odd, 32);
    }
  Words8 columns[2][2][4];  // half of the rows, parity of the column, its half
  for (int c = 0; c < 8; ++c) {
    Words8 t[2] = {};
    for (int k = 0; k < depth; ++k) {
      const Words8 e = Words8{} + even[k / 4][4 * c + k % 4], o = Words8{} + odd[k / 4][4 * c + k % 4];
      for (int h = 0; h < halves; ++h)
        t[h] += add_products(rows[k * halves + h].even, reinterpret_cast<Shorts16>(e)) +
                add_products(rows[k * halves + h].odd, reinterpret_cast<Shorts16>(o));
    }
    for (int h = 0; h < halves; ++h) columns[h][c % 2][c / 2] = t[h];
  }
  for (int r = 0; r < 2 * halves; ++r) by_lane(columns[r / 2][r % 2], sums[r]);
}

// Spread the stored elements of a sparse matrix over their places. A group of 4 has 2 elements, 2 bits of metadata each.
// In tf32 a group of 2 has one, with 4 bits: 0b0100 for the first place, 0b1110 for the second.
void expand(Warp& w, const Shape& s, const Operand& metadata, int selector, const uint8_t* stored, uint8_t* out, bool ordered) {
  const int bytes = element_bytes(s.a), kept = s.k / 2;
  const uint32_t* e = w.at_slot<uint32_t>(metadata.slot);
  std::memset(out, 0, static_cast<size_t>(s.m) * s.k * bytes);
  const int bits = bytes == 4 ? 4 : 2;           // of metadata per stored element
  const int per_row = kept * bits;               // 16, 32 or 64 bits
  for (int row = 0; row < 16; ++row) {
    const int g = row % 8, upper = row / 8;
    for (int c = 0; c < kept; ++c) {
      // Which lane of the quad holds this element's bits, and where in its register.
      const int bit = c * bits;
      int thread, shift;
      if (per_row == 16) thread = selector, shift = upper * 16 + bit;                                   // one lane a quad
      else if (bytes == 1 && per_row == 32) thread = 2 * selector + upper, shift = bit;                 // a pair, lane by row half
      else if (per_row == 32) thread = 2 * selector + bit / 16, shift = upper * 16 + bit % 16;          // a pair, lane by columns
      else thread = upper + 2 * (bit / 32), shift = bit % 32;                                           // all four
      const uint32_t index = e[4 * g + thread] >> shift & ((1u << bits) - 1);
      int column;
      if (bits == 4) {
        if (index != 0b0100 && index != 0b1110) fail(kUnsupported, "metadata of mma.sp that names no element of a pair", 4 * g + thread);
        column = 2 * c + (index == 0b1110);
      } else {
        if (ordered && c % 2) {
          const uint32_t before = e[4 * g + thread] >> (shift - 2) & 3;
          if (before >= index) fail(kUnsupported, "metadata of mma.sp that is not in order", 4 * g + thread);
        }
        column = c / 2 * 4 + static_cast<int>(index);
      }
      std::memcpy(out + (row * s.k + column) * bytes, stored + (row * kept + c) * bytes, bytes);
    }
  }
}

bool all_zero(Warp& w, const Operand* ops, int registers) {
  uint32_t any = 0;
  for (int i = 0; i < registers; ++i) {
    const uint32_t* r = w.at_slot<uint32_t>(ops[i].slot);
    for (int lane = 0; lane < kLanes; ++lane) any |= r[lane];
  }
  return any == 0;
}

// d = c + 0. Kernels that are only counted run on zeros, and most of their time would be spent on these products.
void add_zeros(Warp& w, const Shape& s, const Operand* d, const Operand* oc, int registers) {
  for (int r = 0; r < registers; ++r) {
    if (s.integer) {
      const uint32_t* c = w.at_slot<uint32_t>(oc[r].slot);
      uint32_t* out = w.at_slot<uint32_t>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) out[l] = c[l];
    } else if (s.half_sums) {
      const half* c = w.at_slot<half>(oc[r].slot);
      half* out = w.at_slot<half>(d[r].slot);
      for (int l = 0; l < 2 * kLanes; ++l) out[l] = static_cast<half>(0.0f + static_cast<float>(c[l]));
    } else {
      const float* c = w.at_slot<float>(oc[r].slot);
      float* out = w.at_slot<float>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) out[l] = 0.0f + c[l];
    }
  }
}

// ops: d, a, b, c, then metadata. ints: m, n, k, element types of a and b, kind of sums (0 s32, 1 f32, 2 f16), saturate,
// sparse, selector, ordered, registers of a, b and c.
void multiply(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  whole_warp(w, mask);
  const auto& n = i.ints;
  const Shape s = {static_cast<int>(n[0]), static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<Element>(n[3]),
                   static_cast<Element>(n[4]), n[5] == 0, n[5] == 2, n[6] != 0};
  const bool sparse = n[7];
  const int ra = static_cast<int>(n[10]), rb = static_cast<int>(n[11]), rc = static_cast<int>(n[12]);
  const Operand *d = &i.ops[0], *oa = d + rc, *ob = oa + ra, *oc = ob + rb;
  m.counter(w).tensor_ops += 2ull * s.m * s.n * s.k;
  if (!sparse && all_zero(w, oa, ra) && (s.integer || all_zero(w, ob, rb))) return add_zeros(w, s, d, oc, rc);
  const int bytes = element_bytes(s.a), kept = sparse ? s.k / 2 : s.k;
  alignas(64) uint8_t a[16 * 128], stored[16 * 64], b[8 * 128];
  if (sparse) {
    gather(w, oa, ra, s.m, bytes, kept * bytes, stored);
    expand(w, s, oc[rc], static_cast<int>(n[8]), stored, a, n[9]);
  }
  if (s.integer) {
    Words8 words[2 * 16];
    const int halves = s.m / 8;
    if (sparse) {
      for (int row = 0; row < s.m; ++row)
        for (int k = 0; k < s.k / 4; ++k) std::memcpy(reinterpret_cast<int32_t*>(&words[2 * k + row / 8]) + row % 8, a + row * s.k + 4 * k, 4);
    } else {
      for (int i = 0; i < ra; ++i) {
        Words8 quarters[4];
        by_quarter(w.at_slot<int32_t>(oa[i].slot), quarters);
        for (int q = 0; q < 4; ++q) words[(i / halves * 4 + q) * halves + i % halves] = quarters[q];
      }
    }
    int32_t sums[4][kLanes];
    multiply_integer(w, s, words, ob, sums);
    for (int r = 0; r < rc; ++r) {
      const int32_t* c = w.at_slot<int32_t>(oc[r].slot);
      int32_t* out = w.at_slot<int32_t>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) {
        int32_t x;  // wraps around where it does not saturate
        const bool over = __builtin_add_overflow(sums[r][l], c[l], &x);
        out[l] = over && s.saturate ? (c[l] < 0 ? INT32_MIN : INT32_MAX) : x;
      }
    }
    return;
  }
  if (!sparse) gather(w, oa, ra, s.m, bytes, kept * bytes, a);
  gather(w, ob, rb, 8, bytes, s.k * bytes, b);
  // The order of additions is not specified: here exact products are added in double and rounded once.
  float x[16][64], y[8][64];
  for (int r = 0; r < s.m; ++r)
    for (int k = 0; k < s.k; ++k) x[r][k] = element_float(s.a, a + (r * s.k + k) * bytes);
  for (int c = 0; c < 8; ++c)
    for (int k = 0; k < s.k; ++k) y[c][k] = element_float(s.b, b + (c * s.k + k) * bytes);
  double sums[16][8];
  for (int r = 0; r < s.m; ++r)
    for (int c = 0; c < 8; ++c) {
      double t = 0;
      for (int k = 0; k < s.k; ++k) t += static_cast<double>(x[r][k]) * y[c][k];
      sums[r][c] = t;
    }
  for (int r = 0; r < rc; ++r) {
    if (s.half_sums) {  // two neighbours in a register
      const uint32_t* c = w.at_slot<uint32_t>(oc[r].slot);
      uint32_t* out = w.at_slot<uint32_t>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) {
        half h[2];
        std::memcpy(h, &c[l], 4);
        for (int j = 0; j < 2; ++j) h[j] = static_cast<half>(sums[l / 4 + r * 8][l % 4 * 2 + j] + static_cast<double>(h[j]));
        std::memcpy(&out[l], h, 4);
      }
    } else {
      const float* c = w.at_slot<float>(oc[r].slot);
      float* out = w.at_slot<float>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) out[l] = static_cast<float>(sums[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2] + c[l]);
    }
  }
}

}  // namespace

void register_tensor(std::unordered_map<std::string, Handler>& t) { t["mma"] = multiply; }

}  // namespace ptx
