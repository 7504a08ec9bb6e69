// Work sharing on torch's own OpenMP pool.
#pragma once

#include <cstdint>
#include <functional>

namespace cnncomp {

// Addresses of GOMP_parallel and omp_in_parallel in the OpenMP runtime that torch has loaded. Until this is called, and
// where there is no such runtime, everything runs on the calling thread.
void set_openmp(uintptr_t gomp_parallel, uintptr_t omp_in_parallel);

// Calls task(i) for each i in [0, tasks), on up to num_threads threads. Tasks are handed out in order, one at a time.
// Inside a parallel region it runs on the calling thread. The first exception of a task is thrown again here.
void parallel_for(int num_threads, int64_t tasks, const std::function<void(int64_t)>& task);

}  // namespace cnncomp
