// The plan of a pass on CUDA devices: blocks of queries and chunks of references, and in these
// tiles, slices of the features, and parts of lists.
#pragma once
#include "api/posterior_mean.h"
#include "cuda/arrays.h"
#include "cuda/runtime.h"

namespace pfgm {
namespace {

CudaLimits limits;

// ---- tiles and slices --------------------------------------------------------------------------

// How distances splits a block of queries and a chunk of references.
struct Tiling {
  int queries, references;  // of a block
  Index slices;             // of the features
  Index clocks;             // predicted
};

// A tile of distances, and the clocks that a panel of its features takes. There is none if these
// are 0. No GPU has measured them: they are predictions from machine code (docs/roofline.md; commit
// d021624 has the model), as are the other costs here.
struct TileCost {
  int queries, references;
  Index clocks;
};
struct TilingCosts {
  TileCost tiles[5];
  Index finish;  // clocks of finish_distances without its sums
};
constexpr TilingCosts kCosts = {{{32, 64, 500}, {64, 64, 800}, {64, 128, 1200}, {128, 128, 2200}},
                                4500};
constexpr TilingCosts kWarpgroupCosts = {
    {{32, 64, 500}, {64, 64, 800}, {64, 128, 1200}, {128, 128, 1300}, {128, 192, 1680}}, 4500};
constexpr TilingCosts kGeforceCosts = {
    {{32, 64, 830}, {64, 64, 1450}, {64, 128, 2480}, {128, 128, 4650}}, 25000};
constexpr TilingCosts kRoundedCosts = {
    {{32, 64, 430}, {64, 64, 600}, {64, 128, 1300}, {128, 128, 1550}}, 4500};
constexpr TilingCosts kRoundedGeforceCosts = {
    {{32, 64, 430}, {64, 64, 600}, {64, 128, 1300}, {128, 128, 1550}}, 25000};
constexpr TilingCosts kRoundedWarpgroupCosts = {
    {{32, 64, 430}, {64, 64, 600}, {64, 128, 1300}, {128, 128, 980}, {256, 128, 1300}}, 4500};
constexpr Index kOncePanels = 6;                    // what a block does once costs as much
constexpr int kLargestTile = 256;                   // queries
constexpr Index kMostSlices = 8, kSlicePanels = 8;  // at most; panels of a slice, at least
constexpr Index kBytesPerClock = 25;                // of sums over slices, by a multiprocessor

// Numbers that the sums over a slice take in float32: rows of products, and one of squares, which
// are in float64.
Index slice_size(Index queries, Index references, bool rounded) {
  return ((rounded ? 1 : 2) * queries + 2) * round_up(references, kPanel);
}

// The tiles of at most `most_queries`, and the slices, that take least time by these costs, in
// rounds of the busiest multiprocessor. Larger tiles read each value less often. Slices give more
// blocks work, but their sums are written and read again. All sums together have at most `room`
// numbers.
Tiling fastest_tiling(Index queries, Index references, Index features, int multiprocessors,
                      bool rounded, const TilingCosts& costs, int most_queries, Index room) {
  Tiling best = {};
  const Index panels = divide_up(features, kPanel), size = slice_size(queries, references, rounded);
  const Index most = larger(1, smaller(smaller(kMostSlices, panels / kSlicePanels), room / size));
  for (const TileCost& cost : costs.tiles) {
    if (cost.clocks == 0 || cost.queries > most_queries) continue;
    const Index tiles = divide_up(queries, cost.queries) * divide_up(references, cost.references);
    for (Index slices = 1; slices <= most; ++slices) {
      const Index rounds = divide_up(tiles * slices, multiprocessors);
      const Index finish =
          slices > 1 ? costs.finish + 8 * slices * size / (kBytesPerClock * multiprocessors) : 0;
      const Index clocks =
          rounds * (divide_up(panels, slices) + kOncePanels) * cost.clocks + finish;
      if (best.clocks == 0 || clocks < best.clocks)
        best = {cost.queries, cost.references, slices, clocks};
    }
  }
  return best;
}

// ---- parts of lists ----------------------------------------------------------------------------

constexpr Index kLargeFrom = 256;  // queries of a block from which on groups are large
// Panels of listed references that a block sums: kFewestPanels to kManyPanels if that leaves four
// blocks a multiprocessor, up to kMostPanels if it leaves six. They are more, up to kPartPanels, if
// the parts would not fit into memory.
constexpr int kFewestPanels = 4, kManyPanels = 16, kMostPanels = 24;

// ---- blocks and chunks -------------------------------------------------------------------------

constexpr Index kPairBytes = 12;  // of a distance and a weight
constexpr Index kFewParts = 8;

// Whether few queries or features would leave matrix units mostly idle.
bool are_few(Index queries, Index features) { return queries < 16 || features < kPanel; }

// Pairs that a chunk of the forward pass has room for on every device.
Index least_pairs() { return limits.pairs / 4; }

// Pairs of a chunk in the forward pass: as many as the limit allows, and on GeForce cards, whose
// memory is slow, as the L2 cache holds, if that is at least `least_pairs`. Seven tenths of the
// cache count.
Index pairs_of_chunk(Index cache_bytes, bool geforce) {
  const Index held = cache_bytes * 7 / 10 / kPairBytes;
  return geforce && held >= least_pairs() ? smaller(held, limits.pairs) : limits.pairs;
}

// What bounds the workspace: queries of a block, references of a chunk, and parts of the weighted
// sums over a chunk.
struct Bounds {
  Index queries, references, parts;
};

Bounds bounds(const Problem& problem, Index pairs) {
  Bounds most;
  const Index fitting =
      smaller(limits.queries,
              larger(kSumRows, limits.parts / 3 / problem.features));  // so that three parts fit
  // Blocks of nearly equal size: a last one of few queries would read all references for these.
  // Large ones have whole tiles.
  const Index blocks = larger(1, divide_up(problem.queries, fitting));
  const Index part = larger(1, divide_up(problem.queries, blocks));
  most.queries = smaller(round_up(part, fitting < 128 ? 1 : kSumRows),
                         smaller(larger(1, problem.queries), fitting));
  most.parts = larger(1, limits.parts / (most.queries * problem.features));
  most.references = smaller(
      128 * larger(pairs / most.queries / 128, 1),
      smaller(smaller(limits.references, kMostReferences), most.parts * kPartPanels * kPanel));
  return most;
}

constexpr Index kChunkClocks = 40000;  // of what a chunk takes beside its work, about 25 µs

// References of a chunk, at most `most`. The last round of tiles takes as long as the others, so
// chunks of whole rounds take the least time for each reference. The choice is by predicted clocks,
// and is the same for all numbers of references that need chunks.
Index chunk_references(Index queries, Index references, Index features, Index most,
                       int multiprocessors, bool rounded, const TilingCosts& costs) {
  if (references <= most || are_few(queries, features)) return smaller(references, most);
  Index best = 0, least = 0;
  const auto compare = [&](Index chunk) {
    constexpr Index kRoom = 0;  // no slices: there are enough tiles
    const Tiling tiling = fastest_tiling(queries, chunk, features, multiprocessors, rounded, costs,
                                         kLargestTile, kRoom);
    const Index clocks = tiling.clocks + kChunkClocks;
    if (best == 0 || clocks * best < least * chunk) best = chunk, least = clocks;
  };
  compare(most);
  for (const TileCost& cost : costs.tiles) {
    if (cost.clocks == 0) continue;
    const Index beside = divide_up(queries, cost.queries);  // tiles with the same references
    const auto chunk_with = [&](Index rounds) {
      return rounds * multiprocessors / beside * cost.references;
    };
    const Index half = most * beside / (2 * cost.references * multiprocessors);
    for (Index rounds = half + 1; chunk_with(rounds) <= most; ++rounds)
      if (chunk_with(rounds) > 0) compare(chunk_with(rounds));
  }
  return best;
}

// ---- the plan ---------------------------------------------------------------------------------

// What the plan depends on beside the problem: of the device, and of its code (cuda/runtime.h).
struct Device {
  int multiprocessors, major;
  Index l2_cache;  // bytes
  bool geforce, warpgroups;
};

// How blocks share out the lists of groups of queries whose sums have asynchronous products. There
// are so many blocks that no share has more than kSharePanels.
struct Shares {
  int rows;             // queries of a group; 0 if lists are not shared out
  Index blocks, parts;  // parts of a list, at most
  Index least;          // panels of a share
};

// How a pass over a problem is split.
struct Plan {
  Device device;
  int features;
  bool backward;
  bool keeps;    // the forward pass keeps distances, or the backward pass takes them
  bool few;      // as in are_few
  bool rounded;  // references are Rounded
  // Products of the large tiles, and of the sums of many queries, are asynchronous. These take
  // aligned rows alone. One float adds up several panels of such a tile, unless references are
  // Rounded.
  bool asynchronous;
  bool halves;                        // weighted sums multiply float16 parts
  Index queries, references, stride;  // of a block and a chunk; distance between rows of pairs
  Index parts, part_panels;           // of the sums over a chunk; panels of references in a part
  Index piece;                        // references that a block of weigh takes
  int rows;                           // queries of a group of the sums: a small or a large one
  Shares shares;                      // of aligned references

