// Types that the compiler's command line chooses (see bench/cutlass_kernels.py), and how a launch is handed over.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/epilogue/thread/linear_combination_clamp.h"
#include "cutlass/epilogue/thread/linear_combination_relu.h"

namespace peer {

using Tile = cutlass::gemm::GemmShape<TILE>;
using Warp = cutlass::gemm::GemmShape<WARP>;
using Instruction = cutlass::gemm::GemmShape<INSTRUCTION>;
using Arch = cutlass::arch::ARCH;

#if RELU  // one scale, a bias per channel that is read as a matrix whose rows are all the same, ReLU
constexpr auto kScale = cutlass::epilogue::thread::ScaleType::NoBetaScaling;
using Epilogue = cutlass::epilogue::thread::LinearCombinationRelu<OUTPUT, VECTOR, ACCUMULATOR, float, kScale>;
#else  // alpha times the sums, as the CUTLASS profiler's kernels with beta 0
using Compute = ACCUMULATOR;
using Epilogue = cutlass::epilogue::thread::LinearCombination<OUTPUT, VECTOR, ACCUMULATOR, Compute>;
#endif

inline unsigned long long address(const char* text) { return std::strtoull(text, nullptr, 10); }

// The launch: sizes as text on stderr, the kernel's only parameter as bytes on stdout.
template <typename Kernel>
int hand_over(typename Kernel::Params const& params, dim3 grid, int argc) {
  std::fprintf(stderr, "%u %u %u %d %zu\n", grid.x, grid.y, grid.z, int(Kernel::kThreadCount),
               sizeof(typename Kernel::SharedStorage));
  std::fwrite(&params, sizeof(params), 1, stdout);
  if (argc > 99) cutlass::Kernel<Kernel><<<grid, Kernel::kThreadCount>>>(params);  // never: it makes the compiler emit the kernel
  return 0;
}

}  // namespace peer
