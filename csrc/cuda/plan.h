// Which tile a matrix product gets, and in how many parts its reduction goes. Plain C++ on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "cuda/launch.h"
#include "cuda/schedule.cuh"
#include "cuda/tile_config.h"

namespace cnncomp::cuda {

// A layer as a matrix product: (m, reduction) times (n, reduction) transposed, once for each group.
struct Problem {
  int64_t m;
  int32_t n, groups, reduction;
};

inline Problem problem_of(const Conv2d& c) {
  return {static_cast<int64_t>(c.n) * c.p() * c.q(), c.k / c.groups, c.groups, c.r * c.s * (c.c / c.groups)};
}

// parts: blocks that share the reduction of a tile; slices: of each.
struct Choice {
  int32_t parts = 1, slices = 1;
  double cost = INFINITY;
};

template <typename Tile>
int64_t tiles_of(const Problem& p) {
  return ceil_div(p.m, Tile::kBlockM) * ceil_div(p.n, Tile::kBlockN) * p.groups;
}

// Bytes of workspace that `tiles` with a shared reduction need: the sums, and a ticket each, in whole cache lines.
template <typename Tile>
int64_t workspace_bytes(int64_t tiles) {
  return tiles * Tile::kBlockM * Tile::kBlockN * 4 + ceil_div(tiles, 32) * 128;
}

// Clocks that a layer takes with a tile: the bounds of bench/gpu_model.py, joined as there, with rates of an A100. To compare
// tiles by, so what all of them have in common (launch, outputs) is left out.
template <typename Tile>
double cost_of(const Problem& p, int multiprocessors, int32_t parts, int32_t slices) {
  constexpr int kWarps = Tile::kThreads / 32;
  constexpr double kMatrixLoads = 2 * (Tile::kTilesM + Tile::kTilesN / 2), kProducts = 2 * Tile::kTilesM * Tile::kTilesN;
  constexpr double kCopies = Tile::kRowsA + Tile::kRowsB;
  const double blocks = static_cast<double>(tiles_of<Tile>(p)) * parts, load = std::ceil(blocks / multiprocessors);
  const double fit = std::min(164 * 1024 / (Tile::kSharedBytes + 1024), 65536 / (Tile::kThreads * (Tile::kSums + 80)));
  const double together = std::min(load, std::max(fit, 1.0)), work = load * slices, bytes = (Tile::kBytesA + Tile::kBytesB);
  const double epilogue = 200 + Tile::kSums * (parts > 1 ? 10 : 8);
  const double limits[] = {
      work * Tile::kBlockM * Tile::kBlockN / 32,                                                      // tensor cores
      load * kWarps / 4 * (slices * (kProducts + kMatrixLoads + 3 * kCopies + 12) + epilogue),        // issue
      work * (kWarps * kMatrixLoads * 4 + bytes / 128),                                               // shared memory
      work * bytes / 64,                                                                              // port to the L2
      blocks * (slices * bytes + (parts > 1 ? Tile::kBlockM * Tile::kBlockN * 4.0 : 0)) / 5120,       // L2
      std::ceil(load / together) * (std::ceil(double(slices) / Tile::kSlices) + (parts > 1 ? 4 : 0)) * 247,  // steps
      work * 400 / ((Tile::kStages - 1) * Tile::kSlices * together),                                  // latency
      (double(p.m) + p.n) * p.groups * p.reduction / 1100};                                           // memory, about
  double sum = 0;
  for (double limit : limits) sum += limit * limit * limit;
  return std::cbrt(sum);
}

// The best number of parts for a tile. Parts are tried that give each multiprocessor up to three blocks.
template <typename Tile>
Choice choose_parts(const Problem& p, int multiprocessors, const Workspace& workspace, int32_t wish) {
  const int32_t slices = slices_of<Tile>(p.reduction);
  const int64_t tiles = tiles_of<Tile>(p);
  Choice best{1, slices, cost_of<Tile>(p, multiprocessors, 1, slices)};
  if (!workspace.data || workspace_bytes<Tile>(tiles) > workspace.bytes || wish == 1) return best;
  if (wish > 1) {
    const int32_t each = static_cast<int32_t>(ceil_div(slices, std::min(wish, slices)));
    return {static_cast<int32_t>(ceil_div(slices, each)), each, best.cost};
  }
  for (int waves = 1; waves <= 3; ++waves) {
    const int64_t wanted = std::min<int64_t>({waves * int64_t{multiprocessors} / tiles, slices / 2, 65535 / p.groups});
    if (wanted < 2) continue;
    const int32_t each = static_cast<int32_t>(ceil_div(slices, wanted)), parts = static_cast<int32_t>(ceil_div(slices, each));
    const double cost = cost_of<Tile>(p, multiprocessors, parts, each);
    if (parts > 1 && cost < best.cost) best = {parts, each, cost};
  }
  return best;
}

// Sets grid, block and shared memory.
template <typename Tile>
Schedule set_grid(Launch& launch, const Problem& p, const Choice& choice, const Workspace& workspace) {
  const int64_t tiles_n = ceil_div(p.n, Tile::kBlockN), tiles = ceil_div(p.m, Tile::kBlockM) * tiles_n;
  const int64_t depth = static_cast<int64_t>(p.groups) * choice.parts;
  if (p.m > INT32_MAX - 512 || tiles > INT32_MAX || depth > 65535) throw std::invalid_argument(
      launch.kernel + ": " + std::to_string(p.m) + " pixels, " + std::to_string(p.n) + " channels in each of " +
      std::to_string(p.groups) + " groups; at most 2^31 - 513 pixels, 2^31 - 1 tiles and 65535 groups are possible");
  launch.grid[0] = static_cast<uint32_t>(tiles);
  launch.grid[2] = static_cast<uint32_t>(depth);
  launch.block = Tile::kThreads;
  launch.shared = Tile::kSharedBytes;
  launch.shared_turing = kTuringStages * Tile::kStageBytes;
  auto* tickets = static_cast<uint32_t*>(workspace.data);
  auto* sums = static_cast<int32_t*>(workspace.data) + ceil_div(tiles * p.groups, 32) * 32;
  return {static_cast<int32_t>(tiles_n), choice.parts, choice.slices, choice.parts > 1 ? sums : nullptr,
          choice.parts > 1 ? tickets : nullptr};
}

// Calls plan(TileTag, Choice) for the cheapest tile of a list, or for the one that the caller wishes.
template <typename Tiles, typename Plan>
Launch with_tile(const Conv2d& conv, const Problem& p, int multiprocessors, Plan&& plan) {
  Choice best;
  std::function<Launch()> chosen;
  Tiles::for_each([&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if (!conv.wish.tile.empty() && conv.wish.tile != Tile::size()) return;
    const Choice choice = choose_parts<Tile>(p, multiprocessors, conv.workspace, conv.wish.parts);
    if (choice.cost >= best.cost) return;
    best = choice;
    chosen = [&plan, tile, choice] { return plan(tile, choice); };
  });
  if (!chosen) throw std::invalid_argument("tile: got " + conv.wish.tile + ", not one of this layer's kernels");
  return chosen();
}

}  // namespace cnncomp::cuda
