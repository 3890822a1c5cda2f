// The posterior mean in one pass over the references, on devices with clusters of blocks (sm_90
// on).
//
// A cluster holds all queries in one tile. Each of its blocks has a slice of the features: of the
// queries, of 16 references at a time, and of the running sums, which stay in registers. Partial
// distances are added through distributed shared memory. Distances that decide the result are
// recomputed from differences in float64 while the references are still in shared memory. So each
// reference is read from memory once. Clusters split the references among themselves; merge_passes
// combines their results.
#pragma once
#include "cuda/weights.h"

namespace pfgm {
namespace {

constexpr int kPassThreads = 256, kPassTile = 16;
constexpr int kPassRegisters = 96 * 32;  // for the sums of a warp: 96 features × 32 queries
// Largest cluster: every such device allows 8 blocks, some 16.
template <int QUERIES> constexpr int kPassCluster = QUERIES == 64 ? 8 : 16;
// A distance is recomputed if its typical error changes a weight by more than this fraction.
constexpr double kPassShare = 1e-4;

template <class R, int QUERIES>
struct PassMemory {
  static constexpr int kSlice = 8 * kPassRegisters / QUERIES, kStages = 3;
  static constexpr int kPitch = kSlice + 4, kReferencePitch = kSlice + 16 / sizeof(R);
  static constexpr int kWeightPitch = kPassTile + 4;
  static constexpr float kReferenceUnit = kUnit<R>;
  float x[QUERIES][kPitch];
  R y[kStages][kPassTile][kReferencePitch];
  // Distances over this slice, read by the other blocks of the cluster: over each half, and exact.
  float partial[2][QUERIES * kPassTile];
  double exact[QUERIES * kPassTile];
  float norm_of_slice[QUERIES];
  // Over all features, the same in every block.
  double squared[QUERIES * kPassTile];
  float norm[QUERIES];
  float weights[QUERIES][kWeightPitch];
  float scale[QUERIES];
};

static_assert(sizeof(PassMemory<float, 64>) <= kClusterSharedLimit &&
                  sizeof(PassMemory<float, 128>) <= kClusterSharedLimit,
              "a block fits");

// Results of the clusters, for merge_passes, relative to the nearest reference of their stretch.
struct PassResults {
  float* sums;      // (stretches, queries, features), times `shrink`, so that none overflows
  double* nearest;  // (stretches, queries)
  double* total;
};

#ifdef PFGM_CLUSTERS

// A thread's part of one query: the references part, part + kParts, … of a tile.
template <int QUERIES>
struct QueryPart {
  static constexpr int kParts = kPassThreads / QUERIES, kOwn = kPassTile / kParts;
  int query, part;
  bool known;  // false for padding of the tile
  double r, nearest, total;
  double squared[kOwn];

