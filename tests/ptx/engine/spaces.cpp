// The checks on every access to global and shared memory, and what is counted of it.

#include <algorithm>

#include "lanes.h"

namespace ptx {

// ---- global memory

Region& Machine::region(uint64_t address, uint32_t size, int lane) {
  auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                [](uint64_t a, const Region& r) { return a < r.base; });
  const bool found = after != regions.begin() && address + size <= std::prev(after)->base + std::prev(after)->size;
  if (!found) {
    std::string text = "global access of " + std::to_string(size) + " bytes out of bounds";
    if (after != regions.begin()) {
      const Region& r = *std::prev(after);
      text += ", at byte " + std::to_string(address - r.base) + " of an allocation of " + std::to_string(r.size);
    }
    fail(kMemory, text, lane);
  }
  if (address % size) fail(kMemory, "global access of " + std::to_string(size) + " bytes at a misaligned address", lane);
  Region& r = *std::prev(after);
  if (config.check_blocks && r.writer.empty())
    r.writer.resize(r.size), r.reader.resize(r.size), r.thread.resize(r.size), r.clock.resize(r.size);
  return r;
}

namespace {

// Whether another thread of the block wrote a byte, and nothing orders this lane's access after that.
bool other_thread(const Region& r, uint64_t at, const Warp& w, int lane) {
  const uint32_t by = r.thread[at], warp = by >> 5 & 31;
  if (static_cast<int>(warp) != w.id) return r.clock[at] > w.clock[warp];
  return static_cast<int>(by & 31) != lane && by >> 16 == (w.sync & 0xffff);
}
uint32_t thread_of(const Warp& w, int lane) {
  return static_cast<uint32_t>(lane) | static_cast<uint32_t>(w.id) << 5 | w.sync << 16;
}

}  // namespace

uint8_t* Machine::global_read(const Warp& w, uint64_t address, uint32_t size, int lane) {
  Region& r = region(address, size, lane);
  const uint64_t at = address - r.base;
  if (r.written)
    for (uint32_t k = 0; k < size; ++k)
      if (!r.written[at + k]) fail(kUninitialised, "global memory is read that nothing was written to, byte " + std::to_string(at + k), lane);
  if (config.check_blocks) {
    const uint32_t me = static_cast<uint32_t>(block) + 1;
    for (uint32_t k = 0; k < size; ++k) {
      const uint32_t by = r.writer[at + k] & ~kAtomic;
      if (by && by != me && !heard_write(r, at + k, by - 1))
        fail(kRace, "block " + std::to_string(block) + " reads what block " + std::to_string(by - 1) + " writes, and nothing orders them", lane);
      if (r.writer[at + k] == me && other_thread(r, at + k, w, lane))
        fail(kRace, "global memory is read that another thread of the block writes, and nothing orders them", lane);
      uint32_t& reader = r.reader[at + k];
      reader = reader == 0 || reader == me ? me : kMany;
    }
  }
  return r.host + at;
}

uint8_t* Machine::global_write(const Warp& w, uint64_t address, uint32_t size, int lane) {
  Region& r = region(address, size, lane);
  const uint64_t at = address - r.base;
  if (r.written) std::memset(r.written + at, 1, size);
  if (config.check_blocks) {
    const uint32_t me = static_cast<uint32_t>(block) + 1;
    for (uint32_t k = 0; k < size; ++k) {
      const uint32_t by = r.writer[at + k] & ~kAtomic, reader = r.reader[at + k];
      if (by && by != me && !heard_write(r, at + k, by - 1))
        fail(kRace, "blocks " + std::to_string(by - 1) + " and " + std::to_string(block) + " write one byte, and nothing orders them", lane);
      if (reader && reader != me && (reader == kMany || !heard_anything(reader - 1)))
        fail(kRace, "block " + std::to_string(block) + " writes what another block reads, and nothing orders them", lane);
      if (r.writer[at + k] == me && other_thread(r, at + k, w, lane))
        fail(kRace, "two threads of a block write one byte, and nothing orders them", lane);
      r.writer[at + k] = me;
      r.thread[at + k] = thread_of(w, lane);
      r.clock[at + k] = w.clock[w.id];
    }
  }
  ++progress;
  return r.host + at;
}

