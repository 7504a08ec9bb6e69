// Loads, stores, atomics, matrix loads and stores. PTX ISA 9.7.9 (data movement), 9.7.13 (atom, red), 9.7.14 (ldmatrix).

#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace ptx {
namespace {

enum Space { kGlobal, kShared, kLocal, kParam, kGeneric, kConstant };

struct Place {
  Space space;
  uint64_t address;  // within the space
};

Place place_of(int64_t space, uint64_t address) {
  if (space != kGeneric) return {static_cast<Space>(space), address};
  if (address >= kSharedWindow && address < kSharedWindow + kWindow) return {kShared, address - kSharedWindow};
  if (address >= kLocalWindow && address < kLocalWindow + kWindow) return {kLocal, address - kLocalWindow};
  if (address >= kParamWindow && address < kParamWindow + kWindow) return {kParam, address - kParamWindow};
  return {kGlobal, address};
}

uint8_t* local_at(Machine& m, Warp& w, uint64_t address, uint32_t size, int lane, bool write) {
  const uint64_t bytes = m.config.local_bytes;
  if (address > bytes || address + size > bytes || address % size)
    fail(kMemory, "local access of " + std::to_string(size) + " bytes out of bounds or misaligned, at byte " + std::to_string(address) + " of " + std::to_string(bytes), lane);
  const size_t at = bytes * lane + address;
  for (uint32_t k = 0; k < size; ++k) {
    if (write) w.local_written[at + k] = 1;
    else if (!w.local_written[at + k] && m.config.check_initialised) fail(kUninitialised, "local memory is read that nothing was written to", lane);
  }
  return w.local.data() + at;
}

void addresses(Warp& w, const Operand& o, uint64_t* out) {
  const Source<uint64_t> base(w, o);
  for (int l = 0; l < kLanes; ++l) out[l] = base[l] + static_cast<uint64_t>(o.disp);
}

enum LoadFlag { kCached = 1, kAcquire = 2 };  // kCached: through L1

template <typename T>
void put(Warp& w, const Operand& o, uint32_t mask, const uint8_t (*raw)[64], int k) {
  Target<T> d(w, o, mask);
  each(mask, [&](int l) { std::memcpy(&d[l], raw[l] + k * sizeof(T), sizeof(T)); });
}
void put_any(Warp& w, const Operand& o, uint32_t mask, const uint8_t (*raw)[64], int k, int64_t bytes, bool sign) {
  if (bytes == 1) sign ? put<int8_t>(w, o, mask, raw, k) : put<uint8_t>(w, o, mask, raw, k);
  else if (bytes == 2) sign ? put<int16_t>(w, o, mask, raw, k) : put<uint16_t>(w, o, mask, raw, k);
  else if (bytes == 4) sign ? put<int32_t>(w, o, mask, raw, k) : put<uint32_t>(w, o, mask, raw, k);
  else put<uint64_t>(w, o, mask, raw, k);
}
void get_any(Warp& w, const Operand& o, uint32_t mask, uint8_t (*raw)[64], int k, int64_t bytes) {
  auto copy = [&](auto zero) {
    using T = decltype(zero);
    const Source<T> s(w, o);
    each(mask, [&](int l) { std::memcpy(raw[l] + k * sizeof(T), &s.data[l], sizeof(T)); });
  };
  if (bytes == 1) copy(uint8_t{});
  else if (bytes == 2) copy(uint16_t{});
  else if (bytes == 4) copy(uint32_t{});
  else copy(uint64_t{});
}

// Counts the lanes of an access by the space that they turned out to be in.
struct Tally {
  uint64_t global[kLanes];
  uint32_t shared[kLanes], global_mask = 0, shared_mask = 0;
  void add(const Place& p, int lane) {
    if (p.space == kGlobal) global[lane] = p.address, global_mask |= 1u << lane;
    if (p.space == kShared) shared[lane] = static_cast<uint32_t>(p.address), shared_mask |= 1u << lane;
  }
  void count(Machine& m, Warp& w, uint32_t size, bool l1) const {
    m.count_global(w, global, size, global_mask, l1);
    m.count_shared(w, shared, size, shared_mask);
  }
};

// ops: the destinations, then the address. ints: space, bytes of an element, signed, flags.
void load(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const int n = static_cast<int>(i.ops.size()) - 1;
  const int64_t bytes = i.ints[1];
  const uint32_t size = static_cast<uint32_t>(bytes * n);
  uint64_t at[kLanes];
  uint8_t raw[kLanes][64];
  addresses(w, i.ops[n], at);
  Tally tally;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const Place p = place_of(i.ints[0], at[l]);
    tally.add(p, l);
    const uint8_t* from = nullptr;
    if (p.space == kGlobal || p.space == kConstant) {
      if (i.ints[3] & kAcquire) {
        m.acquire(p.address);
        from = m.region(p.address, size, l).host + (p.address - m.region(p.address, size, l).base);
      } else {
        from = m.global_read(w, p.address, size, l);
      }
    } else if (p.space == kShared) {
      from = m.shared_at(p.address, size, size, l);
      m.note_read(w, static_cast<uint32_t>(p.address), size, l);
    } else if (p.space == kLocal) {
      from = local_at(m, w, p.address, size, l, false);
    } else {
      if (p.address + size > m.parameters.size()) fail(kMemory, "parameter out of bounds", l);
      from = m.parameters.data() + p.address;
    }
    std::memcpy(raw[l], from, size);
  }
  tally.count(m, w, size, i.ints[3] & kCached);
  m.loaded += static_cast<uint64_t>(size) * __builtin_popcount(tally.global_mask);
  for (int k = 0; k < n; ++k) put_any(w, i.ops[k], mask, raw, k, bytes, i.ints[2]);
}

