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

template <bool kSignedA, bool kSignedB, int kDepth>
void multiply_integer(const uint8_t* a, const uint8_t* b, int rows, int64_t* sums) {
  alignas(64) int16_t x[16][kDepth], y[8][kDepth];
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < kDepth; ++k) x[r][k] = kSignedA ? static_cast<int8_t>(a[r * kDepth + k]) : a[r * kDepth + k];
  for (int c = 0; c < 8; ++c)
    for (int k = 0; k < kDepth; ++k) y[c][k] = kSignedB ? static_cast<int8_t>(b[c * kDepth + k]) : b[c * kDepth + k];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 8; ++c) {
      int32_t s = 0;
      for (int k = 0; k < kDepth; ++k) s += static_cast<int32_t>(x[r][k]) * y[c][k];
      sums[r * 8 + c] = s;
    }
}
template <int kDepth>
void multiply_signs(const Shape& s, const uint8_t* a, const uint8_t* b, int64_t* sums) {
  const bool sa = s.a == kS8, sb = s.b == kS8;
  if (sa && sb) multiply_integer<true, true, kDepth>(a, b, s.m, sums);
  else if (sa) multiply_integer<true, false, kDepth>(a, b, s.m, sums);
  else if (sb) multiply_integer<false, true, kDepth>(a, b, s.m, sums);
  else multiply_integer<false, false, kDepth>(a, b, s.m, sums);
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
  const int bytes = element_bytes(s.a), kept = sparse ? s.k / 2 : s.k;
  alignas(64) uint8_t a[16 * 128], stored[16 * 64], b[8 * 128];
  gather(w, oa, ra, s.m, bytes, kept * bytes, sparse ? stored : a);
  gather(w, ob, rb, 8, bytes, s.k * bytes, b);
  if (sparse) expand(w, s, oc[rc], static_cast<int>(n[8]), stored, a, n[9]);
  m.counter(w).tensor_ops += 2ull * s.m * s.n * s.k;

  if (s.integer) {
    int64_t sums[16 * 8];
    if (s.k == 16) multiply_signs<16>(s, a, b, sums);
    else if (s.k == 32) multiply_signs<32>(s, a, b, sums);
    else multiply_signs<64>(s, a, b, sums);
    for (int r = 0; r < rc; ++r) {
      const int32_t* c = w.at_slot<int32_t>(oc[r].slot);
      int32_t* out = w.at_slot<int32_t>(d[r].slot);
      for (int l = 0; l < kLanes; ++l) {
        const int64_t x = sums[(l / 4 + r / 2 * 8) * 8 + l % 4 * 2 + r % 2] + c[l];
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
