// Squared distances between a block of queries and a chunk of references, on CUDA devices.
//
// 1. distances: |x|² + |y|² − 2 x·y from products in matrix units or, for few queries or features,
//    differences: Σ (x − y)²; and the least of each tile of references. PROJECT: G·y instead.
// 2. refine: products lose the digits that the exponent (N + D)/2 multiplies. What lies near the
//    minimum is computed again, from differences in float64, where it decides the answer.
#pragma once
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kTile = 64;  // references of a tile, whose least distance is kept
constexpr double kNear =
    20;  // nats: what weighs less than e^-20 of the largest needs no more digits
constexpr int kFewTiles = 16;   // near the minimum: so few are computed again in any case
constexpr int kSegments = 256;  // blocks of refine a query, at most: each reads all minima
constexpr int kSegment = 4;     // tiles that one looks at, at least
constexpr double kFloatLeast = 0x1p-126;

// In the workspace; rows are `stride` apart.
struct Pairs {
  Index stride;
  double* squared;    // (queries, stride)
  double* projected;  // (queries, stride): G·y; or null
  float* lowest;      // (queries, tiles)
  float* norms;       // (queries): |x|²
  int tiles;
};

// ---- tiles -----------------------------------------------------------------------------------

template <class R, int QUERIES>
struct TileMemory {
  static constexpr int kStages = 4;
  static constexpr int kPitch = kPanel + 4, kReferencePitch = kPanel + 16 / sizeof(R);
  float x[kStages][QUERIES][kPitch];
  R y[kStages][kTile][kReferencePitch];
  float norms[QUERIES];
  float low[8][QUERIES];
};
static_assert(sizeof(TileMemory<float, 64>) <= kSharedLimit, "a block fits everywhere");

// −∞ calls for a look at the tile: float32 could not hold one of its distances.
__device__ inline float lowest_with(float low, float distance) {
  return distance < INFINITY ? fminf(low, distance) : -INFINITY;
}

// low[row of warps][query] → the least of the tile.
template <int QUERIES>
__device__ inline void store_lowest(const float (*low)[QUERIES], int rows, Index first, int queries,
                                    const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= QUERIES || first + q >= queries) return;
  float least = low[0][q];
  for (int w = 1; w < rows; ++w) least = fminf(least, low[w][q]);
  out.lowest[(first + q) * out.tiles + blockIdx.x] = least;
}

// A block of 4 warps: 64 references × QUERIES, a warp 32 × QUERIES/2.
template <class R, int QUERIES, bool PROJECT>
__global__ void __launch_bounds__(128, 2)
    distances(const Rows<float> x, const Rows<R> y, int features, const Pairs out) {
  using Memory = TileMemory<R, QUERIES>;
  constexpr int kColumns = QUERIES / 16;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row0 = lane.warp / 2 * 32, column0 = lane.warp % 2 * (QUERIES / 2);
  const Index reference0 = static_cast<Index>(blockIdx.x) * kTile;
  const Index query0 = static_cast<Index>(blockIdx.y) * QUERIES;
  Products<2, kColumns> products;
  products.clear();

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(features, kPanel)),
      [&](int p, int slot) {
        copy_rows<QUERIES, kPanel, Memory::kPitch, 128>(shared.x[slot][0], x, query0, p * kPanel,
                                                        features);
        copy_rows<kTile, kPanel, Memory::kReferencePitch, 128>(shared.y[slot][0], y, reference0,
                                                               p * kPanel, features);
      },
      [&](int p, int slot) {
        products.template add_panel<Memory::kReferencePitch, Memory::kPitch>(
            shared.y[slot][row0], shared.x[slot][column0], features - p * kPanel, lane);
      });

  if constexpr (!PROJECT) {
    for (int j = 0; j < kColumns; ++j) {
      float& norm = products.of_columns[j];
      norm += __shfl_xor_sync(kAll, norm, 1);
      norm += __shfl_xor_sync(kAll, norm, 2);
      if (row0 == 0 && lane.t == 0) shared.norms[column0 + 8 * j + lane.g] = norm;
    }
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 2; ++e) {
        float& norm = products.of_rows[i][e];
        norm += __shfl_xor_sync(kAll, norm, 1);
        norm += __shfl_xor_sync(kAll, norm, 2);
      }
    __syncthreads();
  }

  constexpr float unit = kUnit<R>;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      const int column = column0 + 8 * j + 2 * lane.t + odd;
      const Index query = query0 + column;
      float low = INFINITY;
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < 2; ++e) {
          const Index reference = reference0 + row0 + 16 * i + 8 * e + lane.g;
          if (query >= x.count || reference >= y.count) continue;
          const float dot = unit * products.sum[i][j][2 * e + odd];
          if constexpr (PROJECT) {
            out.projected[query * out.stride + reference] = dot;
          } else {
            const float of_y = unit * unit * products.of_rows[i][e];
            float distance = of_y + shared.norms[column] - 2 * dot;
            distance = distance < 0 ? 0 : distance;
            out.squared[query * out.stride + reference] = distance;
            low = lowest_with(low, distance);
          }
        }
      if constexpr (!PROJECT) {
        for (int apart = 4; apart < 32; apart *= 2)
          low = fminf(low, __shfl_xor_sync(kAll, low, apart));
        if (lane.g == 0) shared.low[row0 / 32][column] = low;
      }
    }
  if constexpr (!PROJECT) {
    __syncthreads();
    store_lowest<QUERIES>(shared.low, 2, query0, x.count, out);
    const int q = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && q < QUERIES && query0 + q < x.count)
      out.norms[query0 + q] = shared.norms[q];
  }
}

