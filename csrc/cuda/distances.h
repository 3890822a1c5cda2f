// Squared distances between a block of queries and a chunk of references, on CUDA devices.
//
// 1. distances computes |x|² + |y|² − 2 x·y from products in matrix units. For few queries or
//    features, differences computes Σ (x − y)² instead. Both also find the smallest distance of
//    each tile of references. With PROJECT they compute G·y.
// 2. refine recomputes distances near the minimum from differences in float64, where they decide
//    the result. Products lose digits, and the exponent (N + D)/2 multiplies the error.
#pragma once
#include "cuda/tiles.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kTileReferences = 64;    // references in a tile, whose smallest distance is kept
constexpr int kFewTiles = 16;          // up to this many tiles near the minimum are always refined
constexpr int kMaxRefineBlocks = 256;  // for a query; each block reads all minima
constexpr int kMinRefineTiles = 4;     // for a block of refine

// Arrays in the workspace. Rows are `stride` apart.
struct Pairs {
  Index stride;
  double* squared;    // (queries, stride)
  double* projected;  // (queries, stride): G·y; may be null
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
  R y[kStages][kTileReferences][kReferencePitch];
  float norms[QUERIES];
  float low[8][QUERIES];
};
static_assert(sizeof(TileMemory<float, 64>) <= kSharedLimit, "a block fits everywhere");

// −∞ marks a tile with a distance that float32 cannot hold. refine always looks at such a tile.
__device__ inline float lowest_with(float low, float distance) {
  return distance < INFINITY ? fminf(low, distance) : -INFINITY;
}

// Stores the smallest distance of the tile for each query, from low[row of warps][query].
template <int QUERIES>
__device__ inline void store_lowest(const float (*low)[QUERIES], int rows, Index first, int queries,
                                    const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= QUERIES || first + q >= queries) return;
  float least = low[0][q];
  for (int w = 1; w < rows; ++w) least = fminf(least, low[w][q]);
  out.lowest[(first + q) * out.tiles + blockIdx.x] = least;
}

// A block has 4 warps and computes 64 references × QUERIES; a warp computes 32 × QUERIES/2.
template <class R, int QUERIES, bool PROJECT>
__global__ void __launch_bounds__(128, 2)
    distances(const Rows<float> x, const Rows<R> y, int features, const Pairs out) {
  using Memory = TileMemory<R, QUERIES>;
  constexpr int kColumns = QUERIES / 16;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row0 = lane.warp / 2 * 32, column0 = lane.warp % 2 * (QUERIES / 2);
  const Index reference0 = static_cast<Index>(blockIdx.x) * kTileReferences;
  const Index query0 = static_cast<Index>(blockIdx.y) * QUERIES;
  Products<2, kColumns> products;
  products.clear();

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(features, kPanel)),
      [&](int p, int slot) {
        copy_rows<QUERIES, kPanel, Memory::kPitch, 128>(shared.x[slot][0], x, query0, p * kPanel,
                                                        features);
        copy_rows<kTileReferences, kPanel, Memory::kReferencePitch, 128>(
            shared.y[slot][0], y, reference0, p * kPanel, features);
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

// A block has 8 warps and computes 64 references × 8 queries. A lane has reference 8·warp + g and a
// quarter of the features. It adds at most 256 values in float32 before float64 takes over.
template <class R, bool PROJECT>
__global__ void __launch_bounds__(256, 2)
    differences(const Rows<float> x, const Rows<R> y, int features, const Pairs out) {
  constexpr int kQueries = 8, kPanels = 256 / (kPanel / 4);
  using Memory = TileMemory<R, kQueries>;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row = 8 * lane.warp + lane.g;
  const Index reference = static_cast<Index>(blockIdx.x) * kTileReferences + row;
  const Index query0 = static_cast<Index>(blockIdx.y) * kQueries;
  double total[kQueries] = {}, norm = 0;
  float sum[kQueries] = {}, of_x = 0;

  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(features, kPanel)),
      [&](int p, int slot) {
        copy_rows<kQueries, kPanel, Memory::kPitch, 256>(shared.x[slot][0], x, query0, p * kPanel,
                                                         features);
        copy_rows<kTileReferences, kPanel, Memory::kReferencePitch, 256>(
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

// ---- refinement ----------------------------------------------------------------------------

// Σ (x − y)² and Σ g y in float64, computed by a warp. All lanes get the result.
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

// A distance in float64 is infinite only if the input is not finite. NaN then reaches the result;
// infinity would not.
__device__ inline double or_nan(double distance) { return distance < INFINITY ? distance : NAN; }

constexpr int kRefineThreads = 128;

// Recomputes the distances of one query that decide its result. `nearest` is the smallest distance
// to references of other chunks, or null. Distances are recomputed where the weight may be more
// than e^-20 times the largest, if these are few or if the typical error would change their
// weights. Distances that overflow float32 are always recomputed. G·y is recomputed for the same
// references, if there is a G.
template <class R>
__global__ void __launch_bounds__(kRefineThreads)
    refine(const Rows<float> x, const Rows<float> upstream, const Rows<R> y, int features,
           const double* radius, const double* nearest, const WeightLaw law, const Pairs pairs,
           int block_tiles) {
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

  double near = law.near_limit(base, norm, r);
  int competing = 0;
  for (int tile = thread; tile < pairs.tiles; tile += kRefineThreads)
    competing += low[tile] <= near;
  competing = over_block(competing, reinterpret_cast<int*>(scratch), Sum());
  if (competing > kFewTiles && !law.changes_weight(law.typical_error(base, norm), base, r, 3e-4) &&
      near < INFINITY)
    near = -1;

  const Lane lane = this_lane();
  const int first = static_cast<int>(blockIdx.x) * block_tiles;
  for (int tile = first; tile < smaller(first + block_tiles, pairs.tiles); ++tile) {
    if (!(low[tile] <= near)) continue;
    for (int j = lane.warp; j < kTileReferences; j += kRefineThreads / 32) {
      const Index reference = static_cast<Index>(tile) * kTileReferences + j;
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
