// Control flow, barriers, shuffles, votes. PTX ISA 9.7.12 (control flow), 9.7.13 (synchronisation), 9.7.9.6 (shfl).

#include <algorithm>

#include "lanes.h"

namespace ptx {

void Machine::join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Machine::arrive(Warp& w, int number, int expected, bool wait) {
  NamedBarrier& b = barriers[number];
  if (b.clock.empty()) b.clock.assign(warps.size(), 0);
  if (b.arrived && b.expected != expected) fail(kBarrier, "warps come to a barrier with different thread counts");
  b.expected = expected;
  b.arrived += kLanes;
  join(b.clock, w.clock);
  if (wait) {
    w.state = kWaiting;
    w.event = kBlock;
    b.waiting.push_back(w.id);
  } else {
    ++w.clock[w.id];
  }
  check_barriers();
}

// Let go whom nothing holds any more. Warps that have ended don't hold up a barrier of the whole block.
void Machine::check_barriers() {
  int living = 0;
  for (const Warp& w : warps) living += w.state != kDone;
  for (NamedBarrier& b : barriers) {
    const int needed = b.expected ? b.expected : living * kLanes;
    if (!b.arrived || b.arrived < needed) continue;
    if (b.arrived > needed) fail(kBarrier, "more warps come to a barrier than it expects");
    for (int id : b.waiting) {
      Warp& w = warps[id];
      join(w.clock, b.clock);
      ++w.clock[id];
      ++w.sync;
      w.state = kReady;
    }
    b = NamedBarrier();
    ++progress;
    most_in_flight = std::max(most_in_flight, loaded);
    loaded = 0;
  }
}

namespace {

void branch(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  w.event = kBranch;
  w.taken = mask;
  w.target = static_cast<int>(i.ints[0]);
}
// brx.idx: ops: the index; ints: the targets.
void branch_indexed(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint32_t> index(w, i.ops[0]);
  const uint32_t first = index[__builtin_ctz(mask)];
  uint32_t same = 0;
  for (uint32_t m = mask; m; m &= m - 1) same |= static_cast<uint32_t>(index[__builtin_ctz(m)] == first) << __builtin_ctz(m);
  if (first >= i.ints.size()) fail(kMemory, "a branch past its list of targets", __builtin_ctz(mask));
  w.event = kBranch;
  w.target = static_cast<int>(i.ints[first]);
  w.taken = same;
  if (same != w.active) {  // one target at a time: the others come back to this instruction
    for (uint32_t m = w.active & ~same; m; m &= m - 1) w.pc[__builtin_ctz(m)] = w.at;
    fail(kUnsupported, "a divergent indexed branch", __builtin_ctz(mask & ~same));
  }
}
void leave(Machine&, Warp& w, const Inst&, uint32_t mask) {
  w.event = kExit;
  w.taken = mask;
}
void trap(Machine&, Warp&, const Inst&, uint32_t mask) { fail(kTrap, "trap", __builtin_ctz(mask)); }
void pause(Machine&, Warp& w, const Inst&, uint32_t) { w.event = kYield; }

// bar.sync, bar.arrive. ops: number, threads (optional). ints: waits.
void barrier(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  if (mask != w.live) fail(kBarrier, "a barrier in a part of a warp", __builtin_ctz(w.live & ~mask));
  const uint32_t number = Source<uint32_t>(w, i.ops[0])[__builtin_ctz(mask)];
  const uint32_t expected = i.ops.size() > 1 ? Source<uint32_t>(w, i.ops[1])[__builtin_ctz(mask)] : 0;
  if (number > 15) fail(kBarrier, "barrier " + std::to_string(number) + ", there are 16");
  if (expected % kLanes) fail(kBarrier, "a barrier of " + std::to_string(expected) + " threads, which is not whole warps");
  m.arrive(w, static_cast<int>(number), static_cast<int>(expected), i.ints[0]);
}

void warp_barrier(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[0])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  if ((members & w.live) == w.live) ++w.sync;
}

// ops: d, p, a, lane or distance, clamp and segment mask, members. ints: 0 idx, 1 up, 2 down, 3 bfly.
void shuffle(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[5])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  const Source<uint32_t> a(w, i.ops[2]), b(w, i.ops[3]), c(w, i.ops[4]);
  uint32_t value[kLanes], in_range = 0;
  for (uint32_t m = mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const int bits = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    int from = i.ints[0] == 0 ? lowest | (bits & ~segment) : i.ints[0] == 1 ? l - bits : i.ints[0] == 2 ? l + bits : l ^ bits;
    const bool in = i.ints[0] == 1 ? from >= highest : from <= highest;
    if (!in) from = l;
    if (!(mask >> from & 1)) fail(kBarrier, "a shuffle from a lane that does not take part", l);
    value[l] = a[from];
    in_range |= static_cast<uint32_t>(in) << l;
  }
  Target<uint32_t> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = value[l]; });
  write_predicate(w, i.ops[1], in_range, mask);
}

