// CUTLASS's implicit-GEMM convolution, NHWC: n h w c k r s pad stride dilation x weight bias out
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
// after the kernel's
#include "cutlass/conv/device/implicit_gemm_convolution.h"
#include "epilogue.cuh"

using Layout = cutlass::layout::TensorNHWC;
using Conv = typename cutlass::conv::kernel::DefaultConv2dFprop<
    ELEMENT, Layout, ELEMENT, Layout, OUTPUT, Layout, ACCUMULATOR, cutlass::arch::OpClassTensorOp, peer::Arch, peer::Tile,
    peer::Warp, peer::Instruction, peer::Epilogue, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, STAGES,
    cutlass::arch::OPERATION, cutlass::conv::IteratorAlgorithm::ITERATOR, cutlass::conv::StrideSupport::kStrided, ALIGNMENT,
    ALIGNMENT>::Kernel;

int main(int argc, char** argv) {
  if (argc < 15) return 2;
  int v[10];
  for (int i = 0; i < 10; ++i) v[i] = std::atoi(argv[i + 1]);
  auto [n, h, w, c, k, r, s, pad, stride, dilation] = v;
  int p = (h + 2 * pad - dilation * (r - 1) - 1) / stride + 1;
  int q = (w + 2 * pad - dilation * (s - 1) - 1) / stride + 1;
  cutlass::conv::Conv2dProblemSize problem({n, h, w, c}, {k, r, s, c}, {pad, pad, pad, pad}, {stride, stride},
                                           {dilation, dilation}, {n, p, q, k}, cutlass::conv::Mode::kCrossCorrelation, 1);
  auto x = reinterpret_cast<ELEMENT*>(peer::address(argv[11])), weight = reinterpret_cast<ELEMENT*>(peer::address(argv[12]));
  auto bias = reinterpret_cast<OUTPUT*>(peer::address(argv[13])), out = reinterpret_cast<OUTPUT*>(peer::address(argv[14]));
  auto packed = Layout::packed({n, p, q, k});
  typename cutlass::conv::device::ImplicitGemmConvolution<Conv>::Arguments arguments(
      problem, {x, Layout::packed({n, h, w, c})}, {weight, Layout::packed({k, r, s, c})},
      {bias, RELU ? Layout(Layout::Stride(0)) : packed}, {out, packed}, {ALPHA});
  typename Conv::Params params(arguments, nullptr);
  return peer::hand_over<Conv>(params, typename Conv::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape), argc);
}
