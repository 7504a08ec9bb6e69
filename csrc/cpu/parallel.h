// Work sharing on torch's own OpenMP pool.
#pragma once

#include <cstdint>
#include <functional>

namespace cnncomp {

// Addresses of GOMP_parallel, omp_in_parallel and omp_get_thread_num in the OpenMP runtime that torch has loaded. Until this
// is called, and where there is no such runtime, everything runs on the calling thread.
void set_openmp(uintptr_t gomp_parallel, uintptr_t omp_in_parallel, uintptr_t omp_get_thread_num);

// Calls task(i) for each i in [0, tasks), on up to num_threads threads. Each thread has an equal range of the tasks, the same
// one in each call, so that what it wrote for one layer is in its cache for the next; when it is through, it takes from the
// others'. Inside a parallel region all runs on the calling thread. The first exception of a task is thrown again here.
void parallel_for(int num_threads, int64_t tasks, const std::function<void(int64_t)>& task);

}  // namespace cnncomp
