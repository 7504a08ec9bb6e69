// How the thread blocks of a matrix product share the work: tiles of the output, and parts of the reduction.
#pragma once

#include <cstdint>

namespace cnncomp::cuda {

// blockIdx.x counts tiles, those of neighbouring output channels first, so that blocks that run together read the same
// activations; blockIdx.z counts groups, and the parts within a group.
struct Schedule {
  int32_t tiles_n;    // tiles of a group's output channels
  int32_t parts;      // blocks that share the reduction of a tile
  int32_t slices;     // slices of the reduction (Tile::kSliceBytes each) of a part; the last may have fewer
  int32_t* sums;      // parts > 1: zeros, kBlockM * kBlockN for each tile of each group; zeros again after the kernel
  uint32_t* tickets;  // parts > 1: zeros, one for each tile of each group; zeros again after the kernel
};

#ifdef __CUDACC__

// What a block has to do.
struct Work {
  int32_t m0, n0;         // first pixel; first output channel of the group
  int32_t group, tile;    // tile: over all groups
  int32_t slice, slices;  // first slice of the reduction, and how many

  // reduction: of the whole layer.
  template <typename Tile>
  static __device__ __forceinline__ Work of_block(const Schedule& s, int32_t reduction) {
    Work work;
    const uint32_t tile = blockIdx.x, tiles_n = s.tiles_n, parts = s.parts;
    work.m0 = tile / tiles_n * Tile::kBlockM;
    work.n0 = tile % tiles_n * Tile::kBlockN;
    work.group = blockIdx.z / parts;
    work.tile = work.group * gridDim.x + tile;
    work.slice = blockIdx.z % parts * s.slices;
    work.slices = min(s.slices, (reduction + Tile::kSliceBytes - 1) / Tile::kSliceBytes - work.slice);
    return work;
  }
};

#endif

}  // namespace cnncomp::cuda
