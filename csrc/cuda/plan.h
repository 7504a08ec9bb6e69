// Which tile a matrix product gets, and in how many parts its reduction goes. Plain C++ on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>

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

// How many of the tiles, over all groups, have a block of their own; the others' reduction is shared by `parts` blocks of so many
// slices.
struct Choice {
  int64_t whole = 0;
  int32_t parts = 1, slices = 1;
  double cost = INFINITY;
};

// Where tiles keep so much of the multiprocessors at work, sharing all of them has to gain such a part of a layer's time, and less
// where few are shared: sums are bytes to move, and what the model says is as uncertain. Their first touch is charged as memory
// there, as by the model of the bench; elsewhere it is not, since between the kernels of a network they lie in the L2.
constexpr double kAtWork = 0.8, kGainOfParts = 0.05;

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
double cost_of(const Problem& p, int multiprocessors, const Choice& choice) {
  constexpr int kWarps = Tile::kThreads / 32;
  constexpr double kMatrixLoads = 2 * (Tile::kTilesM + Tile::kTilesN / 2), kProducts = 2 * Tile::kTilesM * Tile::kTilesN;
  constexpr double kCopies = Tile::kRowsA + Tile::kRowsB;
  const double all = slices_of<Tile>(p.reduction), each = choice.slices, shared = tiles_of<Tile>(p) - choice.whole;
  // Blocks of the busiest multiprocessor, with a tile of their own or with a part of one, and the slices of all its blocks.
  const double alone = std::ceil(double(choice.whole) / multiprocessors);
  const double parts = std::ceil(shared * choice.parts / multiprocessors), load = alone + parts, work = alone * all + parts * each;
  const double ahead = std::min<double>((Tile::kStages - 1) * Tile::kSlices, alone > 0 ? all : each);  // slices under way
  const double sums = shared * Tile::kBlockM * Tile::kBlockN * 4, cold = tiles_of<Tile>(p) < kAtWork * multiprocessors ? 0 : sums;
  const double fit = std::min(164 * 1024 / (Tile::kSharedBytes + 1024), 65536 / (Tile::kThreads * (Tile::kSums + 80)));
  const double together = std::min(load, std::max(fit, 1.0)), bytes = Tile::kBytesA + Tile::kBytesB;
  const double epilogue = 200 * load + Tile::kSums * (8 * alone + 10 * parts);
  const double fill = fit < 2 ? 4 : 0;  // steps of a block's first copies and of its outputs, with no other block to hide them
  const auto steps = [&](double blocks, double slices) {
    return std::ceil(blocks / together) * (std::ceil(slices / Tile::kSlices) + fill);
  };
  const double limits[] = {
      work * Tile::kBlockM * Tile::kBlockN / 32,                                                      // tensor cores
      kWarps / 4 * (work * (kProducts + kMatrixLoads + 3 * kCopies + 12) + epilogue),                 // issue
      work * (kWarps * kMatrixLoads * 4 + bytes / 128),                                               // shared memory
      work * bytes / 64,                                                                              // port to the L2
      ((choice.whole * all + shared * choice.parts * each) * bytes + sums * choice.parts) / 5120,     // L2
      (steps(alone, all) + steps(parts, each + 4 * Tile::kSlices)) * 247,                             // steps
      work * 400 / (ahead * together),                                                                // latency
      ((double(p.m) + p.n) * p.groups * p.reduction + cold) / 1100};                                  // memory, about
  double sum = 0;
  for (double limit : limits) sum += limit * limit * limit;
  return std::cbrt(sum);
}

// The best number of parts for a tile, of all tiles or of those that a multiple of the multiprocessors leaves over. Parts are
// tried that give each multiprocessor up to three blocks.
template <typename Tile>
Choice choose_parts(const Problem& p, int multiprocessors, const Workspace& workspace, int32_t wish) {
  const int32_t slices = slices_of<Tile>(p.reduction);
  const int64_t tiles = tiles_of<Tile>(p), rest = tiles % multiprocessors;
  Choice best{tiles, 1, slices};
  best.cost = cost_of<Tile>(p, multiprocessors, best);
  if (!workspace.data || wish == 1) return best;
  const auto room = [&](int64_t shared) { return workspace_bytes<Tile>(shared) <= workspace.bytes; };
  const auto in_parts = [&](int64_t whole, int64_t wanted) {
    const int32_t each = static_cast<int32_t>(ceil_div(slices, wanted));
    return Choice{whole, static_cast<int32_t>(ceil_div(slices, each)), each, best.cost};
  };
  if (wish > 1) {
    const Choice choice = in_parts(0, std::min(wish, slices));
    return room(tiles) && choice.parts > 1 ? choice : best;
  }
  const double gain = tiles < kAtWork * multiprocessors ? 0 : kGainOfParts;
  double least = best.cost;
  for (int64_t shared : {tiles, rest}) {
    if (shared == 0 || !room(shared) || (shared < tiles && p.groups > 1)) continue;
    for (int waves = 1; waves <= 3; ++waves) {
      const int64_t wanted = std::min<int64_t>(waves * int64_t{multiprocessors} / shared, slices / 2);
      if (wanted < 2) continue;
      Choice choice = in_parts(tiles - shared, wanted);
      choice.cost = cost_of<Tile>(p, multiprocessors, choice);
      const double weighed = choice.cost * (1 + gain * shared / tiles);
      if (choice.parts > 1 && weighed < least) best = choice, least = weighed;
    }
  }
  return best;
}

// Sets grid, block and shared memory.
template <typename Tile>
Schedule set_grid(Launch& launch, const Problem& p, const Choice& choice, const Workspace& workspace) {
  const int64_t tiles_n = ceil_div(p.n, Tile::kBlockN), tiles = ceil_div(p.m, Tile::kBlockM) * tiles_n;
  const int64_t whole = choice.whole / p.groups, shared = tiles - whole, blocks = whole + shared * choice.parts;
  if (p.m > INT32_MAX - 512 || blocks > INT32_MAX || p.groups > 65535) throw std::invalid_argument(
      launch.kernel + ": " + std::to_string(p.m) + " pixels, " + std::to_string(p.n) + " channels in each of " +
      std::to_string(p.groups) + " groups; at most 2^31 - 513 pixels, 2^31 - 1 tiles and 65535 groups are possible");
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.grid[2] = static_cast<uint32_t>(p.groups);
  launch.block = Tile::kThreads;
  launch.shared = Tile::kSharedBytes;
  launch.shared_turing = kTuringStages * Tile::kStageBytes;
  launch.parts = choice.parts;
  launch.whole = static_cast<uint32_t>(whole);
  auto* tickets = static_cast<uint32_t*>(workspace.data);
  auto* sums = static_cast<int32_t*>(workspace.data) + ceil_div(shared * p.groups, 32) * 32;
  return {static_cast<int32_t>(tiles_n), static_cast<int32_t>(whole), static_cast<int32_t>(shared), choice.parts, choice.slices,
          choice.parts > 1 ? sums : nullptr, choice.parts > 1 ? tickets : nullptr};
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