  __device__ int pair(int i) const { return query * kPassTile + part + kParts * i; }
  template <class T, class Combine>
  __device__ T over_parts(T value, Combine combine) const {
    for (int apart = 1; apart < kParts; apart *= 2)
      value = combine(value, __shfl_xor_sync(kAll, value, apart));
    return value;
  }
};

// Squared distances over each half of this slice.
template <class Memory, int QUERIES>
__device__ inline void find_partial(Memory& shared, int slot, int features, const Lane& lane) {
  constexpr int kColumns = QUERIES / 32, kHalf = Memory::kSlice / 2;
  const int half = lane.warp / 4, column0 = lane.warp % 4 * (8 * kColumns);
  Products<1, kColumns> products;
  products.clear();
  for (int k = half * kHalf; k < (half + 1) * kHalf; k += kPanel)
    products.template add_panel<Memory::kReferencePitch, Memory::kPitch>(
        shared.y[slot][0] + k, &shared.x[column0][k], features - k, lane);
  constexpr float unit = Memory::kReferenceUnit;
  for (int e = 0; e < 2; ++e) {
    float& norm = products.of_rows[0][e];
    norm += __shfl_xor_sync(kAll, norm, 1);
    norm += __shfl_xor_sync(kAll, norm, 2);
    for (int j = 0; j < kColumns; ++j)
      for (int odd = 0; odd < 2; ++odd) {
        const int query = column0 + 8 * j + 2 * lane.t + odd;
        const float of_x = half == 0 ? shared.norm_of_slice[query] : 0;
        shared.partial[half][query * kPassTile + 8 * e + lane.g] =
            of_x + unit * (unit * norm - 2 * products.sum[0][j][2 * e + odd]);
      }
  }
}

// Adds the partial distances of all blocks. Each block adds some of the pairs and sends the sums to
// all.
template <class Memory>
__device__ inline void add_partial(Memory& shared, int pairs, int cluster, int rank) {
  const int each = static_cast<int>(divide_up(pairs, cluster));
  const int end = static_cast<int>(smaller(pairs, (rank + 1) * each));
  for (int i = rank * each + static_cast<int>(threadIdx.x); i < end; i += kPassThreads) {
    double sum = 0;
    for (int of = 0; of < cluster; ++of) {
      const float* partial = cluster_shared(shared.partial[0], of);
      sum += static_cast<double>(partial[i]) + partial[pairs + i];
    }
    for (int to = 0; to < cluster; ++to) cluster_shared(shared.squared, to)[i] = sum < 0 ? 0 : sum;
  }
}

// Recomputes the distances that decide the result. All blocks of the cluster choose the same ones.
template <class Memory, int QUERIES>
__device__ inline void refine_tile(Memory& shared, int slot, const WeightLaw& law, int known,
                                   int features, int cluster, const Lane& lane,
                                   QueryPart<QUERIES>& own) {
  double base = own.nearest;
  for (int i = 0; i < own.kOwn; ++i) {
    const double d = shared.squared[own.pair(i)];
    own.squared[i] = own.part + own.kParts * i < known ? d : INFINITY;
    base = fmin(base, own.squared[i]);
  }
  base = own.over_parts(base, Least());
  const double norm = shared.norm[own.query];
  const double near = law.changes_weight(law.typical_error(base, norm), base, own.r, kPassShare)
                          ? law.near_limit(base, norm, own.r)
                          : -1;
  unsigned needed = 0;
  for (int i = 0; i < own.kOwn; ++i) {
    const int j = own.part + own.kParts * i;
    const bool decides = own.squared[i] <= near || !(own.squared[i] < INFINITY);
    if (own.known && j < known && decides) needed |= 1u << j;
  }
  const unsigned mine = needed;
  needed = own.over_parts(needed, Sum());
  if (!__syncthreads_or(needed != 0)) return;

  // Each lane's `needed` is that of its own query, so the warp takes one query after the other.
  for (int first = 0; first < 32; first += own.kParts) {
    const int query = __shfl_sync(kAll, own.query, first);
    for (unsigned left = __shfl_sync(kAll, needed, first); left != 0; left &= left - 1) {
      const int j = __ffs(static_cast<int>(left)) - 1;
      const double part = squared_distance(shared.x[query], shared.y[slot][j], lane.lane, features);
      if (lane.lane == 0) shared.exact[query * kPassTile + j] = part;
    }
  }
  cluster_sync();
  for (int i = 0; i < own.kOwn; ++i) {
    if (!(mine >> (own.part + own.kParts * i) & 1u)) continue;
    double sum = 0;
    for (int of = 0; of < cluster; ++of) sum += cluster_shared(shared.exact, of)[own.pair(i)];
    own.squared[i] = or_nan(sum);
  }
}

// Weights of a tile, relative to the nearest reference so far. Returns whether any sum changes.
template <class Memory, int QUERIES>
__device__ inline bool weigh_tile(Memory& shared, const WeightLaw& law, double floor, float shrink,
                                  QueryPart<QUERIES>& own) {
  double nearest = own.nearest, nans = 0;
  for (double d : own.squared) {
    nearest = fmin(nearest, d);
    nans += isnan(d);
  }
  nearest = own.over_parts(nearest, Least());
  nans = own.over_parts(nans, Sum());
  if (nans > 0 || isnan(own.nearest)) nearest = NAN;
  const double scale =
      own.total == 0 ? 0 : exp(law.relative_score(own.nearest - nearest, nearest, own.r));
  const double kept = own.total * scale, smallest = floor * fmax(kept, 1.0);
  double sum = 0;
  bool changes = own.known && !(scale == 1);
  for (int i = 0; i < own.kOwn; ++i) {
    float w = own.known ? law.weight(own.squared[i] - nearest, nearest, own.r) : 0;
    sum += w;
    if (w < smallest) w = 0;
    changes |= w != 0;
    shared.weights[own.query][own.part + own.kParts * i] = shrink * w;
  }
  own.nearest = nearest;
  own.total = kept + own.over_parts(sum, Sum());
  if (own.part == 0) shared.scale[own.query] = own.known ? static_cast<float>(scale) : 1;
  return changes;
}

#endif

template <class R, int QUERIES>
__global__ void __launch_bounds__(kPassThreads, 1)
    single_pass(const Rows<float> x, const Rows<R> y, int features, const double* radius,
                const WeightLaw law, double floor, int cluster, int stretch, float shrink,
                const PassResults out) {
#ifdef PFGM_CLUSTERS
  using Memory = PassMemory<R, QUERIES>;
  constexpr int kSlice = Memory::kSlice, kPairsOfTile = QUERIES * kPassTile;
  constexpr int kFeatureGroups = kSlice / 96;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  const Index place = static_cast<Index>(blockIdx.x) / cluster, first = place * stretch;
  const int feature0 = rank * kSlice;
  const int known_features = static_cast<int>(larger(0, smaller(kSlice, features - feature0)));

  copy_rows<QUERIES, kSlice, Memory::kPitch, kPassThreads>(shared.x[0], x, 0, feature0, features);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  for (int q = lane.warp; q < QUERIES; q += kPassThreads / 32) {
    float norm = 0;
    for (int k = lane.lane; k < kSlice; k += 32) norm += shared.x[q][k] * shared.x[q][k];
    norm = over_warp(norm, Sum());
    if (lane.lane == 0) shared.norm_of_slice[q] = norm;
  }
  cluster_sync();
  if (thread < QUERIES) {
    float norm = 0;
    for (int of = 0; of < cluster; ++of) norm += cluster_shared(shared.norm_of_slice, of)[thread];
    shared.norm[thread] = norm;
  }

  QueryPart<QUERIES> own;
  own.query = thread / own.kParts, own.part = thread % own.kParts;
  own.known = own.query < x.count;
  own.r = own.known ? radius[own.query] : 1;
  own.nearest = INFINITY, own.total = 0;
  float sums[3][2][4][4] = {};
  const int sum_feature0 = lane.warp % kFeatureGroups * 96;
  const int sum_query0 = lane.warp / kFeatureGroups * 32;
  const int count = static_cast<int>(smaller(stretch, y.count - first));

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(count, kPassTile)),
      [&](int p, int slot) {
        copy_rows<kPassTile, kSlice, Memory::kReferencePitch, kPassThreads>(
            shared.y[slot][0], y, first + p * kPassTile, feature0, features);
      },
      [&](int p, int slot) {
        find_partial<Memory, QUERIES>(shared, slot, known_features, lane);
        cluster_sync();
        add_partial(shared, kPairsOfTile, cluster, rank);
        cluster_sync();
        refine_tile(shared, slot, law, count - p * kPassTile, known_features, cluster, lane, own);
        const float ones[4] = {1, 1, 1, 1};
        if (!__syncthreads_or(weigh_tile(shared, law, floor, shrink, own))) return;
#pragma unroll
        for (int n = 0; n < 4; ++n)
          for (int odd = 0; odd < 2; ++odd) {
            const float scale = shared.scale[sum_query0 + 8 * n + 2 * lane.t + odd];
            for (int group = 0; group < 3; ++group)
              for (int i = 0; i < 2; ++i)
                for (int e = 0; e < 2; ++e) sums[group][i][n][2 * e + odd] *= scale;
          }
#pragma unroll
        for (int group = 0; group < 3; ++group)
          add_weighted<kPassTile, 4, Memory::kReferencePitch, Memory::kWeightPitch, 1>(
              sums[group], shared.y[slot][0] + sum_feature0 + 32 * group,
              shared.weights[sum_query0], ones, lane);
      });

