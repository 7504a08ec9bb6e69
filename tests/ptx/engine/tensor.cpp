// mma and mma.sp. PTX ISA 9.7.14.5 (matrix fragments for mma) and 9.7.14.6 (mma.sp with its metadata).
//
// With e = 32 / bits elements in a register, lane 4 * g + t holds of the k x 8 matrix b in register i, element j:
// column g, row t * e + j + 4 * e * i. A 16-row a alternates rows g and g + 8 from register to register.

#include <algorithm>
#include <cmath>

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

// The 8-bit product, 16 rows at a time in float: exact, as a sum of 64 products stays below 2^24.
using Bytes64 = uint8_t __attribute__((vector_size(64)));
using Signed16 = int8_t __attribute__((vector_size(16)));
using Unsigned16 = uint8_t __attribute__((vector_size(16)));
using Floats16 = float __attribute__((vector_size(64)));

Floats16 to_floats(const uint8_t* from, bool is_signed) {
  if (is_signed) {
    Signed16 x;
    std::memcpy(&x, from, 16);
    return __builtin_convertvector(x, Floats16);
  }
  Unsigned16 x;
  std::memcpy(&x, from, 16);
  return __builtin_convertvector(x, Floats16);
}

// (rows, depth) bytes to (depth, 16): 8 x 16-byte blocks are turned by two shuffles of 128 bytes.
void transpose(const uint8_t* a, int rows, int depth, uint8_t* out) {
  static const auto kLow = [] {
    Bytes64 v;
    for (int i = 0; i < 64; ++i) v[i] = static_cast<uint8_t>(i % 8 * 16 + i / 8);
    return v;
  }();
  const Bytes64 high = kLow + static_cast<uint8_t>(8);
  for (int r = 0; r < rows; r += 8)
    for (int k = 0; k < depth; k += 16) {
      Bytes64 x[2];
      for (int i = 0; i < 8; ++i) std::memcpy(reinterpret_cast<uint8_t*>(x) + 16 * i, a + (r + i) * depth + k, 16);
      uint8_t turned[128];
      const Bytes64 first = __builtin_shuffle(x[0], x[1], kLow), second = __builtin_shuffle(x[0], x[1], high);
      std::memcpy(turned, &first, 64);
      std::memcpy(turned + 64, &second, 64);
      for (int i = 0; i < 16; ++i) std::memcpy(out + (k + i) * 16 + r, turned + 8 * i, 8);
    }
}

void multiply_integer(const Shape& s, const uint8_t* a, const uint8_t* b, int32_t (*sums)[16]) {
  alignas(64) uint8_t turned[64 * 16] = {};
  transpose(a, s.m, s.k, turned);
  Floats16 rows[64];
  for (int k = 0; k < s.k; ++k) rows[k] = to_floats(turned + 16 * k, s.a == kS8);
  for (int c = 0; c < 8; ++c) {
    alignas(64) float y[64];
    for (int k = 0; k < s.k; k += 16) {
      const Floats16 piece = to_floats(b + c * s.k + k, s.b == kS8);
      std::memcpy(y + k, &piece, 64);
    }
    Floats16 t0 = {}, t1 = {};
    for (int k = 0; k < s.k; k += 2) {
      t0 += rows[k] * y[k];
      t1 += rows[k + 1] * y[k + 1];
    }
    t0 += t1;
    for (int r = 0; r < 16; ++r) sums[c][r] = static_cast<int32_t>(t0[r]);
  }
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
  gather(w, oa, ra, s.m, bytes, kept * bytes, sparse ? stored : a);
  gather(w, ob, rb, 8, bytes, s.k * bytes, b);
  if (sparse) expand(w, s, oc[rc], static_cast<int>(n[8]), stored, a, n[9]);

  if (s.integer) {
    int32_t sums[8][16];
    multiply_integer(s, a, b, sums);
    for (int r = 0; r < rc; ++r) {
      const int32_t* c = w.at_slot<int32_t>(oc[r].slot);
      int32_t* out = w.at_slot<int32_t>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) {
        const int64_t x = static_cast<int64_t>(sums[l % 4 * 2 + r % 2][l / 4 + r / 2 * 8]) + c[l];
        out[l] = s.saturate ? static_cast<int32_t>(std::clamp<int64_t>(x, INT32_MIN, INT32_MAX)) : static_cast<int32_t>(x);
      }
    }
    return;
  }
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