// Lanes of one instruction that store different values to one shared byte: which of them stays is not defined.
void check_lanes(Machine& m, const Tally& tally, const uint8_t (*raw)[64], uint32_t size) {
  if (!m.config.check_shared) return;
  for (uint32_t a = tally.shared_mask; a; a &= a - 1) {
    const int x = __builtin_ctz(a);
    for (uint32_t b = a & (a - 1); b; b &= b - 1) {
      const int y = __builtin_ctz(b);
      if (tally.shared[x] == tally.shared[y] && std::memcmp(raw[x], raw[y], size))
        fail(kRace, "two lanes of an instruction store different values at one shared address", y);
    }
  }
}

// ops: the address, then the values. ints: space, bytes of an element, flags.
void store(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const int n = static_cast<int>(i.ops.size()) - 1;
  const int64_t bytes = i.ints[1];
  const uint32_t size = static_cast<uint32_t>(bytes * n);
  uint64_t at[kLanes];
  uint8_t raw[kLanes][64];
  addresses(w, i.ops[0], at);
  for (int k = 0; k < n; ++k) get_any(w, i.ops[k + 1], mask, raw, k, bytes);
  Tally tally;
  uint32_t shared_lane[kLanes], unchanged = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const Place p = place_of(i.ints[0], at[l]);
    tally.add(p, l);
    if (p.space == kGlobal) {
      if (i.ints[2] & kAcquire) {  // st.release, st.relaxed: as an atomic exchange
        std::memcpy(m.global_atomic(w, p.address, size, l), raw[l], size);
        m.release(w, p.address, l);
      } else {
        std::memcpy(m.global_write(w, p.address, size, l), raw[l], size);
      }
    } else if (p.space == kShared) {
      uint8_t* const to = m.shared_at(p.address, size, size, l);
      if (std::memcmp(to, raw[l], size) == 0) unchanged |= 1u << l;
      std::memcpy(to, raw[l], size);
      shared_lane[l] = static_cast<uint32_t>(p.address);
    } else if (p.space == kLocal) {
      std::memcpy(local_at(m, w, p.address, size, l, true), raw[l], size);
    } else {
      fail(kUnsupported, "store to parameters", l);
    }
  }
  check_lanes(m, tally, raw, size);
  for (uint32_t left = tally.shared_mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    bool repeated = false;  // equal values at one address, checked above
    for (uint32_t b = tally.shared_mask & ((1u << l) - 1); b; b &= b - 1) repeated = repeated || shared_lane[__builtin_ctz(b)] == shared_lane[l];
    if (!repeated) m.note_write(w, shared_lane[l], size, l, false, unchanged >> l & 1);
  }
  tally.count(m, w, size, false);
}

