// Asynchronous copies and mbarriers. PTX ISA 9.7.9.25 (cp.async, cp.async.bulk), 9.7.13.15 (mbarrier).

#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

uint32_t shared_address(uint64_t address) {  // of the shared space or its generic window
  return static_cast<uint32_t>(address >= kSharedWindow ? address - kSharedWindow : address);
}

// ops: shared address, global address, bytes to read (optional). ints: bytes, through L1, ignore-source predicate given.
void copy(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> to(w, i.ops[0]), from(w, i.ops[1]);
  const uint32_t size = static_cast<uint32_t>(i.ints[0]);
  uint64_t source[kLanes];
  uint32_t target[kLanes], reading = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    uint32_t real = size;
    if (i.ops.size() > 2) {
      if (i.ints[2]) real = w.predicate(i.ops[2].slot) >> l & 1 ? 0 : size;
      else real = Source<uint32_t>(w, i.ops[2])[l];
    }
    if (real > size) fail(kUnsupported, "cp.async of more source bytes than it copies", l);
    target[l] = shared_address(to[l] + static_cast<uint64_t>(i.ops[0].disp));
    source[l] = from[l] + static_cast<uint64_t>(i.ops[1].disp);
    uint8_t* place = m.shared_at(target[l], size, size, l);
    m.note_pending(w, target[l], size, l);
    std::memset(place, 0, size);
    if (real) {
      reading |= 1u << l;
      if (real == size) {
        std::memcpy(place, m.global_read(w, source[l], size, l), size);
      } else {
        if (source[l] % size) fail(kMemory, "cp.async from a misaligned address", l);
        for (uint32_t k = 0; k < real; ++k) place[k] = *m.global_read(w, source[l] + k, 1, l);
      }
    }
    w.copies[l].push_back({target[l], size, w.groups[l]});
  }
  m.count_global(w, source, size, reading, i.ints[1]);
  const uint64_t read = m.counter(w).bytes;
  m.count_shared(w, target, size, mask);
  if (m.config.count) m.counter(w).bytes = read, m.counter(w).requests -= reading != 0;
}

void land(Machine& m, Warp& w, int lane, uint32_t up_to) {
  auto& all = w.copies[lane];
  size_t k = 0;
  for (; k < all.size() && static_cast<int32_t>(all[k].group - up_to) < 0; ++k)
    m.note_landed(all[k].address, all[k].size, w.id, w.clock[w.id], lane, w.sync);
  all.erase(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(k));
}
void commit(Machine&, Warp& w, const Inst&, uint32_t mask) {
  for (; mask; mask &= mask - 1) ++w.groups[__builtin_ctz(mask)];
}
// ints: groups that may stay under way; -1 for wait_all.
void wait(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    if (i.ints[0] < 0) land(m, w, l, ++w.groups[l]);
    else land(m, w, l, w.groups[l] - std::min<uint32_t>(w.groups[l], static_cast<uint32_t>(i.ints[0])));
  }
}

MBarrier& find(Machine& m, uint64_t address, int lane) {
  const uint32_t at = shared_address(address);
  m.shared_at(at, 8, 8, lane);
  const auto found = m.mbarriers.find(at);
  if (found == m.mbarriers.end()) fail(kUninitialised, "an mbarrier that was not initialised", lane);
  return found->second;
}

void settle(Machine& m, MBarrier& b, int lane) {
  if (b.pending < 0) fail(kBarrier, "more arrivals at an mbarrier than it expects", lane);
  if (b.pending == 0 && b.bytes == 0) m.complete_phase(b);
}
void arrive_at(Machine& m, Warp& w, MBarrier& b, int64_t count, int lane) {
  m.join(b.arriving, w.clock);
  ++w.clock[w.id];
  b.pending -= count;
  settle(m, b, lane);
}

void init(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> at(w, i.ops[0]);
  const Source<uint32_t> count(w, i.ops[1]);
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    const uint32_t a = shared_address(at[l] + static_cast<uint64_t>(i.ops[0].disp));
    m.shared_at(a, 8, 8, l);
    m.note_write(w, a, 8, l);
    MBarrier b;
    b.expected = b.pending = count[l];
    b.arriving.assign(m.warps.size(), 0);
    b.completed.assign(m.warps.size(), 0);
    m.mbarriers[a] = b;
  }
}
void invalidate(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> at(w, i.ops[0]);
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    find(m, at[l] + static_cast<uint64_t>(i.ops[0].disp), l);
    m.mbarriers.erase(shared_address(at[l] + static_cast<uint64_t>(i.ops[0].disp)));
  }
}
// ops: state, address, count. ints: 1 arrive, 2 expect_tx, 3 both (the count is then of bytes), 4 complete_tx.
void arrive(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> at(w, i.ops[1]);
  const Source<uint32_t> count(w, i.ops[2]);
  Target<uint64_t> state(w, i.ops[0], mask);
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const uint64_t address = at[l] + static_cast<uint64_t>(i.ops[1].disp);
    MBarrier& b = find(m, address, l);
    const Unit& u = m.units[shared_address(address) >> m.unit_shift()];
    if (m.config.check_shared && u.write_warp != w.id && u.write_clock > w.clock[u.write_warp])
      fail(kRace, "an mbarrier is used whose initialisation by another warp nothing orders before", l);
    state[l] = b.phase;
    if (i.ints[0] & 2) b.bytes += count[l];
    if (i.ints[0] == 4) {
      b.bytes -= count[l];
      settle(m, b, l);
    } else if (i.ints[0] & 1) {
      arrive_at(m, w, b, i.ints[0] == 3 ? 1 : count[l], l);
    }
    ++m.progress;
  }
}
// try_wait and test_wait. ops: predicate, address, state or parity. ints: parity, test.
void test(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> at(w, i.ops[1]), state(w, i.ops[2]);
  uint32_t passed = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    MBarrier& b = find(m, at[l] + static_cast<uint64_t>(i.ops[1].disp), l);
    // Parity p asks for the end of the phase of that parity, which is over once the current one has the other.
    const bool over = i.ints[0] ? (b.phase & 1) != (state[l] & 1) : b.phase != static_cast<uint32_t>(state[l]);
    if (!over) continue;
    passed |= 1u << l;
    m.land(b);
    m.join(w.clock, b.completed);
  }
  write_predicate(w, i.ops[0], passed, mask);
  if (passed != mask) w.event = kYield;
}
// The lanes' copies so far arrive when they land. ints: noinc.
void copies_arrive(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> at(w, i.ops[0]);
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    MBarrier& b = find(m, at[l] + static_cast<uint64_t>(i.ops[0].disp), l);
    for (AsyncCopy c : w.copies[l]) {
      const int shift = m.unit_shift();
      for (uint32_t k = c.address >> shift; k <= (c.address + c.size - 1) >> shift; ++k) m.units[k].write_clock = w.clock[w.id];
      b.copies.push_back(c);
    }
    w.copies[l].clear();
    if (!i.ints[0]) ++b.pending;
  }
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    arrive_at(m, w, find(m, at[l] + static_cast<uint64_t>(i.ops[0].disp), l), 1, l);
  }
}