// ops: d, predicate, members. ints: 0 all, 1 any, 2 uni, 3 ballot; negated.
void vote(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[2])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  const uint32_t p = (w.predicate(i.ops[1].slot) ^ (i.ints[1] ? kFull : 0)) & mask;
  if (i.ints[0] == 3) {
    Target<uint32_t> d(w, i.ops[0], mask);
    each(mask, [&](int l) { d[l] = p; });
    return;
  }
  const bool r = i.ints[0] == 0 ? p == mask : i.ints[0] == 1 ? p != 0 : p == mask || p == 0;
  write_predicate(w, i.ops[0], r ? kFull : 0, mask);
}
void active_mask(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  Target<uint32_t> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = mask; });
}
// match.any. ops: d, a, members.
template <typename T>
void match(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[2])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  const Source<T> a(w, i.ops[1]);
  uint32_t r[kLanes] = {};
  for (uint32_t x = mask; x; x &= x - 1)
    for (uint32_t y = mask; y; y &= y - 1)
      r[__builtin_ctz(x)] |= static_cast<uint32_t>(a[__builtin_ctz(x)] == a[__builtin_ctz(y)]) << __builtin_ctz(y);
  Target<uint32_t> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = r[l]; });
}
// redux.sync. ops: d, a, members. ints: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor.
template <typename T>
void reduce(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[2])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  const Source<T> a(w, i.ops[1]);
  T r = a[__builtin_ctz(mask)];
  for (uint32_t m = mask & (mask - 1); m; m &= m - 1) {
    const T x = a[__builtin_ctz(m)];
    switch (i.ints[0]) {
      case 0: r = static_cast<T>(static_cast<uint32_t>(r) + static_cast<uint32_t>(x)); break;
      case 1: r = std::min(r, x); break;
      case 2: r = std::max(r, x); break;
      case 3: r &= x; break;
      case 4: r |= x; break;
      default: r ^= x;
    }
  }
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = r; });
}
// elect.sync. ops: d, p, members.
void elect(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t members = Source<uint32_t>(w, i.ops[2])[__builtin_ctz(mask)];
  if (!together(w, mask, members)) return;
  const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(members & w.live));
  Target<uint32_t> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = leader; });
  write_predicate(w, i.ops[1], 1u << leader, mask);
}
void clock_now(Machine& m, Warp& w, const Inst& i, uint32_t mask) {
  Target<uint64_t> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = static_cast<uint64_t>(m.executed); });
}

}  // namespace

void register_sync(std::unordered_map<std::string, Handler>& t) {
  t["bra"] = branch;
  t["brx.idx"] = branch_indexed;
  t["exit"] = leave;
  t["trap"] = trap;
  t["nanosleep"] = pause;
  t["bar"] = barrier;
  t["bar.warp"] = warp_barrier;
  t["mov.clock"] = clock_now;
}
void register_warp(std::unordered_map<std::string, Handler>& t) {
  t["shfl"] = shuffle;
  t["vote"] = vote;
  t["activemask"] = active_mask;
  t["match.any.b32"] = match<uint32_t>;
  t["match.any.b64"] = match<uint64_t>;
  t["redux.u32"] = reduce<uint32_t>, t["redux.s32"] = reduce<int32_t>, t["redux.b32"] = reduce<uint32_t>;
  t["elect"] = elect;
}

}  // namespace ptx