// A block of 8 warps: 64 references × 8 queries; a lane has reference 8·warp + g and its quarter of
// the features. Sums in float32 take at most 256 additions, then float64 takes over.
template <class R, bool PROJECT>
__global__ void __launch_bounds__(256, 2)
    differences(const Rows<float> x, const Rows<R> y, int features, const Pairs out) {
  constexpr int kQueries = 8, kPanels = 256 / (kPanel / 4);
  using Memory = TileMemory<R, kQueries>;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row = 8 * lane.warp + lane.g;
  const Index reference = static_cast<Index>(blockIdx.x) * kTile + row;
  const Index query0 = static_cast<Index>(blockIdx.y) * kQueries;
  double total[kQueries] = {}, norm = 0;
  float sum[kQueries] = {}, of_x = 0;

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(features, kPanel)),
      [&](int p, int slot) {
        copy_rows<kQueries, kPanel, Memory::kPitch, 256>(shared.x[slot][0], x, query0, p * kPanel,
                                                         features);
        copy_rows<kTile, kPanel, Memory::kReferencePitch, 256>(
            shared.y[slot][0], y, reference - row, p * kPanel, features);
      },
      [&](int p, int slot) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
          const int feature = 8 * lane.t + half;
          float b[4];
          load4(shared.y[slot][row] + feature, features - p * kPanel - feature, b);
          for (float& v : b) v *= kUnit<R>;
#pragma unroll
          for (int q = 0; q < kQueries; ++q) {
            float a[4];
            load4(shared.x[slot][q] + feature, a);
            for (int i = 0; i < 4; ++i) {
              const float difference = a[i] - b[i];
              sum[q] += PROJECT ? a[i] * b[i] : difference * difference;
            }
          }
          if (lane.warp == 0) {  // |x|² of query g
            float a[4];
            load4(shared.x[slot][lane.g] + feature, a);
            for (float v : a) of_x += v * v;
          }
        }
        if ((p + 1) % kPanels == 0 || (p + 1) * kPanel >= features) {
          for (int q = 0; q < kQueries; ++q) total[q] += sum[q], sum[q] = 0;
          norm += of_x, of_x = 0;
        }
      });

  for (int q = 0; q < kQueries; ++q) {
    double& value = total[q];
    value += __shfl_xor_sync(kAll, value, 1);
    value += __shfl_xor_sync(kAll, value, 2);
    const Index query = query0 + q;
    const bool known = query < x.count && reference < y.count;
    if constexpr (PROJECT) {
      if (known && lane.t == q % 4) out.projected[query * out.stride + reference] = value;
    } else {
      if (known && lane.t == q % 4) out.squared[query * out.stride + reference] = value;
      float low = known ? lowest_with(INFINITY, static_cast<float>(value)) : INFINITY;
      for (int apart = 4; apart < 32; apart *= 2)
        low = fminf(low, __shfl_xor_sync(kAll, low, apart));
      if (lane.lane == 0) shared.low[lane.warp][q] = low;
    }
  }
  if constexpr (!PROJECT) {
    __syncthreads();
    store_lowest<kQueries>(shared.low, 8, query0, x.count, out);
    norm += __shfl_xor_sync(kAll, norm, 1);
    norm += __shfl_xor_sync(kAll, norm, 2);
    const Index query = query0 + lane.g;
    if (blockIdx.x == 0 && lane.warp == 0 && lane.t == 0 && query < x.count)
      out.norms[query] = static_cast<float>(norm);
  }
}

// ---- what decides ----------------------------------------------------------------------------

// How squared distances become weights, and how far those found in float32 may be off.
struct Law {
  bool gaussian;  // D = ∞
  double half;    // (N + D)/2; 1/2 at D = ∞
  double spread;  // s of a reference kNear nats below the nearest is (1 + spread) times its s
  double bound;   // of a distance's error, relative to |x|² + |y|²
  double noise;   // its usual size
  double unseen;  // s of a reference whose weight float32 does not hold is (1 + unseen) times its s

  // log of the weight at squared distance nearest + excess, relative to that at nearest.
  __device__ double relative(double excess, double nearest, double r) const {
    if (excess == 0) return 0;
    if (gaussian) return -excess / r / r / 2;
    return -half * log1p(excess / (nearest + r * r));
  }

