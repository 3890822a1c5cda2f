// Distances that must be exact, on CUDA devices.
//
// Products and differences in float32 lose digits, and the exponent (N + D)/2 multiplies the error.
// find_limits decides from the error that would be left in the mean which distances of a query
// matter. refine computes these from differences in two floats, one warp for each. A reference that
// float16 cannot hold has no products; refine also finds its G·y.
#pragma once
#include "cuda/distances.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kLimitThreads = 128, kRefineThreads = 256;

// Of each query: the largest distance that is refined, which may be −1, and the power of two by
// which differences are multiplied, so that float32 holds their squares.
struct Limits {
  double near, unit;
};

// `nearest` is the smallest distance to references of other chunks, or null; `scale` that of the
// centred references, or null if distances are found from differences.
//
// The error of a distance is at most law.margin (|x|² + |y|²). Its part that differs between
// references is typically law.noise (2|x||y| + |y|²) for products, and law.noise (|x|² + d²) for
// differences. (exponent/s)·error is the relative error of a weight. If n weights are within a nat
// of the largest, their errors average out in the mean by a factor of at least √(n/e). If more than
// kTolerance is left, or the log-sum-exp lacks digits, all references are refined whose weight may
// be more than e^-kNear times the largest.
__global__ void __launch_bounds__(kLimitThreads)
    find_limits(const WeightLaw law, const double* radius, const double* nearest, const Pairs pairs,
                int features, const float* scale, Limits* limits) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const double* low = pairs.lowest + query * pairs.tiles;
  double base = INFINITY;
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += kLimitThreads)
    base = fmin(base, fabs(low[tile]));
  base = over_block<kLimitThreads>(base, scratch, Least());
  if (nearest) base = fmin(nearest[query], base);

  const double r = radius[query], norm = pairs.norms[query], s = base + r * r;
  // The bound of the error uses |y|² ≤ 2 (d² + |x|²). It counts twice, because the smallest
  // distance has an error too. Values too small for float16, and squares too small for float32,
  // have an error of their own.
  const double smallest = scale ? sqrt(norm) * 0x1p-24 / *scale : features * 0x1p-126;
  const double of_smallest = scale ? 4 * sqrt(static_cast<double>(features)) : 4;
  const double bound = 2 * law.margin * (3 * norm + 2 * base) + of_smallest * smallest;
  const double within = law.gaussian ? 2 * r * r : s / law.exponent;
  double near = base + bound + (law.gaussian ? kNear * within : law.near_spread * s);
  if (!(near == near)) near = INFINITY;

  double farthest = 0;
  int close = 0;
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += kLimitThreads) {
    close += fabs(low[tile]) <= base + within;
    if (scale && fabs(low[tile]) <= near) farthest = fmax(farthest, pairs.reach[tile]);
  }
  farthest = over_block<kLimitThreads>(farthest, scratch, Most());
  close = over_block<kLimitThreads>(close, reinterpret_cast<int*>(scratch), Sum());
  if (thread > 0) return;
  // The rounding errors of single differences mostly average out.
  const double noise = scale ? law.noise * (2 * sqrt(norm * farthest) + farthest)
                             : law.noise * (norm + base) + 0x1p-26 * base;
  const double error = smallest + noise;
  const double score = law.gaussian ? (base == 0 ? 0 : base / within)
                                    : law.exponent * fabsf(logf(static_cast<float>(s)));
  const double averaged = kTolerance * sqrt(fmax(close / 2.718, 1.0));
  const double allowed = fmin(averaged, kTolerance * fmax(1.0, score) / 16);
  const bool matters = error > allowed * within || near == INFINITY;
  const float unit = near < INFINITY ? scale_to(static_cast<float>(sqrt(near)), 0) : 0x1p-76f;
  limits[query] = {matters ? near : -1, unit};
}

// ---- differences in two floats ---------------------------------------------------------------

struct TwoFloats {
  float high, low;
};

// A reference's value as high + low, exact.
template <class R>
__device__ inline TwoFloats two_floats(const R* from) {
  return {load_float(from), 0};
}
__device__ inline TwoFloats two_floats(const std::uint8_t* from) {
  const float whole = static_cast<float>(2 * static_cast<int>(*from) - 255);
  const float high = whole * (1 / 255.0f);
  // The remainder in products of few digits, which are exact without a fused operation.
  const float front = float_of(bits_of(high) & 0xfffff000u);
  return {high, ((whole - front * 255) - (high - front) * 255) * (1 / 255.0f)};
}

// Σ (x − y)², computed by a warp; `unit` is a power of two. All lanes get the result. It is
// infinite only if the input is not finite. NaN then reaches the result; infinity would not.
template <class R>
__device__ inline double squared_distance(const float* x, const R* y, int features, float unit,
                                          int lane) {
  constexpr int kAhead = 8;  // loads of each row that are under way together
  float total = 0, lost = 0;
#pragma unroll 1
  for (int start = lane; start < features; start += 32 * kAhead) {
    float a[kAhead];
    R b[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool inside = start + 32 * i < features;
      a[i] = inside ? x[start + 32 * i] : 0;
      b[i] = inside ? y[start + 32 * i] : R{};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const TwoFloats of_y = two_floats(&b[i]);
      float high = a[i] - of_y.high;
      const float of_b = high - a[i];
      float rest = (a[i] - (high - of_b)) - (of_y.high + of_b);
      high *= unit, rest = (rest - of_y.low) * unit;
      // A reference with larger differences is too far away to have a weight.
      const bool cut = fabsf(high) > 0x1p55f && rest == rest;
      high = cut ? 0x1p55f : high, rest = cut ? 0 : rest;
      const float square = high * high + 2 * high * rest;
      add_compensated(total, lost, start + 32 * i < features ? square : 0);
    }
  }
  const double sum = over_warp(static_cast<double>(total) - lost, Sum()) / unit / unit;
  return sum < INFINITY ? sum : NAN;
}