// Atomics may meet; with a plain access of another block they race like any other. Of the blocks whose atomics meet, one that the
// last doesn't know of is remembered: the last is the one that will read, having counted itself so.
uint8_t* Machine::global_atomic(const Warp& w, uint64_t address, uint32_t size, int lane) {
  Region& r = region(address, size, lane);
  const uint64_t at = address - r.base;
  if (r.written)
    for (uint32_t k = 0; k < size; ++k)
      if (!r.written[at + k]) fail(kUninitialised, "an atomic on global memory that nothing was written to", lane);
  if (config.check_blocks) {
    const uint32_t me = static_cast<uint32_t>(block) + 1;
    for (uint32_t k = 0; k < size; ++k) {
      const uint32_t writer = r.writer[at + k], by = writer & ~kAtomic, reader = r.reader[at + k];
      const bool plain = by && !(writer & kAtomic) && by != me && !heard_write(r, at + k, by - 1);
      const bool read = reader && reader != me && (reader == kMany || !heard_anything(reader - 1));
      if (plain || read) fail(kRace, "an atomic meets a plain access of another block, and nothing orders them", lane);
      if (by && by != me && !heard_write(r, at + k, by - 1)) continue;
      r.writer[at + k] = me | kAtomic;
      r.thread[at + k] = thread_of(w, lane);
      r.clock[at + k] = w.clock[w.id];
    }
  }
  ++progress;
  return r.host + at;
}

void Heard::add(const Heard& more) {
  if (more.clock > clock || (more.clock == clock && more.sync > sync)) *this = more;
  else if (more.clock == clock && more.sync == sync) lanes |= more.lanes;
}

// Whether this block knows of the last write to a byte, by another.
bool Machine::heard_write(const Region& r, uint64_t at, uint32_t by) const {
  if (heard[by].empty()) return false;
  const uint32_t thread = r.thread[at], sync = thread >> 16;
  const Heard& h = heard[by][thread >> 5 & 31];
  if (r.clock[at] <= h.clock) return true;
  return r.clock[at] == h.clock + 1 && (sync < h.sync || (sync == h.sync && h.lanes >> (thread & 31) & 1));
}

// What was released with a word is known to the blocks that acquire the word later.
void Machine::acquire(uint64_t address) {
  const auto found = released.find(address);
  if (found == released.end()) return;
  for (const auto& [by, warps_of] : found->second) {
    if (heard[by].empty()) {
      heard[by].resize(warps_of.size());
      heard_of.push_back(by);
    }
    for (size_t i = 0; i < warps_of.size(); ++i) heard[by][i].add(warps_of[i]);
  }
}

// A thread publishes what it wrote itself, what barriers put before that of its block's other threads, and what the block
// knows of others.
void Machine::release(const Warp& w, uint64_t address, int lane) {
  if (!config.check_blocks) return;
  auto& known = released[address];
  for (uint32_t by : heard_of) {
    auto& theirs = known[by];
    theirs.resize(warps.size());
    for (size_t i = 0; i < warps.size(); ++i) theirs[i].add(heard[by][i]);
  }
  auto& own = known[static_cast<uint32_t>(block)];
  own.resize(warps.size());
  for (size_t i = 0; i < warps.size(); ++i)
    own[i].add(static_cast<int>(i) == w.id ? Heard{w.clock[i] - 1, w.sync & 0xffff, 1u << lane} : Heard{w.clock[i], 0, 0});
}

// ---- shared memory

uint8_t* Machine::shared_at(uint64_t address, uint32_t size, uint32_t align, int lane) {
  if (address + size > static_cast<uint64_t>(config.shared_bytes) || address > static_cast<uint64_t>(config.shared_bytes))
    fail(kMemory, "shared access of " + std::to_string(size) + " bytes out of bounds, at byte " + std::to_string(address) + " of " + std::to_string(config.shared_bytes), lane);
  if (address % align) fail(kMemory, "shared access of " + std::to_string(size) + " bytes at a misaligned address", lane);
  return shared.data() + address;
}

namespace {

std::string other(const Unit& u, const Warp& w) {
  return u.write_warp == w.id ? "lane " + std::to_string(u.write_lane) + " of the same warp" : "warp " + std::to_string(u.write_warp);
}

// Whether the last write to a unit is not ordered before an access by a lane of w (-1: the whole warp).
bool write_unordered(const Unit& u, const Warp& w, int lane) {
  if (u.write_clock == 0) return false;
  if (u.write_warp != w.id) return u.write_clock > w.clock[u.write_warp];
  return lane != u.write_lane && u.write_sync == w.sync;
}

}  // namespace

