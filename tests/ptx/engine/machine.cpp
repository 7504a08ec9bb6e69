// The scheduler: blocks, warps, lanes; and the C interface that tests/ptx/engine.py calls.

#include "machine.h"

#include <algorithm>
#include <cstdio>

namespace ptx {

void Machine::set_special(Warp& w) {
  const int x = config.block[0], y = config.block[1];
  auto fill = [&](int32_t slot, auto value) {
    if (slot < 0) return;
    for (int i = 0; i < kLanes; ++i) w.at_slot<uint32_t>(slot)[i] = static_cast<uint32_t>(value(i));
  };
  auto thread = [&](int i) { return w.id * kLanes + i; };
  fill(special.tid[0], [&](int i) { return thread(i) % x; });
  fill(special.tid[1], [&](int i) { return thread(i) / x % y; });
  fill(special.tid[2], [&](int i) { return thread(i) / (x * y); });
  const int cta[3] = {block % config.grid[0], block / config.grid[0] % config.grid[1],
                      block / (config.grid[0] * config.grid[1])};
  for (int d = 0; d < 3; ++d) {
    fill(special.ntid[d], [&](int) { return config.block[d]; });
    fill(special.ctaid[d], [&](int) { return cta[d]; });
    fill(special.nctaid[d], [&](int) { return config.grid[d]; });
  }
  fill(special.laneid, [](int i) { return i; });
  fill(special.warpid, [&](int) { return w.id; });
  fill(special.nwarpid, [&](int) { return warps.size(); });
  fill(special.smid, [](int) { return 0; });
  fill(special.gridid, [](int) { return 1; });
  fill(special.total_smem, [&](int) { return config.shared_bytes; });
  fill(special.dynamic_smem, [&](int) { return config.shared_bytes; });
  fill(special.lanemask[0], [](int i) { return 1u << i; });
  fill(special.lanemask[1], [](int i) { return (1ull << i) - 1; });
  fill(special.lanemask[2], [](int i) { return (2ull << i) - 1; });
  fill(special.lanemask[3], [](int i) { return ~((2ull << i) - 1); });
  fill(special.lanemask[4], [](int i) { return ~((1ull << i) - 1); });
}

void Machine::start_block(int number) {
  block = number;
  threads = config.block[0] * config.block[1] * config.block[2];
  const int count = (threads + kLanes - 1) / kLanes;
  warps.resize(count);
  for (int i = 0; i < count; ++i) {
    Warp& w = warps[i];
    w.id = i;
    w.state = kReady;
    w.event = kNone;
    const int left = threads - i * kLanes;
    w.live = left >= kLanes ? kFull : (1u << left) - 1;
    w.parked = w.carry = w.fenced = 0;
    w.forced = false;
    std::fill(std::begin(w.pc), std::end(w.pc), 0);
    if (w.file.empty()) {
      w.file.resize(config.registers + 64);
      w.regs = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(w.file.data()) + 63) / 64 * 64);
    }
    std::memcpy(w.regs, initial.data(), initial.size());
    set_special(w);
    w.clock.assign(count, 0);
    w.clock[i] = 1;
    w.sync = 1;
    w.local.assign(static_cast<size_t>(config.local_bytes) * kLanes, 0);
    w.local_written.assign(w.local.size(), 0);
    for (int l = 0; l < kLanes; ++l) w.copies[l].clear(), w.groups[l] = 0;
    w.matrices.clear();
    w.bulk_reads.clear();
    w.matrix_groups = w.bulk_groups = 0;
  }
  shared.assign(config.shared_bytes, 0xcd);
  const size_t count_units = (config.shared_bytes >> unit_shift()) + 1;
  units.assign(count_units, Unit{});
  read_clocks.assign(count_units * count, 0);
  for (auto& b : barriers) b = NamedBarrier();
  mbarriers.clear();
  executed = 0;
  bytes_in_flight = loaded = 0;
  for (uint32_t by : heard_of) heard[by].clear();
  heard_of.clear();
  l1.clear();
}

