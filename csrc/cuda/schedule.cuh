// How the thread blocks of a matrix product share the work: tiles of the output, and parts of the reduction.
#pragma once

#include <cstdint>

namespace cnncomp::cuda {

// blockIdx.x counts tiles, those of neighbouring output channels first, so that blocks that run together read the same
// activations; blockIdx.z counts groups. The first `whole` tiles have a block each. The reduction of the others is shared by
// `parts` blocks: those of the first part of all of these tiles come first. So a few tiles more than a multiple of the
// multiprocessors don't keep most of them waiting for the last ones.
struct Schedule {
  int32_t tiles_n;    // tiles of a group's output channels
  int32_t whole;      // tiles of a group with a block of their own
  int32_t shared;     // tiles of a group whose reduction is shared
  int32_t parts;      // blocks that share one
  int32_t slices;     // slices of the reduction (Tile::kSliceBytes each) of a part; the last may have fewer
  int32_t* sums;      // zeros, kBlockM * kBlockN for each shared tile of each group; zeros again after the kernel
  uint32_t* tickets;  // zeros, one for each shared tile of each group; zeros again after the kernel
};

#ifdef __CUDACC__

// What a block has to do.
struct Work {
  int32_t m0, n0;         // first pixel; first output channel of the group
  int32_t group;
  int32_t shared;         // number of the tile among the shared ones of all groups; negative: it is not shared
  int32_t slice, slices;  // first slice of the reduction, and how many

  // reduction: of the whole layer.
  template <typename Tile>
  static __device__ __forceinline__ Work of_block(const Schedule& s, int32_t reduction) {
    Work work;
    const uint32_t block = blockIdx.x, tiles_n = s.tiles_n, whole = s.whole, shared = s.shared;
    uint32_t tile = block;
    work.group = blockIdx.z;
    work.shared = -1;
    work.slice = 0;
    work.slices = (reduction + Tile::kSliceBytes - 1) / Tile::kSliceBytes;
    if (block >= whole) {
      const uint32_t unit = (block - whole) % shared;
      tile = whole + unit;
      work.shared = work.group * shared + unit;
      work.slice = (block - whole) / shared * s.slices;
      work.slices = min(s.slices, work.slices - work.slice);
    }
    work.m0 = tile / tiles_n * Tile::kBlockM;
    work.n0 = tile % tiles_n * Tile::kBlockN;
    return work;
  }
};

#endif

}  // namespace cnncomp::cuda