// Σ g (y − centre), computed by a warp; lane 0 gets the result.
template <class R>
__device__ inline float centered_product(const float* g, const R* y, const float* center,
                                         int features, int lane) {
  float total = 0, lost = 0;
#pragma unroll 1
  for (int k = lane; k < features; k += 32)
    add_compensated(total, lost, g[k] * (load_float(y + k) - center[k]));
  return static_cast<float>(over_warp(static_cast<double>(total) - lost, Sum()));
}

constexpr int kRefineWarps = kRefineThreads / 32;
constexpr int kHalves = kTileReferences / 32;  // of a tile

template <int TILES>
struct RefineMemory {
  int counts[kRefineWarps];             // of needed distances in each half of a tile
  int needed[TILES * kTileReferences];  // which they are
  double low[TILES][kRefineWarps];      // the smallest that each warp knows of
};

// Recomputes the distances of one query up to its limit, and all that are not finite. The minima of
// tiles become those of the new distances, −1 if one is NaN. A block has TILES tiles. Each warp
// looks through half a tile; then all take turns with the pairs that were found. `upstream` and
// `center` may be null.
template <class R, int TILES>
__global__ void __launch_bounds__(kRefineThreads, 1)
    refine(const Rows<float> x, const Rows<float> upstream, const Rows<R> y, const float* center,
           int features, const Limits* limits, const Pairs pairs) {
  static_assert(TILES * kHalves <= kRefineWarps, "each half has a warp");
  RefineMemory<TILES>& shared = *reinterpret_cast<RefineMemory<TILES>*>(shared_memory());
  const Lane lane = this_lane();
  const Index query = blockIdx.y;
  const int first = static_cast<int>(blockIdx.x) * TILES;
  const int tiles = static_cast<int>(smaller(TILES, pairs.tiles - first));
  double* const lowest = pairs.lowest + query * pairs.tiles + first;
  const Limits limit = limits[query];
  const double least = lane.lane < tiles ? lowest[lane.lane] : INFINITY;
  const unsigned alive = __ballot_sync(kAll, least < 0 || least <= limit.near);
  if (alive == 0) return;  // the same for all warps

  const Index reference0 = static_cast<Index>(first) * kTileReferences;
  double* const squared = pairs.squared + query * pairs.stride + reference0;
  const int j0 = 32 * lane.warp + lane.lane, tile0 = lane.warp / kHalves;
  const bool inside = tile0 < tiles && (alive >> tile0 & 1u) != 0 && reference0 + j0 < y.count;
  const double known = inside ? squared[j0] : INFINITY;
  const bool needed = inside && (known <= limit.near || !(known < INFINITY));
  const unsigned bits = __ballot_sync(kAll, needed);
  double low = over_warp(needed ? INFINITY : known, Least());
  if (lane.lane == 0) shared.counts[lane.warp] = __popc(bits);
  if (lane.lane < TILES) shared.low[lane.lane][lane.warp] = lane.lane == tile0 ? low : INFINITY;
  __syncthreads();
  int place = __popc(bits & ((1u << lane.lane) - 1)), count = 0;
#pragma unroll
  for (int w = 0; w < kRefineWarps; ++w) {
    if (w < lane.warp) place += shared.counts[w];
    count += shared.counts[w];
  }
  if (needed) shared.needed[place] = j0;
  __syncthreads();

#pragma unroll 1
  for (int i = lane.warp; i < count; i += kRefineWarps) {
    const int j = shared.needed[i];
    const double distance = squared_distance(x.row(query), y.row(reference0 + j), features,
                                             static_cast<float>(limit.unit), lane.lane);
    if (lane.lane == 0) {
      squared[j] = distance;
      double& own = shared.low[j / kTileReferences][lane.warp];
      own = distance == distance ? fmin(own, distance) : -1;
    }
    if (!upstream.at || !center) continue;
    float& projected = pairs.projected[query * pairs.stride + reference0 + j];
    if (fabsf(projected) < INFINITY) continue;  // the same for all lanes
    __syncwarp();
    const float product =
        centered_product(upstream.row(query), y.row(reference0 + j), center, features, lane.lane);
    if (lane.lane == 0) projected = product;
  }
  __syncthreads();
  const int tile = static_cast<int>(threadIdx.x);
  if (tile >= tiles || (alive >> tile & 1u) == 0) return;
  low = shared.low[tile][0];
  for (int w = 1; w < kRefineWarps; ++w) low = fmin(low, shared.low[tile][w]);
  lowest[tile] = low;
}

}  // namespace
}  // namespace pfgm