void Machine::note_read(Warp& w, uint32_t address, uint32_t size, int lane) {
  if (!config.check_shared && !config.check_initialised) return;
  const int shift = unit_shift();
  const size_t count = warps.size();
  for (uint32_t k = address >> shift; k <= (address + size - 1) >> shift; ++k) {
    Unit& u = units[k];
    if (config.check_initialised && !u.written)
      fail(kUninitialised, "shared memory is read that nothing was written to, byte " + std::to_string(k << shift), lane);
    if (!config.check_shared) continue;
    if (u.pending) fail(kRace, "shared memory is read that an asynchronous copy is still on its way to", lane);
    if (write_unordered(u, w, lane)) fail(kRace, "shared memory is read that " + other(u, w) + " wrote, with no synchronisation between", lane);
    read_clocks[k * count + w.id] = w.clock[w.id];
    if (lane >= 0) {
      const bool again = u.read_warp == w.id && u.read_sync == w.sync && u.read_lane != lane;
      u.read_lane = again ? 255 : static_cast<uint8_t>(lane);
      u.read_warp = static_cast<uint16_t>(w.id);
      u.read_sync = w.sync;
    }
  }
}

// `unchanged`: the bytes are there already. Two warps may write one value, as Triton's do where both hold it; whoever reads must
// come after the first.
void Machine::note_write(Warp& w, uint32_t address, uint32_t size, int lane, bool atomic, bool unchanged) {
  ++progress;
  if (!config.check_shared && !config.check_initialised) return;
  const int shift = unit_shift();
  const size_t count = warps.size();
  for (uint32_t k = address >> shift; k <= (address + size - 1) >> shift; ++k) {
    Unit& u = units[k];
    if (config.check_shared) {
      if (u.pending) fail(kRace, "shared memory is written that an asynchronous copy is still on its way to", lane);
      if (u.async_reads) fail(kRace, "shared memory is overwritten that an asynchronous operation may still read", lane);
      const bool unordered = !(atomic && u.atomic) && write_unordered(u, w, lane);
      if (unordered && unchanged && u.written && u.write_warp != w.id) continue;
      if (unordered)
        fail(kRace, "shared memory is written that " + other(u, w) + " wrote, with no synchronisation between", lane);
      const uint32_t* reads = &read_clocks[k * count];
      if (!(atomic && u.atomic))
        for (size_t r = 0; r < count; ++r)
          if (reads[r] > w.clock[r] && static_cast<int>(r) != w.id)
            fail(kRace, "shared memory is overwritten that warp " + std::to_string(r) + " read, with no synchronisation between", lane);
      if (lane >= 0 && !atomic && u.read_warp == w.id && u.read_sync == w.sync && u.read_lane != lane)
        fail(kRace, "shared memory is overwritten that another lane of the warp read, with no synchronisation between", lane);
    }
    u.written = 1;
    u.atomic = atomic;
    u.write_clock = w.clock[w.id];
    u.write_warp = static_cast<uint16_t>(w.id);
    u.write_lane = static_cast<uint8_t>(lane < 0 ? 255 : lane);
    u.write_sync = w.sync;
  }
}

// An asynchronous copy by a lane sets out.
void Machine::note_pending(Warp& w, uint32_t address, uint32_t size, int lane) {
  note_write(w, address, size, lane);
  const int shift = unit_shift();
  for (uint32_t k = address >> shift; config.check_shared && k <= (address + size - 1) >> shift; ++k) ++units[k].pending;
  bytes_in_flight += size;
  most_in_flight = std::max(most_in_flight, bytes_in_flight);
}

void Machine::note_landed(uint32_t address, uint32_t size, int warp, uint32_t clock, int lane, uint32_t sync) {
  bytes_in_flight -= size;
  if (!config.check_shared) return;
  const int shift = unit_shift();
  for (uint32_t k = address >> shift; k <= (address + size - 1) >> shift; ++k) {
    Unit& u = units[k];
    if (u.pending) --u.pending;
    u.write_clock = clock;
    u.write_warp = static_cast<uint16_t>(warp);
    u.write_lane = static_cast<uint8_t>(lane);
    u.write_sync = sync;
  }
}

