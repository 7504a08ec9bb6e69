#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

namespace cnncomp {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using InParallel = int (*)();

GompParallel gomp_parallel = nullptr;
InParallel omp_in_parallel = nullptr;

struct Region {
  const std::function<void(int64_t)>& task;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

void work(void* data) {
  auto& region = *static_cast<Region*>(data);
  for (;;) {
    const int64_t i = region.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= region.tasks) return;
    try {
      region.task(i);
    } catch (...) {
      if (!region.failed.exchange(true)) region.error = std::current_exception();
      region.next.store(region.tasks);
    }
  }
}

}  // namespace

void set_openmp(uintptr_t parallel, uintptr_t in_parallel) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  omp_in_parallel = reinterpret_cast<InParallel>(in_parallel);
}

void parallel_for(int num_threads, int64_t tasks, const std::function<void(int64_t)>& task) {
  const auto threads = std::min<int64_t>(num_threads, tasks);
  if (threads <= 1 || gomp_parallel == nullptr || omp_in_parallel()) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  Region region{task, tasks};
  gomp_parallel(work, &region, static_cast<unsigned>(threads), 0);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace cnncomp
