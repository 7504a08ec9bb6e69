// int8 convolution of NHWC images as an implicit GEMM on tensor cores: pixels x (r * s * c) times channels x (r * s * c).
// Groups are in the grid's third dimension.

#include "cuda/loader.cuh"
#include "cuda/plan.h"

namespace cnncomp::cuda {
namespace {

constexpr int kTaps = 64, kBytes = 1;  // kPiece of TapLoader and of the loaders byte by byte
constexpr int kMostTaps = 28;          // of TapLoader

template <typename Tile, int kPiece>
struct Loaders {
  using A = ConvLoader<Tile, kPiece>;
  using B = RowLoader<Tile, Tile::kRowsB, kPiece>;
};
template <typename Tile>
struct Loaders<Tile, kTaps> {
  using A = TapLoader<Tile>;
  using B = RowLoader<Tile, Tile::kRowsB>;
};
template <typename Tile>
struct Loaders<Tile, kBytes> {
  using A = ConvByteLoader<Tile>;
  using B = RowByteLoader<Tile, Tile::kRowsB>;
};

}  // namespace

// kPiece: bytes of one tap that are copied at once; kTaps: slices are of one tap each.
template <typename Tile, int kPiece, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kTogether) conv2d_int8_kernel(const ConvParams p) {
  Accumulators<Tile> acc = {};
  const Work work = Work::of_block<Tile>(p.schedule, p.reduction);
  using LoaderA = typename Loaders<Tile, kPiece>::A;
  using LoaderB = typename Loaders<Tile, kPiece>::B;
  LoaderPair<Tile, LoaderA, LoaderB> loader{
      LoaderA(p, work),
      LoaderB(p.weight, p.reduction, work.slice, [&](int row) { return weight_row<Tile>(work, row, p.k_group); })};
  main_loop<Tile, kSigned>(acc, loader, work.slices);
  if (join_parts<Tile>(acc, p.schedule, work)) store_tile<Tile>(acc, p.epilogue, work, p.n * p.p * p.q);
}

namespace {

template <typename Tile, int kPiece>
Launch plan_tile(const Conv2d& conv, const Choice& choice) {
  const int32_t k_group = conv.k / conv.groups;
  Launch launch;
  launch.kernel = "conv2d_int8_" + Tile::name() + "_" + std::to_string(kPiece) + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_int8_kernel<Tile, kPiece, true>)
                                  : reinterpret_cast<const void*>(&conv2d_int8_kernel<Tile, kPiece, false>);
  const Schedule schedule = set_grid<Tile>(launch, problem_of(conv), choice, conv.workspace);
  launch.set_params(conv_params(conv, epilogue_params(conv, k_group, Tile::kVec), schedule));
  return launch;
}

template <typename Tiles, int kPiece>
Launch plan(const Conv2d& conv, int multiprocessors) {
  return with_tile<Tiles>(conv, problem_of(conv), multiprocessors, [&](auto tile, const Choice& choice) {
    return plan_tile<typename decltype(tile)::type, kPiece>(conv, choice);
  });
}

// Bytes that can be copied at once: channels, addresses and so all places are multiples of them.
int piece_of(const Conv2d& conv) {
  const int32_t c_group = conv.c / conv.groups;
  for (int piece : {16, 8, 4})
    if (c_group % piece == 0 && aligned(conv.x, piece) && aligned(conv.weight, piece))
      return piece == 16 && c_group % 64 == 0 && conv.r * conv.s <= kMostTaps ? kTaps : piece;
  return kBytes;
}

}  // namespace

Launch plan_conv2d_int8(const Conv2d& conv, int multiprocessors) {
  if (conv.c == conv.groups && conv.groups > 1)
    return depthwise3x3_fits(conv) ? plan_depthwise3x3_int8(conv, multiprocessors) : plan_depthwise_int8(conv);
  const int piece = piece_of(conv);
  if (piece >= 16 && conv.pointwise()) return plan_gemm_int8(conv, multiprocessors);
  switch (piece) {
    case kTaps: return plan<AllTiles, kTaps>(conv, multiprocessors);
    case 16: return plan<FewTiles, 16>(conv, multiprocessors);
    case 8: return plan<OneTile, 8>(conv, multiprocessors);
    case 4: return plan<OneTile, 4>(conv, multiprocessors);
    default:
      return conv2d_runs_fits(conv) ? plan_conv2d_runs_int8(conv, multiprocessors) : plan<OneTile, kBytes>(conv, multiprocessors);
  }
}

}  // namespace cnncomp::cuda
