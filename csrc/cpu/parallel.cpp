#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

namespace cnncomp {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Query = int (*)();

GompParallel gomp_parallel = nullptr;
Query omp_in_parallel = nullptr, omp_get_thread_num = nullptr;

// Tasks [next, end). Threads that count in different ranges should not share a cache line.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Region {
  static constexpr int64_t kMaxRanges = 64;  // more threads share them
  const std::function<void(int64_t)>& task;
  const int64_t count;
  Range ranges[kMaxRanges];
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  Region(const std::function<void(int64_t)>& task, int64_t tasks, int64_t threads)
      : task(task), count(std::min(threads, kMaxRanges)) {
    for (int64_t i = 0; i < count; i++) {
      ranges[i].next = tasks * i / count;
      ranges[i].end = tasks * (i + 1) / count;
    }
  }
  void run(Range& range) {
    for (;;) {
      const int64_t i = range.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= range.end || failed.load(std::memory_order_relaxed)) return;
      try {
        task(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

void work(void* data) {
  auto& region = *static_cast<Region*>(data);
  const int64_t own = omp_get_thread_num();
  for (int64_t i = 0; i < region.count; i++) region.run(region.ranges[(own + i) % region.count]);
}

}  // namespace

void set_openmp(uintptr_t parallel, uintptr_t in_parallel, uintptr_t get_thread_num) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  omp_in_parallel = reinterpret_cast<Query>(in_parallel);
  omp_get_thread_num = reinterpret_cast<Query>(get_thread_num);
}

void parallel_for(int num_threads, int64_t tasks, const std::function<void(int64_t)>& task) {
  const auto threads = std::min<int64_t>(num_threads, tasks);
  if (threads <= 1 || gomp_parallel == nullptr || omp_in_parallel()) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  Region region(task, tasks, threads);
  gomp_parallel(work, &region, static_cast<unsigned>(threads), 0);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace cnncomp