  bool measures() const { return !backward || !keeps; }
  Index pairs() const { return queries * stride; }
  Index pieces() const { return divide_up(references, piece); }
  // Centred rows have whole trips of all tiles.
  Index width() const { return round_up(features, 2 * kPanel); }
  // Pairs whose weights are gathered: groups are whole.
  Index gathered() const { return round_up(queries, larger(rows, shares.rows)) * stride; }

  const TilingCosts& costs() const {
    if (asynchronous) return rounded ? kRoundedWarpgroupCosts : kWarpgroupCosts;
    if (device.geforce) return rounded ? kRoundedGeforceCosts : kGeforceCosts;
    return rounded ? kRoundedCosts : kCosts;
  }

  // The tiles of some queries and references. All sums over slices together have at most `room`
  // numbers.
  Tiling tiling(Index some_queries, Index some_references, bool aligned, Index room) const {
    const bool small = some_queries * width() < Index{1} << 31;  // 32 bits count its values
    const bool large = !asynchronous || (aligned && small && takes_warpgroups());
    return fastest_tiling(some_queries, some_references, features, device.multiprocessors, rounded,
                          costs(), large ? kLargestTile : 64, room);
  }

  // Numbers that the slices of a whole block and chunk take, the same in both passes.
  Index slice_numbers() const {
    Index numbers = 0;
    for (const bool aligned : {false, true}) {
      const Index slices = tiling(queries, references, aligned, limits.parts).slices;
      if (slices > 1) numbers = larger(numbers, slices * slice_size(queries, references, rounded));
    }
    return numbers;
  }
};

// Groups of queries whose lists are shared out, and from how many queries on. Fewer queries wait
// for memory, or their lists become much longer.
struct SharedGroups {
  int rows;
  Index queries;
};
constexpr SharedGroups kSharedGroups[] = {{kLargestSumRows, 512}, {kLargeSumRows, kLargeFrom}};

// The shares with groups of `rows` queries. The parts of a list are at most `most_parts`.
Shares shares(const Plan& plan, int rows, Index most_parts) {
  const int multiprocessors = plan.device.multiprocessors;
  const Index slices = divide_up(plan.features, kShareFeatures);
  const Index groups = divide_up(plan.queries, rows), panels = plan.stride / kPanel;
  const Index lists = groups * slices;
  const bool enough = lists * panels >= kFewestPanels * kFewestPanels * multiprocessors;
  const Index all = lists * (kListPanels + panels);  // the work of the blocks, at most
  const Index blocks = multiprocessors * divide_up(all, kSharePanels * multiprocessors);
  // The longest list has at most 1/slices of all work, because its group has as many equal lists.
  // So at most blocks/slices + 2 blocks share it.
  const Index parts = smaller(blocks / slices + 2, most_parts);
  if (!enough || groups > kMostGroups || parts < 2) return {};
  const Index least = larger(kFewestPanels, divide_up(panels - 1, parts - 1));
  if (least > kSharePanels) return {};
  return {rows, blocks, divide_up(panels - 1, least) + 1, least};
}

// Decides the groups and the parts of the weighted sums, of which there may be `most_parts`. Large
// groups are predicted to be faster, if there is enough work, where products are asynchronous or
// references are Rounded, but not on GeForce cards. Elsewhere the sums wait for matrix units, to
// which a longer list gives more work.
void plan_sums(Plan& plan, bool large, Index most_parts) {
  // Panels of a part that share the work out evenly.
  const Index panels = plan.stride / kPanel;
  const auto even_with = [&](int rows, int blocks = 4) {  // of a multiprocessor
    const Index tiles = divide_up(plan.features, kSumFeatures) * divide_up(plan.queries, rows);
    return divide_up(panels * tiles, blocks * plan.device.multiprocessors);
  };
  // Large groups need so many queries that their lists are little longer, and so much work that
  // there is enough for all multiprocessors.
  large = large && plan.halves && !plan.backward && plan.queries >= kLargeFrom &&
          even_with(kLargeSumRows) >= kFewestPanels;
  plan.rows = large ? kLargeSumRows : kSumRows;
  // Small parts share the work out evenly, large ones leave fewer partial sums. These matter more
  // if they are so large that few of them fit into memory.
  Index even = larger(smaller(larger(even_with(plan.rows), kFewestPanels), kManyPanels),
                      smaller(even_with(plan.rows, 6), kMostPanels));
  // Where no limit decides, parts are equal, so that none is much smaller than the others.
  if (even > kManyPanels && even < kMostPanels) even = divide_up(panels, larger(1, panels / even));
  const Index fewest = divide_up(panels, kPartPanels);
  plan.part_panels = most_parts <= kFewParts ? divide_up(panels, fewest)
                                             : larger(even, divide_up(panels, most_parts));
  plan.parts = divide_up(panels, plan.part_panels);
  // Also where weights have no halves, so that the workspace is the same.
  if (plan.asynchronous && !plan.backward && plan.features >= kShareFeatures)
    for (const SharedGroups& size : kSharedGroups)
      if (plan.shares.rows == 0 && plan.queries >= size.queries)
        plan.shares = shares(plan, size.rows, most_parts);
}

Plan plan(const Problem& problem, const Device& device, bool backward, bool keeps) {
  Plan plan = {};
  const bool wide = problem.reference_type == Type::float32;
  plan.device = device, plan.features = static_cast<int>(problem.features);
  plan.backward = backward, plan.keeps = keeps;
  plan.rounded = false;
  plan.asynchronous = wide && device.warpgroups;
  const Bounds most =
      bounds(problem, backward ? limits.pairs : pairs_of_chunk(device.l2_cache, device.geforce));
  plan.queries = most.queries;
  plan.references =
      chunk_references(most.queries, problem.references, problem.features, most.references,
                       device.multiprocessors, plan.rounded, plan.costs());
  plan.stride = round_up(plan.references, 32);
  plan.few = are_few(most.queries, problem.features);
  // Weights below 2^-39 have no halves. Together they must not matter.
  plan.halves = !plan.few && problem.references <= limits.halved;
  plan_sums(plan, wide && !device.geforce && (plan.rounded || device.warpgroups), most.parts);
  // Each block of weigh finds the nearest reference, so large pieces are cheaper if there are still
  // four blocks per multiprocessor.
  const Index least = divide_up(plan.references, kPiece);
  const Index together = plan.queries * least / (4 * device.multiprocessors);
  plan.piece = kPiece * smaller(larger(1, together), least);
  if (larger(plan.pairs(), plan.gathered()) > kMostPairs)
    throw std::invalid_argument("posterior_mean: too many pairs at once");
  return plan;
}

}  // namespace
}  // namespace pfgm