enum AtomicOp { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <typename T>
T combine(AtomicOp op, T old, T a, T b) {
  switch (op) {
    case kAdd:
      if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(a));
      else return old + a;
    case kMin: return std::min(old, a);
    case kMax: return std::max(old, a);
    case kExch: return a;
    case kCas: return old == a ? b : old;
    case kInc: return old >= a ? 0 : old + 1;
    case kDec: return old == 0 || old > a ? a : old - 1;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) return op == kAnd ? old & a : op == kOr ? old | a : old ^ a;
  return old;
}
// Two halves of a word.
template <typename T>
uint32_t combine_pair(uint32_t old, uint32_t a) {
  auto one = [](uint32_t x, uint32_t y) {
    if constexpr (std::is_same_v<T, half>)
      return bits_of<uint16_t>(static_cast<half>(static_cast<float>(bits_of<half>(static_cast<uint16_t>(x))) + static_cast<float>(bits_of<half>(static_cast<uint16_t>(y)))));
    else return to_bfloat(to_float({static_cast<uint16_t>(x)}) + to_float({static_cast<uint16_t>(y)})).bits;
  };
  return static_cast<uint32_t>(one(old >> 16, a >> 16)) << 16 | one(old & 0xffff, a & 0xffff);
}

// ops: destination, address, value, compared value's replacement. ints: space, op, has a result, 1 f16x2 or 2 bf16x2, releases.
template <typename T>
void atomic(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  uint64_t at[kLanes];
  addresses(w, i.ops[1], at);
  const Source<T> a(w, i.ops[2]), b(w, i.ops[i.ops.size() > 3 ? 3 : 2]);
  Target<T> d(w, i.ops[0], mask);
  Tally tally;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const Place p = place_of(i.ints[0], at[l]);
    tally.add(p, l);
    T* cell;
    if (p.space == kShared) {
      cell = reinterpret_cast<T*>(m.shared_at(p.address, sizeof(T), sizeof(T), l));
      if (m.config.check_initialised && !m.units[p.address >> m.unit_shift()].written)
        fail(kUninitialised, "an atomic on shared memory that nothing was written to", l);
      m.note_write(w, static_cast<uint32_t>(p.address), sizeof(T), l, true);
    } else if (p.space == kGlobal) {
      m.acquire(p.address);
      cell = reinterpret_cast<T*>(m.global_atomic(w, p.address, sizeof(T), l));
      if (w.fenced >> l & 1 || i.ints[4]) m.release(w, p.address, l);
    } else {
      fail(kUnsupported, "an atomic on this space", l);
    }
    T old, result;
    std::memcpy(&old, cell, sizeof(T));
    if constexpr (std::is_same_v<T, uint32_t>) {
      result = i.ints[3] == 1 ? combine_pair<half>(old, a[l]) : i.ints[3] == 2 ? combine_pair<bfloat>(old, a[l]) : combine<T>(static_cast<AtomicOp>(i.ints[1]), old, a[l], b[l]);
    } else {
      result = combine<T>(static_cast<AtomicOp>(i.ints[1]), old, a[l], b[l]);
    }
    std::memcpy(cell, &result, sizeof(T));
    if (i.ints[2]) d[l] = old;
  }
  tally.count(m, w, sizeof(T), false);
}