  // The weight itself. Most references are so far away that it takes no logarithm to see.
  __device__ float weight(double excess, double nearest, double r) const {
    if (excess > unseen * (gaussian ? r * r : nearest + r * r)) return 0;
    return expf(static_cast<float>(relative(excess, nearest, r)));
  }

  // Where the mean is locally constant: r = 0 on a reference, σ = 0 or too small for a score.
  __device__ bool at_limit(double nearest, double r) const {
    if (gaussian) return r == 0 || nearest / r / r == INFINITY;
    return nearest + r * r == 0;
  }

  // The usual error of distances near `nearest`: rounding of single differences mostly averages out.
  __device__ double error(double nearest, double norm) const {
    return noise * (norm + nearest) + 0x1p-26 * nearest + 1e6 * kFloatLeast;
  }

  // Whether such an error changes a weight by more than `share` of it.
  __device__ bool shows(double error, double nearest, double r, double share) const {
    if (gaussian) return error > 2 * share * r * r;
    return half * error > share * (nearest + r * r);
  }

  // The largest distance, as found, whose weight needs all digits. |y|² ≤ 2 (d² + |x|²); twice, for
  // the minimum is as uncertain as what is compared with it.
  __device__ double near(double nearest, double norm, double r) const {
    const double uncertain = nearest + 2 * bound * (3 * norm + 2 * nearest);
    const double far = uncertain + (gaussian ? 2 * kNear * r * r : spread * (nearest + r * r));
    return far == far ? far : INFINITY;
  }
};

// Σ (x − y)² and Σ g y in float64, by the lanes of a warp; all of them get it.
template <class R>
__device__ inline double squared_distance(const float* x, const R* y, int lane, int features) {
  double sum = 0;
#pragma unroll 4
  for (int k = lane; k < features; k += 32) {
    const double difference = static_cast<double>(x[k]) - load1(y + k);
    sum += difference * difference;
  }
  return over_warp(sum, Sum());
}
template <class R>
__device__ inline double inner_product(const float* g, const R* y, int lane, int features) {
  double sum = 0;
#pragma unroll 4
  for (int k = lane; k < features; k += 32) sum += static_cast<double>(g[k]) * load1(y + k);
  return over_warp(sum, Sum());
}

// Only input that is not finite makes a distance infinite; NaN, unlike infinity, is not lost.
__device__ inline double or_nan(double distance) { return distance < INFINITY ? distance : NAN; }

constexpr int kRefineThreads = 128;

// Distances of one query that decide its answer; nearest is what is known of other references, or
// null. All are computed again that may weigh more than e^-20 of the largest, if they are few, or if
// the usual error would show in their weights; what float32 could not hold in any case. Their G·y
// are, too, where there is a G.
template <class R>
__global__ void __launch_bounds__(kRefineThreads)
    refine(const Rows<float> x, const Rows<float> upstream, const Rows<R> y, int features,
           const double* radius, const double* nearest, const Law law, const Pairs pairs,
           int segment) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.y;
  const float* low = pairs.lowest + query * pairs.tiles;
  const int thread = static_cast<int>(threadIdx.x);
  const double r = radius[query], norm = pairs.norms[query];
  double base = INFINITY;
  for (int tile = thread; tile < pairs.tiles; tile += kRefineThreads)
    if (low[tile] >= 0) base = fmin(base, static_cast<double>(low[tile]));
  base = over_block(base, scratch, Least());
  if (nearest) base = fmin(nearest[query], base);

  double near = law.near(base, norm, r);
  int competing = 0;
  for (int tile = thread; tile < pairs.tiles; tile += kRefineThreads)
    competing += low[tile] <= near;
  competing = over_block(competing, reinterpret_cast<int*>(scratch), Sum());
  if (competing > kFewTiles && !law.shows(law.error(base, norm), base, r, 3e-4) && near < INFINITY)
    near = -1;

  const Lane lane = this_lane();
  const int first = static_cast<int>(blockIdx.x) * segment;
  for (int tile = first; tile < smaller(first + segment, pairs.tiles); ++tile) {
    if (!(low[tile] <= near)) continue;
    for (int j = lane.warp; j < kTile; j += kRefineThreads / 32) {
      const Index reference = static_cast<Index>(tile) * kTile + j;
      if (reference >= y.count) break;
      const Index pair = query * pairs.stride + reference;
      const double known = pairs.squared[pair];
      __syncwarp();
      if (!(known <= near) && known < INFINITY) continue;
      const R* row = y.row(reference);
      const double exact = squared_distance(x.row(query), row, lane.lane, features);
      if (lane.lane == 0) pairs.squared[pair] = or_nan(exact);
      if (!upstream.at) continue;
      const double dot = inner_product(upstream.row(query), row, lane.lane, features);
      if (lane.lane == 0) pairs.projected[pair] = dot;
    }
  }
}

}  // namespace
}  // namespace pfgm
