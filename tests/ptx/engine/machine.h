// The machine that runs lowered PTX: one block after the other, its warps in turn, 32 lanes of a warp together.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kFull = 0xffffffffu;

// Codes of FaultKind are those of FAULTS in tests/ptx/errors.py.
enum FaultKind { kUnsupported = 1, kMemory = 2, kRace = 3, kBarrier = 4, kDeadlock = 5, kUninitialised = 6, kTrap = 7 };

struct Fault {
  FaultKind kind;
  std::string message;
  int lane = -1;
};

[[noreturn]] inline void fail(FaultKind kind, const std::string& message, int lane = -1) { throw Fault{kind, message, lane}; }

// A register of a warp: `slot` is its byte offset in the warp's register file, `width` its bits per lane (1: a predicate, held
// as one 32-bit mask). `disp` is added to it where it is the base of an address.
struct Operand {
  int32_t slot, width;
  int64_t disp;
};

struct Machine;
struct Warp;
struct Inst;
using Handler = void (*)(Machine&, Warp&, const Inst&, uint32_t mask);

struct Inst {
  Handler run = nullptr;
  int32_t predicate = -1;  // slot
  bool negated = false;
  bool may_touch_async = false;  // a wgmma, which may use registers that another under way writes
  std::vector<Operand> ops;
  std::vector<int64_t> ints;
};

// Totals of one instruction over the run. `lanes` counts active lanes, so 32 * warps - lanes is lost to divergence.
struct Counter {
  uint64_t warps, lanes, requests, sectors, bytes, l2_sectors, dram_sectors, wavefronts, ideal, tensor_ops;
};

struct Region {
  uint64_t base, size;
  uint8_t* host;
  uint8_t* written;                   // per byte: holds data; null where all do
  std::vector<uint32_t> writer, reader;  // per byte: block number + 1, kMany, or 0
  std::vector<uint32_t> thread, clock;   // per byte: of the writer, its lane | warp << 5 | warp-level syncs << 16; its clock
};
constexpr uint32_t kMany = 0x7fffffff, kAtomic = 0x80000000;

enum Event : uint8_t { kNone, kBranch, kExit, kPark, kYield, kBlock };
enum State : uint8_t { kReady, kWaiting, kDone };

struct AsyncCopy {
  uint32_t address, size, group;
};

struct Warp {
  int id = 0;
  State state = kReady;
  Event event = kNone;
  uint32_t live = 0, parked = 0, active = 0, taken = 0, carry = 0;
  uint32_t fenced = 0;  // lanes whose atomics release
  bool forced = false;  // parked lanes run because no others can
  int at = 0, target = 0;
  int pc[kLanes] = {};
  std::vector<uint8_t> file;
  uint8_t* regs = nullptr;       // 64-byte aligned, into `file`
  std::vector<uint32_t> clock;   // vector clock over the block's warps
  uint32_t sync = 1;             // warp-level synchronisations so far
  std::vector<uint8_t> local, local_written;
  std::vector<AsyncCopy> copies[kLanes];
  uint32_t groups[kLanes] = {};  // committed cp.async groups
  // wgmma: registers and shared words in use by groups that have not been waited for
  struct Matrix {
    uint32_t group;
    std::vector<int32_t> slots;
    std::vector<std::pair<uint32_t, uint32_t>> reads;  // address, bytes
  };
  std::vector<Matrix> matrices;
  uint32_t matrix_groups = 0;
  // bulk copies out of shared memory
  std::vector<AsyncCopy> bulk_reads;
  uint32_t bulk_groups = 0;

  template <typename T>
  T* at_slot(int32_t slot) { return reinterpret_cast<T*>(regs + slot); }
  uint32_t& predicate(int32_t slot) { return *at_slot<uint32_t>(slot); }
};

// State of one unit of shared memory (a word, or a byte in kernels that access bytes) since it was last written.
struct Unit {
  uint32_t write_clock, write_sync, read_sync;
  uint16_t write_warp, read_warp;
  uint8_t write_lane, read_lane;
  uint8_t written : 1, atomic : 1;
  uint8_t async_reads;
  uint32_t pending;  // cp.async and bulk copies on their way to it
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<int> waiting;
  std::vector<uint32_t> clock;
};

struct MBarrier {
  int64_t expected = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  std::vector<uint32_t> arriving, completed;  // vector clocks
  std::vector<AsyncCopy> copies, landing;     // of this phase; of completed ones that nobody has waited for yet
};

// Writes of a warp of another block that are known: all with a clock up to `clock`; of the next one those before warp-level
// synchronisation `sync`, and in it those of `lanes`.
struct Heard {
  uint32_t clock = 0, sync = 0, lanes = 0;
  void add(const Heard& more);
};

// Set-associative cache of 32-byte sectors, least recently used out.
struct Cache {
  static constexpr int kWays = 16;
  std::vector<uint64_t> tags;
  std::vector<uint32_t> stamps;
  uint64_t sets = 0;
  uint32_t now = 0;
  void resize(uint64_t bytes);
  void clear();
  bool access(uint64_t sector);  // true: it was there
};

