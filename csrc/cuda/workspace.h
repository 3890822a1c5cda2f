// The workspace of a pass: its arrays, and which of them share memory.
#pragma once
#include <stdexcept>

#include "cuda/plan.h"

namespace pfgm {
namespace {

// Hands out memory; without memory it only counts bytes.
class Arena {
 public:
  Arena(void* at, std::size_t bytes) : base_(static_cast<char*>(at)), bytes_(bytes) {}
  template <class T>
  T* take(Index count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<Index>(sizeof(T)), 256));
    if (base_ && used_ > bytes_) throw std::runtime_error("posterior_mean: workspace is too small");
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t bytes_, used_ = 0;
};

// What the backward pass can take from the forward pass: the squared distances, and the centre of
// the references if products are centred.
struct Lasting {
  double* squared;  // (queries, stride)
  Center center;

  Lasting(Arena& arena, Index queries, Index references, Index features)
      : squared(arena.take<double>(queries * round_up(references, 32))), center() {
    if (are_few(queries, features)) return;
    const Index width = round_up(features, 2 * kPanel), groups = divide_up(width, kCenterThreads);
    center.features = static_cast<int>(features), center.width = static_cast<int>(width);
    center.at = arena.take<float>(width);
    center.scaled = arena.take<float>(width);
    center.spread = arena.take<float>(groups);
    center.largest = arena.take<float>(groups);
    center.scale = arena.take<float>(2);
    center.value_scale = arena.take<float>(2);
  }
};

// The number of bytes that a forward pass can keep; 0 if the backward pass takes several blocks or
// chunks.
Index kept_bytes(const Problem& problem) {
  const Bounds most = bounds(problem, limits.pairs / 4);
  if (most.queries != problem.queries || most.references < problem.references) return 0;
  Arena counted(nullptr, 0);
  Lasting(counted, problem.queries, problem.references, problem.features);
  return static_cast<Index>(counted.used());
}

// The arrays of a block of queries and a chunk of references. Three of them lie in an array that is
// not in use at the same time:
//     pairs.list       in weights.weight  Pairs are refined before any weight is made.
//     slices.products  in parts.sums      Distances are finished before anything is summed.
//     lists.weights    in pairs.squared   Weights are gathered when the distances have served:
//                                         unless these are kept, or take less memory.
struct Workspace {
  Center center = {};
  Halves x = {}, upstream = {};
  Pairs pairs = {};
  Slices slices = {};
  float* units;  // (queries): what find_limits leaves for refine
  ChunkWeights weights = {};
  PieceSums sums = {};
  int* order;  // of the queries; null means one group
  Lists lists = {};
  Parts parts = {};
  Index room;  // numbers that slices may take
  // Of the backward pass alone.
  Coefficients coefficients = {};
  Moments moments = {};
  double* spare = nullptr;  // (queries): for a gradient that is not wanted

  // If bytes are only counted, `kept` needs only its size.
  Workspace(Arena& arena, const Kept& kept, const Problem& problem, const Plan& plan) {
    if (kept.bytes != 0 && kept.bytes != kept_bytes(problem))
      throw std::invalid_argument("what the forward pass kept is of another problem");
    Arena keeping(kept.at, static_cast<std::size_t>(kept.bytes));
    take_distances(arena, plan.keeps ? keeping : arena, plan);
    take_weights(arena, plan);
    take_sums(arena, plan);
    if (plan.backward) take_gradients(arena, plan);
  }

 private:
  void take_distances(Arena& arena, Arena& lasting_arena, const Plan& plan) {
    const Lasting lasting(lasting_arena, plan.queries, plan.references, plan.features);
    const Index tiles = divide_up(plan.references, kTileReferences);
    center = lasting.center;
    pairs.stride = plan.stride;
    pairs.squared = lasting.squared;
    pairs.projected = plan.backward ? arena.take<float>(plan.pairs()) : nullptr;
    pairs.lowest = arena.take<double>(plan.queries * tiles);
    pairs.reach = arena.take<double>(tiles);
    pairs.norms = arena.take<double>(plan.queries);
    pairs.listed = arena.take<unsigned>(1);
    units = arena.take<float>(plan.queries);
    if (plan.few) return;
    if (plan.measures()) x = take_halves(arena, plan);
    if (plan.backward) upstream = take_halves(arena, plan);
  }

  Halves take_halves(Arena& arena, const Plan& plan) const {
    Halves halves = {};
    halves.high = arena.take<std::uint16_t>(plan.queries * center.width);
    halves.low = arena.take<std::uint16_t>(plan.queries * center.width);
    halves.units = arena.take<double>(plan.queries);
    return halves;
  }

  void take_weights(Arena& arena, const Plan& plan) {
    weights.weight = arena.take<float>(plan.pairs());
    weights.live = arena.take<std::uint32_t>(plan.pairs() / 32);
    pairs.list = reinterpret_cast<unsigned*>(weights.weight);
    order = plan.queries > kSumRows ? arena.take<int>(plan.queries) : nullptr;
    sums.size = static_cast<int>(plan.piece);
    sums.live_count = arena.take<int>(plan.queries * plan.pieces());
    if (plan.backward) return;
    sums.sum = arena.take<float>(plan.queries * plan.pieces());
    sums.nearest = arena.take<double>(plan.queries);
    sums.earlier = arena.take<double>(plan.queries);
  }

  void take_sums(Arena& arena, const Plan& plan) {
    const Index row = plan.queries * plan.features;  // numbers of a part
    // Both passes must choose the same slices. So slices may not fill the room of the parts, whose
    // number differs between the passes.
    room = plan.few ? 0 : plan.slice_numbers();
    parts.sums = arena.take<float>(larger(room, plan.parts * row));
    parts.panels = static_cast<int>(plan.part_panels);
    parts.counts = arena.take<int>(plan.queries);
    slices.products = reinterpret_cast<float2*>(parts.sums);
    const Index groups = divide_up(plan.queries, kSumRows);
    lists.listed = arena.take<int>(groups * plan.stride);
    lists.counts = arena.take<int>(groups);
    const bool apart = plan.keeps || plan.gathered() > 2 * plan.pairs();
    lists.weights =
        apart ? arena.take<float>(plan.gathered()) : reinterpret_cast<float*>(pairs.squared);
    lists.stride = plan.stride;
  }

  void take_gradients(Arena& arena, const Plan& plan) {
    coefficients.probability = arena.take<float>(plan.pairs());
    coefficients.scaled = arena.take<float>(plan.pairs());
    coefficients.c = weights;
    coefficients.live_count = sums.live_count;
    for (double** each : {&moments.projection, &moments.mass, &moments.moment, &moments.chunk_sum,
                          &moments.squares})
      *each = arena.take<double>(plan.queries * plan.pieces());
    for (double** each : {&moments.exact_sum, &moments.unit, &spare})
      *each = arena.take<double>(plan.queries);
    moments.pieces = static_cast<int>(plan.pieces());
    moments.size = sums.size;
  }
};

}  // namespace
}  // namespace pfgm