void Machine::run_block(int number) {
  start_block(number);
  int idle_rounds = 0;
  while (true) {
    bool ran = false, all_done = true;
    const int64_t before = progress;
    const int64_t executed_before = executed;
    for (Warp& w : warps) {
      if (w.state == kReady) {
        running = w.id;
        run_warp(w);
        ran = true;
      }
      all_done = all_done && w.state == kDone;
    }
    if (all_done) break;
    if (!ran) {
      std::string who;
      for (const Warp& w : warps)
        if (w.state == kWaiting) who += " " + std::to_string(w.id);
      running = -1;
      fail(kDeadlock, "warps" + who + " wait at a barrier that the others never reach");
    }
    // Everyone only polls: nothing in this block can change any more.
    idle_rounds = progress == before && executed - executed_before < 64 * static_cast<int64_t>(warps.size()) ? idle_rounds + 1 : 0;
    if (idle_rounds > 100) fail(kDeadlock, "all warps poll for something that never happens");
  }
}

void Machine::finish_warp(Warp& w) {
  w.state = kDone;
  ++progress;
  for (int l = 0; l < kLanes; ++l)
    for (const AsyncCopy& c : w.copies[l]) {  // lands some time; nobody may count on it
      bytes_in_flight -= c.size;
    }
  check_barriers();
}

// Registers of a wgmma belong to it until its group has been waited for; only another wgmma may add to them.
void Machine::check_matrices(const Warp& w, const Inst& inst) const {
  if (inst.may_touch_async) return;
  for (const auto& job : w.matrices)
    for (const Operand& o : inst.ops)
      if (std::find(job.slots.begin(), job.slots.end(), o.slot) != job.slots.end())
        fail(kRace, "a register is used that a wgmma may still write");
}

void Machine::run_warp(Warp& w) {
  const int end = static_cast<int>(program.size());
  int64_t quantum = 20000;  // others get their turn even if this one polls
  while (w.state == kReady && quantum > 0) {
    uint32_t runnable = w.live & ~w.parked;
    w.forced = runnable == 0;
    if (w.forced) {
      w.parked = 0;
      runnable = w.live;
    }
    int at = end, other = end + 1;
    for (uint32_t m = runnable; m; m &= m - 1) at = std::min(at, w.pc[__builtin_ctz(m)]);
    uint32_t active = 0;
    for (uint32_t m = runnable; m; m &= m - 1) {
      const int lane = __builtin_ctz(m), pc = w.pc[lane];
      if (pc == at) active |= 1u << lane;
      else other = std::min(other, pc);
    }
    bool together = true;
    while (together) {
      if (at >= end) {
        w.live &= ~active;
        if (!w.live) finish_warp(w);
        break;
      }
      const Inst& inst = program[at];
      uint32_t mask = active;
      if (inst.predicate >= 0) mask &= w.predicate(inst.predicate) ^ (inst.negated ? kFull : 0);
      w.at = at;
      w.active = active;
      w.event = kNone;
      Counter& c = counters[at];
      if (mask) {
        ++c.warps;
        c.lanes += __builtin_popcount(mask);
        if (config.check_shared && !w.matrices.empty()) check_matrices(w, inst);
        inst.run(*this, w, inst, mask);
      }
      if (++executed > config.max_instructions) fail(kDeadlock, "the block has not ended after this many instructions: " + std::to_string(executed));
      --quantum;
      const Event event = w.event;
      if (event == kNone) {
        ++at;
      } else if (event == kBranch && w.taken == active) {
        at = w.target;
      } else {
        together = false;
        for (uint32_t m = active; m; m &= m - 1) w.pc[__builtin_ctz(m)] = event == kPark ? at : at + 1;
        if (event == kBranch)
          for (uint32_t m = w.taken; m; m &= m - 1) w.pc[__builtin_ctz(m)] = w.target;
        if (event == kPark) w.parked |= active;
        if (event == kExit) {
          w.live &= ~w.taken;
          if (!w.live) finish_warp(w);
        }
        if (event == kYield) return;
        break;
      }
      if (at >= other || quantum <= 0) {
        for (uint32_t m = active; m; m &= m - 1) w.pc[__builtin_ctz(m)] = at;
        together = false;
      }
    }
  }
}

