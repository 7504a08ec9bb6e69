// int8 GEMM on tensor cores: out(m, k) = epilogue(x(m, c) * weight(k, c)^T). For linear layers and 1 x 1 convolutions
// whose channels are a multiple of 16.

#include "cuda/loader.cuh"
#include "cuda/plan.h"

namespace cnncomp::cuda {

struct GemmParams {
  EpilogueParams epilogue;
  Schedule schedule;
  const int8_t* x;
  const int8_t* weight;
  int32_t m, c;
};

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kTogether) gemm_int8_kernel(const GemmParams p) {
  Accumulators<Tile> acc = {};
  const Work work = Work::of_block<Tile>(p.schedule, p.c);
  using LoaderA = RowLoader<Tile, Tile::kRowsA>;
  using LoaderB = RowLoader<Tile, Tile::kRowsB>;
  LoaderPair<Tile, LoaderA, LoaderB> loader{
      LoaderA(p.x, p.c, work.slice, [&](int row) { return work.m0 + row < p.m ? work.m0 + row : -1; }),
      LoaderB(p.weight, p.c, work.slice, [&](int row) { return weight_row<Tile>(work, row, p.epilogue.limit); })};
  main_loop<Tile, kSigned>(acc, loader, work.slices);
  if (join_parts<Tile>(acc, p.schedule, work)) store_tile<Tile>(acc, p.epilogue, work, p.m);
}

namespace {

template <typename Tile>
Launch plan_tile(const Conv2d& conv, const Choice& choice) {
  const Problem problem = problem_of(conv);
  Launch launch;
  launch.kernel = "gemm_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&gemm_int8_kernel<Tile, true>)
                                  : reinterpret_cast<const void*>(&gemm_int8_kernel<Tile, false>);
  const Schedule schedule = set_grid<Tile>(launch, problem, choice, conv.workspace);
  launch.set_params(GemmParams{epilogue_params(conv, conv.k, Tile::kVec), schedule, static_cast<const int8_t*>(conv.x),
                               conv.weight, static_cast<int32_t>(problem.m), conv.c});
  return launch;
}

}  // namespace

Launch plan_gemm_int8(const Conv2d& conv, int multiprocessors) {
  return with_tile<AllTiles>(conv, problem_of(conv), multiprocessors, [&](auto tile, const Choice& choice) {
    return plan_tile<typename decltype(tile)::type>(conv, choice);
  });
}

}  // namespace cnncomp::cuda