// cp.async.bulk of one dimension. ops: destination, source, bytes, mbarrier (into shared memory only). ints: into shared.
void bulk(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> to(w, i.ops[0]), from(w, i.ops[1]);
  const Source<uint32_t> bytes(w, i.ops[2]);
  for (uint32_t left = mask; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const uint64_t target = to[l] + static_cast<uint64_t>(i.ops[0].disp), source = from[l] + static_cast<uint64_t>(i.ops[1].disp);
    const uint32_t size = bytes[l];
    if (size % 16 || target % 16 || source % 16) fail(kMemory, "a bulk copy whose size or address is no multiple of 16", l);
    const uint32_t inner = shared_address(i.ints[0] ? target : source);
    uint8_t* place = m.shared_at(inner, size, 16, l);
    if (i.ints[0]) {
      const Source<uint64_t> at(w, i.ops[3]);
      MBarrier& b = find(m, at[l] + static_cast<uint64_t>(i.ops[3].disp), l);
      m.note_pending(w, inner, size, l);
      for (uint32_t k = 0; k < size; k += 16) std::memcpy(place + k, m.global_read(w, source + k, 16, l), 16);
      b.copies.push_back({inner, size, 0});
      b.bytes -= size;
      m.join(b.arriving, w.clock);  // who waits for the phase knows of the copy
      ++w.clock[w.id];
      settle(m, b, l);
    } else {
      m.note_read(w, inner, size, l);
      m.note_async_read(w, inner, size, 1);
      for (uint32_t k = 0; k < size; k += 16) std::memcpy(m.global_write(w, target + k, 16, l), place + k, 16);
      w.bulk_reads.push_back({inner, size, w.bulk_groups});
    }
    for (uint32_t k = 0; k < size; k += 512) {  // as so many requests of a whole warp
      uint64_t a[kLanes];
      uint32_t some = 0;
      for (uint32_t q = 0; q < 32 && k + 16 * q < size; ++q) a[q] = (i.ints[0] ? source : target) + k + 16 * q, some |= 1u << q;
      m.count_global(w, a, 16, some, false);
    }
  }
}
void bulk_commit(Machine&, Warp& w, const Inst&, uint32_t) { ++w.bulk_groups; }
void bulk_wait(Machine& m, Warp& w, const Inst& i, uint32_t) {
  auto keep = [&](const AsyncCopy& c) { return static_cast<int64_t>(w.bulk_groups) - c.group <= i.ints[0]; };
  for (const AsyncCopy& c : w.bulk_reads)
    if (!keep(c)) m.note_async_read(w, c.address, c.size, -1);
  w.bulk_reads.erase(std::remove_if(w.bulk_reads.begin(), w.bulk_reads.end(), [&](const AsyncCopy& c) { return !keep(c); }), w.bulk_reads.end());
}

}  // namespace

void Machine::complete_phase(MBarrier& b) {
  ++b.phase;
  ++progress;
  b.pending = b.expected;
  b.completed = b.arriving;
  b.landing.insert(b.landing.end(), b.copies.begin(), b.copies.end());
  b.copies.clear();
}

// Nobody may count on a copy before somebody has seen its phase end.
void Machine::land(MBarrier& b) {
  for (const AsyncCopy& c : b.landing) {
    const Unit u = units[c.address >> unit_shift()];
    note_landed(c.address, c.size, u.write_warp, u.write_clock, u.write_lane, 0);  // 0: not against lanes of the warp
  }
  b.landing.clear();
}

void register_async(std::unordered_map<std::string, Handler>& t) {
  t["cp.async"] = copy;
  t["cp.async.commit"] = commit;
  t["cp.async.wait"] = wait;
  t["cp.async.arrive"] = copies_arrive;
  t["cp.async.bulk"] = bulk;
  t["cp.async.bulk.commit"] = bulk_commit;
  t["cp.async.bulk.wait"] = bulk_wait;
  t["mbarrier.init"] = init;
  t["mbarrier.inval"] = invalidate;
  t["mbarrier.arrive"] = arrive;
  t["mbarrier.test"] = test;
}

}  // namespace ptx