// A wgmma or bulk store begins (+1) or ends (-1) to read.
void Machine::note_async_read(Warp& w, uint32_t address, uint32_t size, int delta) {
  const int shift = unit_shift();
  const size_t count = warps.size();
  for (uint32_t k = address >> shift; k <= (address + size - 1) >> shift; ++k) {
    units[k].async_reads = static_cast<uint8_t>(units[k].async_reads + delta);
    if (delta < 0) read_clocks[k * count + w.id] = w.clock[w.id];  // done with it now: others need to hear of that
  }
}

// ---- caches

void Cache::resize(uint64_t bytes) {
  sets = bytes / (32 * kWays);
  tags.assign(sets * kWays, ~0ull);
  stamps.assign(sets * kWays, 0);
  now = 0;
}
void Cache::clear() { std::fill(tags.begin(), tags.end(), ~0ull); }
bool Cache::access(uint64_t sector) {
  if (!sets) return false;
  const uint64_t set = (sector ^ sector >> 13) % sets;
  uint64_t* tag = &tags[set * kWays];
  uint32_t* stamp = &stamps[set * kWays];
  int oldest = 0;
  ++now;
  for (int i = 0; i < kWays; ++i) {
    if (tag[i] == sector) {
      stamp[i] = now;
      return true;
    }
    if (tag[i] == ~0ull) {
      oldest = i;
      break;
    }
    if (stamp[i] < stamp[oldest]) oldest = i;
  }
  tag[oldest] = sector;
  stamp[oldest] = now;
  return false;
}

// ---- counting

// One request of a warp: the different 32-byte sectors that it touches.
void Machine::count_global(Warp& w, const uint64_t* address, uint32_t size, uint32_t mask, bool through_l1) {
  if (!config.count || !mask) return;
  uint64_t sectors[2 * kLanes];
  int n = 0;
  for (uint32_t m = mask; m; m &= m - 1) {
    const uint64_t a = address[__builtin_ctz(m)];
    for (uint64_t s = a >> 5; s <= (a + size - 1) >> 5; ++s) {
      int k = n - 1;
      while (k >= 0 && sectors[k] != s) --k;
      if (k < 0) sectors[n++] = s;
    }
  }
  Counter& c = counter(w);
  ++c.requests;
  c.sectors += n;
  c.bytes += static_cast<uint64_t>(size) * __builtin_popcount(mask);
  for (int k = 0; k < n; ++k) {
    if (through_l1 && l1.access(sectors[k])) continue;
    ++c.l2_sectors;
    if (!l2.access(sectors[k])) ++c.dram_sectors;
  }
}

// Passes over the 32 banks: 128 bytes of a warp go together, a bank gives one word a pass.
void Machine::count_shared(Warp& w, const uint32_t* address, uint32_t size, uint32_t mask) {
  if (!config.count || !mask) return;
  const uint32_t words = std::max(1u, size / 4), lanes = kLanes / words;
  Counter& c = counter(w);
  ++c.requests;
  c.bytes += static_cast<uint64_t>(size) * __builtin_popcount(mask);
  for (uint32_t first = 0; first < kLanes; first += lanes) {
    uint32_t seen[kLanes][kLanes];
    uint8_t used[kLanes] = {};
    int most = 0;
    for (uint32_t l = first; l < first + lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      for (uint32_t k = 0; k < words; ++k) {
        const uint32_t word = address[l] / 4 + k, bank = word % 32;
        int i = used[bank] - 1;
        while (i >= 0 && seen[bank][i] != word) --i;
        if (i < 0) {
          seen[bank][used[bank]++] = word;
          most = std::max<int>(most, used[bank]);
        }
      }
    }
    c.wavefronts += most;
    c.ideal += most > 0;
  }
}

// An 8 x 16-byte matrix is one pass unless different rows fall into the same banks.
void Machine::count_rows(Warp& w, const uint32_t* rows) {
  if (!config.count) return;
  Counter& c = counter(w);
  uint8_t used[8] = {};
  for (int i = 0; i < 8; ++i) {
    bool repeated = false;
    for (int k = 0; k < i; ++k) repeated = repeated || rows[k] == rows[i];
    if (!repeated) ++used[rows[i] / 16 % 8];
  }
  c.wavefronts += *std::max_element(used, used + 8);
  c.ideal += 1;
  c.bytes += 128;
}

}  // namespace ptx
