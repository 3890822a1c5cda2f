// The plan of a pass on CUDA devices: blocks of queries and chunks of references, and in these
// tiles, slices of the features, and parts of lists.
#pragma once
#include "api/posterior_mean.h"
#include "cuda/arrays.h"
#include "cuda/runtime.h"

namespace pfgm {
namespace {

CudaLimits limits;

// What the plan depends on besides the problem.
struct Device {
  int multiprocessors, major;
};

// ---- tiles and slices --------------------------------------------------------------------------

// How distances splits a block of queries and a chunk of references.
struct Tiling {
  int queries, references;  // of a block of threads
  Index slices;             // of the features
};

constexpr Index kMostSlices = 8, kSlicePanels = 8;  // at most; panels of a slice, at least

// The size of the sums over a slice, in float32 numbers: for each query a row of products in two
// floats, and one row of squares in float64.
Index slice_size(Index queries, Index references) {
  return (2 * queries + 2) * round_up(references, kPanel);
}

// Large tiles read each value less often. They are taken if queries fill more than half of one, and
// at least half of the multiprocessors get work. Slices of the features occupy more
// multiprocessors, with one block each at most, because their sums are written and read again. All
// sums together have at most `room` numbers.
Tiling choose_tiling(Index queries, Index references, Index features, int multiprocessors,
                     Index room) {
  const Index panels = divide_up(features, kPanel), size = slice_size(queries, references);
  const Index most = smaller(smaller(kMostSlices, panels / kSlicePanels), room / size);
  const auto with = [&](int tile_queries, int tile_references) {
    const Index tiles = divide_up(queries, tile_queries) * divide_up(references, tile_references);
    return Tiling{tile_queries, tile_references, larger(1, smaller(most, multiprocessors / tiles))};
  };
  const Tiling large = with(128, 128);
  const Index blocks = divide_up(queries, 128) * divide_up(references, 128) * large.slices;
  if (queries > 64 && 2 * blocks >= multiprocessors) return large;
  return queries > 32 ? with(64, 64) : with(32, 64);
}

// ---- blocks and chunks -------------------------------------------------------------------------

// Whether few queries or features would leave matrix units mostly idle.
bool are_few(Index queries, Index features) { return queries < 16 || features < kPanel; }

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

// References of a chunk, at most `most`. In a round each multiprocessor takes one large tile. If
// there are several chunks, each takes whole rounds, so that no multiprocessor waits in the last
// one.
Index chunk_references(Index queries, Index references, Index most, int multiprocessors) {
  const Index round = 128 * (multiprocessors / divide_up(queries, 128));
  return references > most && round > 0 && most > round ? most - most % round
                                                        : smaller(references, most);
}

// ---- the plan ---------------------------------------------------------------------------------

// How a pass over a problem is split.
struct Plan {
  Device device;
  int features;
  bool backward;
  bool keeps;   // the forward pass keeps distances, or the backward takes them
  bool few;     // as in are_few
  bool halves;  // weighted sums multiply float16 parts
  Index queries, references, stride;  // of a block and a chunk; distance between rows of pairs
  Index parts, part_panels;           // of the sums over a chunk; panels of references in a part
  Index piece;                        // references that a block of weigh takes

  bool measures() const { return !backward || !keeps; }
  Index pairs() const { return queries * stride; }
  Index pieces() const { return divide_up(references, piece); }
  // The width of centred rows: whole trips of the main loop, with any tiles.
  Index width() const { return round_up(features, 2 * kPanel); }
  // Pairs whose weights are gathered. The last group is filled up.
  Index gathered() const { return round_up(queries, kSumRows) * stride; }

  // The tiles of some queries and references. All sums over slices together have at most `room`
  // numbers.
  Tiling tiling(Index some_queries, Index some_references, Index room) const {
    return choose_tiling(some_queries, some_references, features, device.multiprocessors, room);
  }

  // Numbers that the slices of a whole block and chunk take, the same in both passes.
  Index slice_numbers() const {
    const Index slices = tiling(queries, references, limits.parts).slices;
    return slices > 1 ? slices * slice_size(queries, references) : 0;
  }
};

// Panels of listed references that a block sums: so many that each multiprocessor has four blocks.
// There are at most `most_parts` parts. Large parts leave fewer partial sums, which matters if
// these are so large that few of them fit into memory.
Index choose_part_panels(const Plan& plan, Index most_parts) {
  constexpr Index kFewestPanels = 4, kMostPanels = 24, kFewParts = 8;
  const Index panels = plan.stride / kPanel, fewest = divide_up(panels, kPartPanels);
  if (most_parts <= kFewParts) return divide_up(panels, fewest);
  const Index tiles = divide_up(plan.features, kSumFeatures) * divide_up(plan.queries, kSumRows);
  const Index even = divide_up(panels * tiles, 4 * plan.device.multiprocessors);
  return larger(smaller(larger(even, kFewestPanels), kMostPanels), divide_up(panels, most_parts));
}

Plan plan(const Problem& problem, const Device& device, bool backward, bool keeps) {
  Plan plan = {};
  plan.device = device, plan.features = static_cast<int>(problem.features);
  plan.backward = backward, plan.keeps = keeps;
  const Bounds most = bounds(problem, limits.pairs);
  plan.queries = most.queries;
  plan.references =
      chunk_references(most.queries, problem.references, most.references, device.multiprocessors);
  plan.stride = round_up(plan.references, 32);
  plan.few = are_few(most.queries, problem.features);
  // Halves lose weights below 2^-39. With few enough references these do not matter together.
  plan.halves = !plan.few && problem.references <= limits.halved;
  plan.part_panels = choose_part_panels(plan, most.parts);
  plan.parts = divide_up(plan.stride / kPanel, plan.part_panels);
  // Each block of weigh finds the nearest reference, so large pieces are cheaper, as long as there
  // are four blocks for each multiprocessor.
  const Index least = divide_up(plan.references, kPiece);
  const Index together = plan.queries * least / (4 * device.multiprocessors);
  plan.piece = kPiece * smaller(larger(1, together), least);
  if (larger(plan.pairs(), plan.gathered()) > kMostPairs)
    throw std::invalid_argument("posterior_mean: too many pairs at once");
  return plan;
}

}  // namespace
}  // namespace pfgm