const std::unordered_map<std::string, Handler>& handlers() {
  static const auto table = [] {
    std::unordered_map<std::string, Handler> t;
    register_alu(t);
    register_float(t);
    register_convert(t);
    register_memory(t);
    register_async(t);
    register_sync(t);
    register_warp(t);
    register_tensor(t);
    register_wgmma(t);
    return t;
  }();
  return table;
}

}  // namespace ptx

using ptx::Machine;

extern "C" {

Machine* ptx_new() { return new Machine(); }
void ptx_delete(Machine* m) { delete m; }

// 1 where the engine has the handler.
int ptx_knows(const char* handler) { return ptx::handlers().count(handler) ? 1 : 0; }

// Load a program. `names` are the handlers, each with its zero at the end; `heads` has for each instruction predicate, negated,
// may_touch_async, operands and ints; then slot, width, disp of all operands, and all ints. How many instructions were known.
int64_t ptx_program(Machine* m, int64_t count, const char* names, const int32_t* heads, const int64_t* operands, const int64_t* ints) {
  for (int64_t n = 0; n < count; ++n, heads += 5, names += std::strlen(names) + 1) {
    const auto found = ptx::handlers().find(names);
    if (found == ptx::handlers().end()) return n;
    ptx::Inst inst;
    inst.run = found->second;
    inst.predicate = heads[0];
    inst.negated = heads[1];
    inst.may_touch_async = heads[2];
    for (int i = 0; i < heads[3]; ++i, operands += 3)
      inst.ops.push_back({static_cast<int32_t>(operands[0]), static_cast<int32_t>(operands[1]), operands[2]});
    inst.ints.assign(ints, ints + heads[4]);
    ints += heads[4];
    m->program.push_back(std::move(inst));
  }
  return count;
}

void ptx_registers(Machine* m, const uint8_t* initial, int64_t bytes, const ptx::SpecialSlots* special) {
  m->initial.assign(initial, initial + bytes);
  m->special = *special;
}

void ptx_region(Machine* m, uint64_t base, uint64_t size, uint8_t* host, uint8_t* written) {
  m->regions.push_back({base, size, host, written, {}, {}});
}

// Run blocks. Returns 0, or the code of a fault with its message, instruction, block, warp and lane (-1: none).
int ptx_run(Machine* m, const ptx::Config* config, const uint8_t* parameters, const int32_t* blocks, int64_t n_blocks,
            ptx::Counter* counters, int64_t* summary, char* message, int message_size, int32_t* place) {
  m->config = *config;
  m->parameters.assign(parameters, parameters + config->parameter_bytes);
  m->counters.assign(m->program.size(), ptx::Counter{});
  std::sort(m->regions.begin(), m->regions.end(), [](const auto& a, const auto& b) { return a.base < b.base; });
  m->heard.assign(static_cast<size_t>(config->grid[0]) * config->grid[1] * config->grid[2], {});
  m->heard_of.clear();
  m->released.clear();
  m->l1.resize(config->count ? config->l1_bytes : 0);
  m->l2.resize(config->count ? config->l2_bytes : 0);
  m->warps.clear();
  m->most_in_flight = 0;
  int code = 0;
  int64_t i = 0;
  try {
    for (; i < n_blocks; ++i) m->run_block(blocks[i]);
  } catch (const ptx::Fault& fault) {
    code = fault.kind;
    std::snprintf(message, message_size, "%s", fault.message.c_str());
    place[0] = -1, place[1] = blocks[i], place[2] = -1, place[3] = fault.lane;
    for (const auto& w : m->warps)  // the one that was running when it happened
      if (w.state == ptx::kReady && w.id == m->running) place[0] = w.at, place[2] = w.id;
    if (place[0] < 0)
      for (const auto& w : m->warps)
        if (w.state == ptx::kWaiting) {
          place[0] = w.at, place[2] = w.id;
          break;
        }
  }
  std::copy(m->counters.begin(), m->counters.end(), counters);
  summary[0] = static_cast<int64_t>(m->most_in_flight);
  summary[1] = i;
  return code;
}

}  // extern "C"
