// CUTLASS's GEMM, dense or with a 2:4 sparse left side: m n k a b bias out metadata. Row-major times column-major.
#include "cutlass/gemm/device/gemm.h"
#include "cutlass/gemm/device/gemm_sparse.h"
#include "epilogue.cuh"

using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

#if SPARSE
using Gemm = cutlass::gemm::device::SparseGemm<ELEMENT, Row, ELEMENT, Column, OUTPUT, Row, ACCUMULATOR,
                                               cutlass::arch::OpClassTensorOp, peer::Arch, peer::Tile, peer::Warp,
                                               peer::Instruction, peer::Epilogue, Swizzle, STAGES, ALIGNMENT, ALIGNMENT, false,
                                               cutlass::arch::OPERATION>;
#else
using Gemm = cutlass::gemm::device::Gemm<ELEMENT, Row, ELEMENT, Column, OUTPUT, Row, ACCUMULATOR,
                                         cutlass::arch::OpClassTensorOp, peer::Arch, peer::Tile, peer::Warp,
                                         peer::Instruction, peer::Epilogue, Swizzle, STAGES, ALIGNMENT, ALIGNMENT, false,
                                         cutlass::arch::OPERATION>;
#endif

int main(int argc, char** argv) {
  if (argc < 9) return 2;
  int m = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  auto a = reinterpret_cast<ELEMENT*>(peer::address(argv[4])), b = reinterpret_cast<ELEMENT*>(peer::address(argv[5]));
  auto bias = reinterpret_cast<OUTPUT*>(peer::address(argv[6])), out = reinterpret_cast<OUTPUT*>(peer::address(argv[7]));
  cutlass::gemm::GemmCoord problem(m, n, k);
  Swizzle swizzle;
  auto grid = swizzle.get_tiled_shape(problem, {peer::Tile::kM, peer::Tile::kN, peer::Tile::kK}, 1);
  using Kernel = typename Gemm::GemmKernel;
#if SPARSE
  using Meta = typename Gemm::ElementE;
  auto metadata = reinterpret_cast<Meta*>(peer::address(argv[8]));
  using MetaLayout = typename Gemm::LayoutE;
  typename Kernel::Params params{problem, grid, {a, k / Gemm::kSparse}, {b, k}, {bias, RELU ? 0 : n}, {out, n},
                                 {metadata, MetaLayout::packed({m, k / Gemm::kSparse / Gemm::kElementsPerElementE})},
                                 {ALPHA}, nullptr};
#else
  typename Kernel::Params params{problem, grid, {a, k}, {b, k}, {bias, RELU ? 0 : n}, {out, n}, {ALPHA}, nullptr};
#endif
  return peer::hand_over<Kernel>(params, swizzle.get_grid_shape(grid), argc);
}