// Matrices of 8 rows of 16 bytes; lanes 8 * k and on address matrix k. ints: transposed, matrices.
void load_matrix(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  whole_warp(w, mask);
  const int count = static_cast<int>(i.ints[1]);
  uint64_t at[kLanes];
  addresses(w, i.ops[count], at);
  for (int k = 0; k < count; ++k) {
    const uint8_t* rows[8];
    uint32_t row_at[8];
    for (int r = 0; r < 8; ++r) {
      const Place p = place_of(i.ints[2], at[8 * k + r]);
      if (p.space != kShared) fail(kMemory, "a matrix row outside of shared memory", 8 * k + r);
      rows[r] = m.shared_at(p.address, 16, 16, 8 * k + r);
      row_at[r] = static_cast<uint32_t>(p.address);
      m.note_read(w, row_at[r], 16, -1);
    }
    m.count_rows(w, row_at);
    Target<uint32_t> d(w, i.ops[k], mask);
    for (int l = 0; l < kLanes; ++l) {
      if (!i.ints[0]) {
        std::memcpy(&d[l], rows[l / 4] + l % 4 * 4, 4);
      } else {  // lane l gets elements 2 * (l % 4) and the next of column l / 4
        uint16_t low, high;
        std::memcpy(&low, rows[l % 4 * 2] + l / 4 * 2, 2);
        std::memcpy(&high, rows[l % 4 * 2 + 1] + l / 4 * 2, 2);
        d[l] = static_cast<uint32_t>(high) << 16 | low;
      }
    }
  }
}
// ops: address, then the matrices.
void store_matrix(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  whole_warp(w, mask);
  const int count = static_cast<int>(i.ints[1]);
  uint64_t at[kLanes];
  addresses(w, i.ops[0], at);
  for (int k = 0; k < count; ++k) {
    const Source<uint32_t> s(w, i.ops[k + 1]);
    uint8_t* rows[8];
    uint32_t row_at[8];
    for (int r = 0; r < 8; ++r) {
      const Place p = place_of(i.ints[2], at[8 * k + r]);
      if (p.space != kShared) fail(kMemory, "a matrix row outside of shared memory", 8 * k + r);
      rows[r] = m.shared_at(p.address, 16, 16, 8 * k + r);
      row_at[r] = static_cast<uint32_t>(p.address);
      m.note_write(w, row_at[r], 16, 8 * k + r);
    }
    m.count_rows(w, row_at);
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t x = s[l];
      if (!i.ints[0]) {
        std::memcpy(rows[l / 4] + l % 4 * 4, &x, 4);
      } else {
        const uint16_t low = static_cast<uint16_t>(x), high = static_cast<uint16_t>(x >> 16);
        std::memcpy(rows[l % 4 * 2] + l / 4 * 2, &low, 2);
        std::memcpy(rows[l % 4 * 2 + 1] + l / 4 * 2, &high, 2);
      }
    }
  }
}

void unsupported(Machine&, Warp&, const Inst&, uint32_t) { fail(kUnsupported, ""); }
void nothing(Machine&, Warp&, const Inst&, uint32_t) {}
void fence(Machine&, Warp& w, const Inst&, uint32_t mask) { w.fenced |= mask; }

}  // namespace

void register_memory(std::unordered_map<std::string, Handler>& t) {
  t["ld"] = load;
  t["st"] = store;
  t["atom.u32"] = atomic<uint32_t>, t["atom.s32"] = atomic<int32_t>, t["atom.b32"] = atomic<uint32_t>;
  t["atom.u64"] = atomic<uint64_t>, t["atom.s64"] = atomic<int64_t>, t["atom.b64"] = atomic<uint64_t>;
  t["atom.f32"] = atomic<float>, t["atom.f64"] = atomic<double>, t["atom.b16"] = atomic<uint16_t>;
  t["atom.f16x2"] = t["atom.bf16x2"] = atomic<uint32_t>;
  t["ldmatrix"] = load_matrix;
  t["stmatrix"] = store_matrix;
  t["unsupported"] = unsupported;
  t["nothing"] = nothing;
  t["fence"] = fence;
}

}  // namespace ptx
