// int8 convolution of images of few channels, the first layer of a network as a rule, as an implicit GEMM: what a row of the
// kernel meets in a row of the image is one run of s * c bytes, from any address on. In the reduction each run is whole chunks
// of 16 bytes. Behind its end the weights are zeros, so whatever activations lie there do not count.

#include "cuda/loader.cuh"
#include "cuda/plan.h"

namespace cnncomp::cuda {
namespace {

// Chunks of the reduction that a row of the kernel takes.
__host__ __device__ inline int run_chunks(int s, int c) { return (s * c + 15) / 16; }

// The lowest `count` bits, 0 to 32.
__device__ __forceinline__ uint32_t ones(int count) { return __funnelshift_lc(~0u, 0u, count); }

__device__ __forceinline__ void store_chunk(uint32_t dst, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// The words around 16 bytes from any address on, to be put together later: loads first, so that they are under way together.
struct LooseChunk {
  uint32_t words[5];
  uint32_t shift;  // bits

  // Words without any byte of [lo, hi) are not read, and are zeros. The others are read as a whole.
  __device__ __forceinline__ void load(const int8_t* at, int lo, int hi) {
    const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at)) & 3;
    const uint32_t* aligned = reinterpret_cast<const uint32_t*>(at - skew);
    const uint32_t last = 3 - static_cast<int>(skew) - lo, limit = hi > lo ? hi - lo + 3 : 0;  // last byte of word 0, from lo
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = last + 4 * i < limit ? __ldg(aligned + i) : 0;
    shift = 8 * skew;
  }

  // The 16 bytes, zeros outside of [lo, hi).
  __device__ __forceinline__ uint4 bytes(int lo, int hi) const {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __funnelshift_r(words[i], words[i + 1], shift);
    if (lo > 0 || hi < 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] &= ones(8 * min(max(hi - 4 * i, 0), 4)) & ~ones(8 * min(max(lo - 4 * i, 0), 4));
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }
};

// Where in the kernel a chunk of the reduction lies.
struct RunPlace {
  int row, within;  // row of the kernel; bytes from the run's start

  __device__ __forceinline__ RunPlace(const ConvParams& p, uint32_t chunk) {
    const uint32_t chunks = run_chunks(p.s, p.c);
    row = chunk / chunks;
    within = chunk % chunks * 16;
  }
};

// Activations. One group, columns not dilated, the image and its bytes multiples of 4.
template <typename Tile>
struct RunLoader {
  const ConvParams& p;
  Pixel pixel[Tile::kRowsA];
  int chunk;  // of the reduction

  __device__ __forceinline__ RunLoader(const ConvParams& params, const Work& work)
      : p(params), chunk(work.slice * Tile::kChunks + threadIdx.x % Tile::kChunks) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      pixel[i] = pixel_of(p, work.m0 + threadIdx.x / Tile::kChunks + i * Tile::kRowStep, 0);
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
    const RunPlace at(p, chunk);
    const int8_t* first = p.x + static_cast<int64_t>(at.row * p.dil_h) * p.w * p.c + at.within;
    LooseChunk loose[Tile::kRowsA];
    int lo[Tile::kRowsA], hi[Tile::kRowsA];
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) {
      const bool real = at.row < p.r && static_cast<uint32_t>(pixel[i].h0 + at.row * p.dil_h) < static_cast<uint32_t>(p.h);
      lo[i] = -pixel[i].w0 * p.c - at.within;
      hi[i] = real ? lo[i] + p.w * p.c : lo[i];
      loose[i].load(first + pixel[i].offset, max(lo[i], 0), min(hi[i], 16));
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      store_chunk(place + kOffset + i * Tile::kRowStepBytes, loose[i].bytes(lo[i], hi[i]));
    chunk += Tile::kChunks;
  }
};

// Weights of the same, all of whose bytes are a multiple of 4.
template <typename Tile>
struct RunRowLoader {
  const ConvParams& p;
  int64_t offset[Tile::kRowsB];  // negative: no such channel
  int chunk;

  __device__ __forceinline__ RunRowLoader(const ConvParams& params, const Work& work)
      : p(params), chunk(work.slice * Tile::kChunks + threadIdx.x % Tile::kChunks) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsB; ++i)
      offset[i] = weight_row<Tile>(work, threadIdx.x / Tile::kChunks + i * Tile::kRowStep, p.k_group) * (p.r * p.s * p.c);
  }

  template <int kOffset>
  __device__ __forceinline__ void load(uint32_t place) {
    const RunPlace at(p, chunk);
    const int8_t* first = p.weight + at.row * p.s * p.c + at.within;
    const int left = at.row < p.r ? min(p.s * p.c - at.within, 16) : 0;
    LooseChunk loose[Tile::kRowsB];
#pragma unroll
    for (int i = 0; i < Tile::kRowsB; ++i) loose[i].load(first + offset[i], 0, offset[i] < 0 ? 0 : left);
#pragma unroll
    for (int i = 0; i < Tile::kRowsB; ++i)
      store_chunk(place + kOffset + i * Tile::kRowStepBytes, loose[i].bytes(0, offset[i] < 0 ? 0 : left));
    chunk += Tile::kChunks;
  }
};

}  // namespace

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kTogether) conv2d_runs_int8_kernel(const ConvParams p) {
  Accumulators<Tile> acc = {};
  const Work work = Work::of_block<Tile>(p.schedule, p.reduction);
  LoaderPair<Tile, RunLoader<Tile>, RunRowLoader<Tile>> loader{RunLoader<Tile>(p, work), RunRowLoader<Tile>(p, work)};
  main_loop<Tile, kSigned>(acc, loader, work.slices);
  if (join_parts<Tile>(acc, p.schedule, work)) store_tile<Tile>(acc, p.epilogue, work, p.n * p.p * p.q);
}

namespace {

template <typename Tile>
Launch plan_tile(const Conv2d& conv, const Problem& problem, const Choice& choice) {
  Launch launch;
  launch.kernel = "conv2d_runs_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_runs_int8_kernel<Tile, true>)
                                  : reinterpret_cast<const void*>(&conv2d_runs_int8_kernel<Tile, false>);
  const Schedule schedule = set_grid<Tile>(launch, problem, choice, conv.workspace);
  ConvParams params = conv_params(conv, epilogue_params(conv, conv.k, Tile::kVec), schedule);
  params.reduction = problem.reduction;
  launch.set_params(params);
  return launch;
}

}  // namespace

bool conv2d_runs_fits(const Conv2d& conv) {
  const int64_t weights = static_cast<int64_t>(conv.k) * conv.r * conv.s * conv.c;
  const int64_t bytes = static_cast<int64_t>(conv.n) * conv.h * conv.w * conv.c;
  return conv.groups == 1 && conv.dil_w == 1 && bytes % 4 == 0 && weights % 4 == 0 && aligned(conv.x, 4) && aligned(conv.weight, 4);
}

Launch plan_conv2d_runs_int8(const Conv2d& conv, int multiprocessors) {
  Problem problem = problem_of(conv);
  problem.reduction = conv.r * run_chunks(conv.s, conv.c) * 16;
  return with_tile<OneTile>(conv, problem, multiprocessors, [&](auto tile, const Choice& choice) {
    return plan_tile<typename decltype(tile)::type>(conv, problem, choice);
  });
}

}  // namespace cnncomp::cuda