  const Index row0 = place * x.count;
  if (rank == 0 && own.part == 0 && own.known) {
    out.nearest[row0 + own.query] = own.nearest;
    out.total[row0 + own.query] = own.total;
  }
#pragma unroll
  for (int n = 0; n < 4; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int query = sum_query0 + 8 * n + 2 * lane.t + odd;
      if (query >= x.count) continue;
      float* sum = out.sums + (row0 + query) * features;
      for (int group = 0; group < 3; ++group)
        for (int f = 0; f < 4; ++f) {
          const int feature = feature0 + sum_feature0 + 32 * group + 4 * lane.g + f;
          if (feature < features) sum[feature] = kUnit<R> * sums[group][f / 2][n][f % 2 * 2 + odd];
        }
    }
  cluster_sync();  // no block exits while another reads its shared memory
#endif
}

constexpr int kMostPasses = 256;  // threads of merge_passes: one per stretch

// Combines the results of all stretches for one query.
__global__ void __launch_bounds__(kMostPasses)
    merge_passes(const WeightLaw law, const double* radius, const PassResults passes, int stretches,
                 float shrink, int features, float* mean, const QueryStates state) {
  double* factors = reinterpret_cast<double*>(shared_memory());
  double* scratch = factors + kMostPasses;
  const Index query = blockIdx.x, queries = gridDim.x;
  const int thread = static_cast<int>(threadIdx.x);
  const double r = radius[query];
  double own = INFINITY, nans = 0;
  if (thread < stretches) own = passes.nearest[thread * queries + query];
  if (isnan(own)) own = INFINITY, nans = 1;
  double nearest = over_block(own, scratch, Least());
  if (over_block(nans, scratch, Sum()) > 0) nearest = NAN;
  double factor = 0;
  if (thread < stretches) factor = exp(law.relative_score(own - nearest, nearest, r));
  const double part = thread < stretches ? factor * passes.total[thread * queries + query] : 0;
  const double total = over_block(part, scratch, Sum());
  factors[thread] = factor / total / shrink;
  __syncthreads();
  const int feature = static_cast<int>(blockIdx.y) * kMostPasses + thread;
  if (feature < features) {
    double sum = 0;
    for (int i = 0; i < stretches; ++i)
      sum += factors[i] * passes.sums[(i * queries + query) * features + feature];
    mean[query * features + feature] = static_cast<float>(sum);
  }
  if (blockIdx.y > 0 || thread > 0) return;
  state.nearest[query] = nearest;
  state.total[query] = total;
  state.logsumexp[query] = logsumexp(law, nearest, total, r);
}

}  // namespace
}  // namespace pfgm
