// Squared distances Σ (x − y)² for few queries or features, where matrix units would be idle, on
// CUDA devices. Also the smallest distance of each tile of references, or G·(y − mean).
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/tile_results.h"

namespace pfgm {
namespace {

// The smallest finite distance; its sign is negative if a distance of the tile is not finite, so
// that find_limits looks at the tile.
struct LeastFinite {
  __device__ double operator()(double a, double b) const {
    const double least = fmin(fabs(a), fabs(b));
    return signbit(a) || signbit(b) ? -least : least;
  }
};

__device__ inline double finite_or_marked(double distance) {
  return distance < INFINITY ? distance : -INFINITY;
}

// Stores the smallest distance of a tile for each query, from low[warp][query].
template <int QUERIES>
__device__ inline void store_lowest(const double (*low)[QUERIES], int warps, int tile, int query0,
                                    int queries, const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= QUERIES || query0 + q >= queries || tile >= out.tiles) return;
  double least = low[0][q];
  for (int w = 1; w < warps; ++w) least = LeastFinite()(least, low[w][q]);
  out.lowest[static_cast<Index>(query0 + q) * out.tiles + tile] = stored_lowest(least);
}

template <class R, bool PROJECT>
struct DifferenceMemory {
  static constexpr int kStages = 4, kQueries = 8, kSources = PROJECT ? 2 : 1;  // x, G
  static constexpr int kPitch = kPanel + 4, kReferencePitch = kPanel + 16 / sizeof(R);
  float x[kStages][kSources][kQueries][kPitch];
  R y[kStages][kTileReferences][kReferencePitch];
  double low[8][kQueries];
};
static_assert(sizeof(DifferenceMemory<float, true>) <= kSharedLimit, "a block fits everywhere");

// A block has 8 warps and computes 64 references × 8 queries. A lane has reference 8·warp + g and a
// quarter of the features, and adds up those of a panel in float32, panels in two floats. If
// PROJECT, x holds the means: G·(y − mean) keeps its digits wherever the origin is.
template <class R, bool PROJECT>
__global__ void __launch_bounds__(256, 2)
    differences(const Rows<float> x, const Rows<float> upstream, const Rows<R> y, int features,
                const Pairs out) {
  using Memory = DifferenceMemory<R, PROJECT>;
  constexpr int kQueries = Memory::kQueries;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row = 8 * lane.warp + lane.g;
  const Index reference = static_cast<Index>(blockIdx.x) * kTileReferences + row;
  const Index query0 = static_cast<Index>(blockIdx.y) * kQueries;
  TwoFloats total[kQueries] = {}, norm = {};
  if constexpr (!PROJECT) clear_list(out);

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(features, kPanel)),
      [&](int p, int slot) {
        for (int source = 0; source < Memory::kSources; ++source)
          copy_rows<kQueries, kPanel, Memory::kPitch, 256>(
              shared.x[slot][source][0], source == 0 ? x : upstream, query0, p * kPanel, features);
        copy_rows<kTileReferences, kPanel, Memory::kReferencePitch, 256>(
            shared.y[slot][0], y, reference - row, p * kPanel, features);
      },
      [&](int p, int slot) {
        float sum[kQueries] = {}, square = 0;
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
          const int feature = 8 * lane.t + half;
          float b[4];
          load4(shared.y[slot][row] + feature, features - p * kPanel - feature, b);
          for (float& v : b) v *= kUnit<R>;
#pragma unroll
          for (int q = 0; q < kQueries; ++q) {
            float a[4], g[4];
            load4(shared.x[slot][0][q] + feature, a);
            if constexpr (PROJECT) load4(shared.x[slot][1][q] + feature, g);
            for (int i = 0; i < 4; ++i) {
              const float difference = b[i] - a[i];
              sum[q] += difference * (PROJECT ? g[i] : difference);
            }
          }
          if (lane.warp == 0) {  // |x|² of query g
            float a[4];
            load4(shared.x[slot][0][lane.g] + feature, a);
            for (float v : a) square += v * v;
          }
        }
        for (int q = 0; q < kQueries; ++q) total[q].add(sum[q]);
        norm.add(square);
      });

  for (int q = 0; q < kQueries; ++q) {
    const double value = over_quad(total[q].sum());
    const Index query = query0 + q;
    const bool exists = query < x.count && reference < y.count;
    if constexpr (PROJECT) {
      if (exists && lane.t == q % 4)
        out.projected[query * out.stride + reference] = static_cast<float>(value);
    } else {
      if (exists && lane.t == q % 4) out.squared[query * out.stride + reference] = value;
      double low = exists ? finite_or_marked(value) : INFINITY;
      for (int apart = 4; apart < 32; apart *= 2)
        low = LeastFinite()(low, __shfl_xor_sync(kAll, low, apart));
      if (lane.lane == 0) shared.low[lane.warp][q] = low;
    }
  }
  if constexpr (!PROJECT) {
    __syncthreads();
    store_lowest<kQueries>(shared.low, 8, static_cast<int>(blockIdx.x), static_cast<int>(query0),
                           x.count, out);
    const double squared = over_quad(norm.sum());
    const Index query = query0 + lane.g;
    if (blockIdx.x == 0 && lane.warp == 0 && lane.t == 0 && query < x.count)
      out.norms[query] = squared;
  }
}

}  // namespace
}  // namespace pfgm