struct Config {
  int32_t grid[3], block[3];
  int32_t shared_bytes, local_bytes, parameter_bytes;
  int32_t check_shared, check_initialised, check_blocks, count, fine;  // fine: shadow per byte of shared memory, not per word
  int32_t registers;                                                    // bytes of a warp's register file
  int64_t max_instructions;                                             // of one block, in warps
  int64_t l1_bytes, l2_bytes;
};

struct SpecialSlots {  // slots of the special registers, -1 where the kernel does not use one
  int32_t tid[3], ntid[3], ctaid[3], nctaid[3];
  int32_t laneid, warpid, nwarpid, smid, lanemask[5], dynamic_smem, total_smem, clock, clock64, gridid;
};

struct Machine {
  std::vector<Inst> program;
  std::vector<uint8_t> initial;  // the register file at the start: constants in place
  std::vector<Counter> counters;
  Config config = {};
  SpecialSlots special = {};
  std::vector<Region> regions;
  std::vector<uint8_t> parameters;

  // of the running block
  int block = 0, threads = 0;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<Unit> units;
  std::vector<uint32_t> read_clocks;  // unit * warps + warp
  NamedBarrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
  int64_t executed = 0, progress = 0;
  uint64_t bytes_in_flight = 0, most_in_flight = 0;  // of asynchronous copies; plain loads between two barriers count too
  uint64_t loaded = 0;                               // by plain loads since the last barrier
  std::vector<std::vector<Heard>> heard;               // by block and its warp: writes that this block knows of; or none
  std::vector<uint32_t> heard_of;                      // blocks with an entry there
  std::unordered_map<uint64_t, std::map<uint32_t, std::vector<Heard>>> released;  // by address of a synchronising word
  Cache l1, l2;
  int running = -1;  // warp whose turn it is

  void run_block(int block);
  void run_warp(Warp& w);
  void check_matrices(const Warp& w, const Inst& inst) const;
  void finish_warp(Warp& w);
  void start_block(int block);
  void set_special(Warp& w);

  Counter& counter(const Warp& w) { return counters[w.at]; }
  int unit_shift() const { return config.fine ? 0 : 2; }

  // Global memory (spaces.cpp): a pointer to the bytes, after all checks.
  Region& region(uint64_t address, uint32_t size, int lane);
  uint8_t* global_read(const Warp& w, uint64_t address, uint32_t size, int lane);
  uint8_t* global_write(const Warp& w, uint64_t address, uint32_t size, int lane);
  uint8_t* global_atomic(const Warp& w, uint64_t address, uint32_t size, int lane);
  bool heard_write(const Region& r, uint64_t at, uint32_t by) const;
  bool heard_anything(uint32_t by) const { return !heard[by].empty(); }
  void acquire(uint64_t address);
  void release(const Warp& w, uint64_t address, int lane);

  // Shared memory (spaces.cpp). lane -1: the warp as a whole.
  uint8_t* shared_at(uint64_t address, uint32_t size, uint32_t align, int lane);
  void note_read(Warp& w, uint32_t address, uint32_t size, int lane);
  void note_write(Warp& w, uint32_t address, uint32_t size, int lane, bool atomic = false, bool unchanged = false);
  void note_pending(Warp& w, uint32_t address, uint32_t size, int lane);
  void note_landed(uint32_t address, uint32_t size, int warp, uint32_t clock, int lane, uint32_t sync);
  void note_async_read(Warp& w, uint32_t address, uint32_t size, int delta);

  // Counting (spaces.cpp)
  void count_global(Warp& w, const uint64_t* address, uint32_t size, uint32_t mask, bool through_l1);
  void count_shared(Warp& w, const uint32_t* address, uint32_t size, uint32_t mask);
  void count_rows(Warp& w, const uint32_t* rows);

  // Synchronisation (sync.cpp, async.cpp)
  void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);
  void arrive(Warp& w, int barrier, int expected, bool wait);
  void check_barriers();
  void complete_phase(MBarrier& b);
  void land(MBarrier& b);
};

// Windows of the generic address space.
constexpr uint64_t kSharedWindow = 1ull << 32, kLocalWindow = 2ull << 32, kParamWindow = 3ull << 32, kWindow = 1ull << 32;

void register_alu(std::unordered_map<std::string, Handler>& table);
void register_float(std::unordered_map<std::string, Handler>& table);
void register_convert(std::unordered_map<std::string, Handler>& table);
void register_memory(std::unordered_map<std::string, Handler>& table);
void register_async(std::unordered_map<std::string, Handler>& table);
void register_sync(std::unordered_map<std::string, Handler>& table);
void register_warp(std::unordered_map<std::string, Handler>& table);
void register_tensor(std::unordered_map<std::string, Handler>& table);
void register_wgmma(std::unordered_map<std::string, Handler>& table);

}  // namespace ptx
