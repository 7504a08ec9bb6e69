// wgmma.mma_async, dense and sparse. PTX ISA 9.7.15: each of the four warps of a warpgroup computes 16 rows of the 64 x n result;
// here each when its turn comes. The result is there at once, but its registers and the shared memory read are guarded
// until the group has been waited for.

#include <algorithm>

#include "tensor.h"

namespace ptx {
namespace {

// The matrix descriptor of 9.7.15.5.1.
struct Matrix {
  uint32_t start, leading, stride;
  int swizzle;  // bytes of a swizzled row: 16 (none), 32, 64, 128
  bool k_major;

  Matrix(uint64_t d, bool k_major) : k_major(k_major) {
    start = static_cast<uint32_t>(d & 0x3fff) << 4;
    leading = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4;
    stride = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
    static constexpr int kBytes[] = {16, 128, 64, 32};
    swizzle = kBytes[d >> 62];
    if (d >> 49 & 7) fail(kUnsupported, "a matrix descriptor with a base offset");
  }
  // Byte address of element (i along m or n, k), elements of `bytes`.
  uint32_t at(int i, int k, int bytes) const {
    uint32_t a;
    if (k_major) {
      const int offset = k * bytes;
      a = start + static_cast<uint32_t>(i / 8) * stride + static_cast<uint32_t>(i % 8) * swizzle + static_cast<uint32_t>(offset / swizzle) * leading + offset % swizzle;
    } else {
      const int width = swizzle / bytes;
      const uint32_t along = static_cast<uint32_t>(i / width), down = static_cast<uint32_t>(k / 8);
      const bool none = swizzle == 16;  // then the two strides change places
      a = start + along * (none ? stride : leading) + down * (none ? leading : stride) + static_cast<uint32_t>(k % 8) * swizzle + static_cast<uint32_t>(i % width) * bytes;
    }
    const uint32_t mask = static_cast<uint32_t>(swizzle / 16 - 1);
    return a ^ (a >> 7 & mask) << 4;
  }
};

using Reads = std::vector<std::pair<uint32_t, uint32_t>>;

void fetch(Machine& m, Warp& w, const Matrix& x, int first, int rows, int depth, int bytes, uint8_t* out, Reads& reads) {
  const auto note = [&](uint32_t a) {
    m.note_read(w, a, 16, -1);
    if (m.config.check_shared) reads.push_back({a, 16});
  };
  if (x.k_major) {  // 16 bytes of a row lie together, whatever the swizzle
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < depth; k += 16 / bytes) {
        const uint32_t a = x.at(first + r, k, bytes);
        std::memcpy(out + (r * depth + k) * bytes, m.shared_at(a, 16, 16, -1), 16);
        note(a);
      }
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < depth; ++k) {
      const uint32_t a = x.at(first + r, k, bytes);
      std::memcpy(out + (r * depth + k) * bytes, m.shared_at(a, static_cast<uint32_t>(bytes), static_cast<uint32_t>(bytes), -1), bytes);
      if (a % 16 == 0) note(a);
    }
}

bool all_zero(const std::vector<uint8_t>& bytes) {
  uint8_t any = 0;
  for (uint8_t b : bytes) any |= b;
  return any == 0;
}

// ops: d, then descriptors or registers of a, descriptor of b, scale of d (predicate), metadata (sparse).
// ints: n, k, type of a, of b, kind of sums (0 s32, 1 f32, 2 f16), saturate, scale of a, of b, a transposed, b transposed, registers
// of d, of a (0: a descriptor), sparse, selector.
void multiply(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  whole_warp(w, mask);
  const auto& n = i.ints;
  const int columns = static_cast<int>(n[0]), k = static_cast<int>(n[1]), rd = static_cast<int>(n[10]), ra = static_cast<int>(n[11]);
  const Element ta = static_cast<Element>(n[2]), tb = static_cast<Element>(n[3]);
  const bool sparse = n[12];
  const int bytes = element_bytes(ta), kept = sparse ? k / 2 : k;
  Warp::Matrix job = {w.matrix_groups, {}, {}};
  const int first = w.id % 4 * 16;
  std::vector<uint8_t> a(16 * static_cast<size_t>(k) * bytes), stored(16 * static_cast<size_t>(kept) * bytes), b(static_cast<size_t>(columns) * k * bytes);
  const Operand* next = &i.ops[rd];
  if (ra) {
    const int per = 4 / bytes;
    for (int r = 0; r < ra; ++r, ++next) {
      const uint32_t* x = w.at_slot<uint32_t>(next->slot);
      for (int l = 0; l < kLanes; ++l)
        std::memcpy(&stored[((l / 4 + r % 2 * 8) * kept + r / 2 * 4 * per + l % 4 * per) * bytes], &x[l], 4);
    }
  } else {
    fetch(m, w, Matrix(w.at_slot<uint64_t>(next->slot)[0], !n[8]), first, 16, kept, bytes, stored.data(), job.reads);
    ++next;
  }
  fetch(m, w, Matrix(w.at_slot<uint64_t>(next->slot)[0], !n[9]), 0, columns, k, bytes, b.data(), job.reads);
  ++next;
  const bool add = w.predicate(next->slot) & 1;
  ++next;
  if (sparse) {
    // Metadata of a warp's 16 rows as of mma.sp of the same depth: a pair of lanes for 16 bits, all four for 8.
    const uint32_t* e = w.at_slot<uint32_t>(next->slot);
    for (int row = 0; row < 16; ++row)
      for (int c = 0; c < kept; ++c) {
        const int g = row % 8, upper = row / 8, bit = 2 * c;
        const int thread = bytes == 1 ? upper + 2 * (bit / 32) : 2 * static_cast<int>(n[13]) + bit / 16;
        const int shift = bytes == 1 ? bit % 32 : upper * 16 + bit % 16;
        const int column = c / 2 * 4 + static_cast<int>(e[4 * g + thread] >> shift & 3);
        std::memcpy(&a[(row * k + column) * bytes], &stored[(row * kept + c) * bytes], bytes);
      }
  } else {
    a = stored;
  }
  m.counter(w).tensor_ops += 2ull * 16 * columns * k;

  const double scale = static_cast<double>(n[6] * n[7]);
  std::vector<double> sums(16 * static_cast<size_t>(columns));
  // Kernels that are only counted run on zeros, and most of their time would be spent on these products.
  if (scale < 0 || !all_zero(a) || !all_zero(b)) {
    auto element = [&](Element t, const uint8_t* at) -> double {
      return t == kS8 ? static_cast<int8_t>(*at) : t == kU8 ? *at : element_float(t, at);
    };
    std::vector<float> x(16 * static_cast<size_t>(k)), y(static_cast<size_t>(columns) * k);
    for (size_t q = 0; q < x.size(); ++q) x[q] = static_cast<float>(element(ta, &a[q * bytes]));
    for (size_t q = 0; q < y.size(); ++q) y[q] = static_cast<float>(element(tb, &b[q * bytes]));
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < columns; ++c) {
        double t = 0;
        for (int q = 0; q < k; ++q) t += static_cast<double>(x[r * k + q]) * y[c * k + q];
        sums[r * columns + c] = scale * t;
      }
  }
  const bool halves = n[4] == 2;
  for (int r = 0; r < rd; ++r) {
    const int32_t slot = i.ops[r].slot;
    job.slots.push_back(slot);
    const int row0 = (halves ? r : r / 2) % 2 * 8, column0 = r / (halves ? 2 : 4) * 8;
    for (int l = 0; l < kLanes; ++l) {
      auto sum = [&](int j) { return sums[(l / 4 + row0) * columns + column0 + l % 4 * 2 + j]; };
      if (n[4] == 0) {
        int32_t& d = w.at_slot<int32_t>(slot)[l];
        const int64_t t = static_cast<int64_t>(sum(r % 2)) + (add ? d : 0);
        d = n[5] ? static_cast<int32_t>(std::clamp<int64_t>(t, INT32_MIN, INT32_MAX)) : static_cast<int32_t>(t);
      } else if (!halves) {
        float& d = w.at_slot<float>(slot)[l];
        d = static_cast<float>(sum(r % 2) + (add ? d : 0.0));
      } else {
        half h[2];
        std::memcpy(h, &w.at_slot<uint32_t>(slot)[l], 4);
        for (int j = 0; j < 2; ++j) h[j] = static_cast<half>(sum(j) + (add ? static_cast<double>(h[j]) : 0.0));
        std::memcpy(&w.at_slot<uint32_t>(slot)[l], h, 4);
      }
    }
  }
  std::sort(job.reads.begin(), job.reads.end());
  job.reads.erase(std::unique(job.reads.begin(), job.reads.end()), job.reads.end());
  for (const auto& [at, size] : job.reads) m.note_async_read(w, at, size, 1);
  w.matrices.push_back(std::move(job));
}

void commit(Machine&, Warp& w, const Inst&, uint32_t mask) {
  whole_warp(w, mask);
  ++w.matrix_groups;
}
void wait(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  whole_warp(w, mask);
  size_t done = 0;
  for (; done < w.matrices.size() && static_cast<int64_t>(w.matrix_groups) - w.matrices[done].group > i.ints[0]; ++done)
    if (m.config.check_shared)
      for (const auto& [at, size] : w.matrices[done].reads) m.note_async_read(w, at, size, -1);
  w.matrices.erase(w.matrices.begin(), w.matrices.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

void register_wgmma(std::unordered_map<std::string, Handler>& t) {
  t["wgmma"] = multiply;
  t["wgmma.commit"] = commit;
  t["wgmma.wait"] = wait;
}

}  // namespace ptx
