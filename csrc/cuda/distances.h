// Squared distances between a block of queries and a chunk of references from products in matrix
// units, on CUDA devices.
//
// distances computes |x|² + |y|² − 2 x·y, of centred data in two float16 parts (cuda/centering.h).
// It also finds the smallest distance of each tile of references. In the backward pass it computes
// G·y, up to a constant for each query. If float16 cannot hold a reference, its G·y is summed in
// float32. If there are few pairs, blocks share out the features, and finish_distances adds up the
// sums over slices of these.
//
// The main loop (cuda/warp_products.h) adds up the products of a tile, panel after panel. What
// becomes of them is in cuda/tile_results.h.
#pragma once
#include "cuda/tile_results.h"
#include "cuda/warp_products.h"

namespace pfgm {
namespace {

// For a slice, blockIdx.z says which slice of the features a block takes.
template <class Loop, Target TARGET>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kBlocks)
    distances(const Halves x, const Rows<typename Loop::Reference> y, const Center center,
              const Pairs out, const Slices slices) {
  constexpr bool kSlice = TARGET == Target::slice;
  auto& shared = *reinterpret_cast<TileMemory<Loop>*>(shared_memory());
  static_assert(sizeof(shared) <= kSharedLimit, "a block fits everywhere");
  const int reference0 = static_cast<int>(blockIdx.x) * Loop::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * Loop::kQueries;
  if constexpr (TARGET == Target::distances) clear_list(out);
  load_queries<TARGET>(shared, x, query0, out);
  const int first_trip = kSlice ? static_cast<int>(blockIdx.z) * slices.trips : 0;
  const int first = first_trip * Loop::kFeatures;
  const int left = static_cast<int>(divide_up(center.features - first, Loop::kFeatures));
  const int trips = kSlice && slices.trips < left ? slices.trips : left;
  Loop loop(shared.loop, x, query0, y, reference0, center, first, trips);
  loop.run(shared.sums, [&](auto& total, auto& rest) {
    finish_tile<TARGET>(shared, total, rest, x, y, center, out, slices);
  });
}

// ---- slices of the features ------------------------------------------------------------------

constexpr int kFinishWarps = 4, kFinishQueries = 4;  // queries of a warp
constexpr int kFinishThreads = 32 * kFinishWarps;

// Distances, or G·y, from the sums over slices. A block takes a tile of references. A lane takes
// two neighbouring ones. The sums are added up in the order of the slices.
template <class R, bool PROJECT>
__global__ void __launch_bounds__(kFinishThreads)
    finish_distances(const Halves x, const Rows<R> y, const Center center, const Pairs out,
                     const Slices slices) {
  const Lane lane = this_lane();
  const int reference = static_cast<int>(blockIdx.x) * kTileReferences + 2 * lane.lane;
  const int query0 = (static_cast<int>(blockIdx.y) * kFinishWarps + lane.warp) * kFinishQueries;
  const bool exists[2] = {reference < y.count, reference + 1 < y.count};
  if constexpr (!PROJECT) clear_list(out);
  if (query0 >= x.rows) return;
  float2 sum[kFinishQueries][2] = {};
  double scaled[2] = {};
  const Index from = exists[0] ? reference : 0;
#pragma unroll 1
  for (int slice = 0; slice < slices.count; ++slice) {
    if constexpr (!PROJECT) {
      const double2 more =
          *reinterpret_cast<const double2*>(slices.squares + slice * slices.stride + from);
      scaled[0] += more.x, scaled[1] += more.y;
    }
#pragma unroll
    for (int q = 0; q < kFinishQueries; ++q) {
      const Index query = query0 + q < x.rows ? query0 + q : query0;
      const float4 more = *reinterpret_cast<const float4*>(
          slices.products + (static_cast<Index>(slice) * x.rows + query) * slices.stride + from);
      sum[q][0] = add_sums(sum[q][0], {more.x, more.y});
      sum[q][1] = add_sums(sum[q][1], {more.z, more.w});
    }
  }

  const double per_scale = center.scale[1];
  double squared[2], farthest = 0;
  for (int e = 0; e < 2; ++e) {
    squared[e] = center.true_square(scaled[e] * per_scale * per_scale);
    farthest = fmax(farthest, reach_of(scaled[e], squared[e], center.features, exists[e]));
  }
  const ReferenceNorms reference_norms(squared);
  if constexpr (!PROJECT)
    if (query0 == 0) {
      farthest = over_warp(farthest, Most());
      if (lane.lane == 0) out.reach[blockIdx.x] = farthest;
    }
  bool all_finite = true;  // of this thread's G·y
#pragma unroll
  for (int q = 0; q < kFinishQueries; ++q) {
    const int query = query0 + q;
    if (query >= x.rows) break;
    const double unit = x.units[query];
    const Index pair = query * out.stride + reference;
    if constexpr (PROJECT) {
      const ProductUnit projection(unit);
      const float2 both = {projection(sum[q][0]), projection(sum[q][1])};
      if (exists[1])
        *reinterpret_cast<float2*>(out.projected + pair) = both;
      else if (exists[0])
        out.projected[pair] = both.x;
      all_finite = all_finite && fabsf(both.x) < INFINITY && fabsf(both.y) < INFINITY;
    } else {
      const DistanceOfQuery distance_of(out.norms[query], unit, reference_norms);
      std::uint64_t distance[2], low = kInfiniteBits;
      bool infinite = false;
      for (int e = 0; e < 2; ++e) {
        distance[e] = distance_of(e, sum[q][e]);
        if (!exists[e]) continue;
        infinite = infinite || distance[e] >= kInfiniteBits;
        low = Least()(low, distance[e]);
      }
      const double2 both = {double_of(distance[0]), double_of(distance[1])};
      if (exists[1])
        *reinterpret_cast<double2*>(out.squared + pair) = both;
      else if (exists[0])
        out.squared[pair] = both.x;
      const double least = double_of(least_of_warp(static_cast<std::int64_t>(low)));
      const bool marked = __ballot_sync(kAll, infinite) != 0;
      if (lane.lane == 0)
        out.lowest[static_cast<Index>(query) * out.tiles + blockIdx.x] =
            stored_lowest(marked ? -least : least);
    }
  }
  if constexpr (PROJECT)
    if (__ballot_sync(kAll, all_finite) != kAll)
      for (int half = 0; half < kTileReferences; half += 32) {
        const int reference0 = static_cast<int>(blockIdx.x) * kTileReferences + half;
        replace_infinite({query0, kFinishQueries, reference0, 32}, x.whole, y, center, out, lane);
      }
}

}  // namespace
}  // namespace pfgm
