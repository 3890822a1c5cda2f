// Distances that must be exact, on CUDA devices.
//
// Products and differences in float32 lose digits, and the exponent (N + D)/2 multiplies the error.
// find_limits decides from the error that would be left in the mean which distances of a query
// matter, and lists them. refine computes these from differences in two floats, one warp for each.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kRefineThreads = 512, kRefineWarps = kRefineThreads / 32;
constexpr int kRefineBlocks = 2;  // of a multiprocessor

// ---- limits ----------------------------------------------------------------------------------

// (e^u − 1)/u of u ≥ 0, to about 2^-14.
__device__ inline float relative_growth(float u) {
  const float series = 1 + u * (1 / 2.0f + u * (1 / 6.0f + u * (1 / 24.0f + u * (1 / 120.0f))));
  return u < 0.5f ? series : (exponential(u) - 1) * reciprocal(fmaxf(u, 0.5f));
}

// log a/b of positive numbers, to about 2^-20. Zero counts as a very small number.
__device__ inline float logarithm_of_ratio(double a, double b) {
  const auto front = [](double v) {
    return static_cast<float>(double_of((bits_of(v) & 0xfffffffffffff) | std::int64_t{1023} << 52));
  };
  const auto power = static_cast<int>(bits_of(a) >> 52) - static_cast<int>(bits_of(b) >> 52);
  return logarithm(2 * front(a) * reciprocal(front(b))) +
         static_cast<float>(power - 1) * 0.693147181f;
}

// The limit of one query. The error of a distance is at most law.margin (|x|² + |y|²). Its part
// that differs between references is typically law.noise (2|x||y| + |y|²) for products, and
// law.noise (|x|² + d²) for differences. (exponent/s)·error is the relative error of a weight. If n
// weights are within a nat of the largest, their errors average out in the mean by a factor of at
// least √(n/e). If more than kTolerance is left, or the log-sum-exp lacks digits, references are
// refined down to a weight of e^-kNear times the largest, or of e^-n times it if n = law.others +
// log(error/allowed) is smaller. All others together are then so small that even a bias of this
// size does not matter (docs/kernels.md has an example).
struct QueryLimit {
  double base, norm;  // the smallest distance, |x|²
  double root;        // |x|
  double s, within;   // of `base`; `within` is the excess that lowers a weight by a nat
  double smallest;    // error of values too small for float16, or of squares too small for float32
  double bound;       // of the error of a difference between distances
  double near;        // only smaller distances are refined

  // `width` is √features. Without PRODUCTS distances are found from differences. `per_scale` is 1
  // over the scale of the centred references.
  template <bool PRODUCTS>
  __device__ void start(const WeightLaw& law, double r, float width, float per_scale) {
    root = square_root64(norm);
    s = law.scale(base, r);
    // Values of references are rounded to multiples of 2^-24 of their scale. The bound of the error
    // uses |y|² ≤ 2 (d² + |x|²). It counts twice, because the smallest distance has an error too.
    smallest = PRODUCTS ? root * (0x1p-24 * per_scale) : width * width * 0x1p-126;
    const float smallest_count = PRODUCTS ? 4 * width : 4;
    bound = 2 * law.margin * (3 * norm + 2 * base) + smallest_count * smallest;
    within = s * law.per_exponent;
    near = base + bound + law.near_spread * s;
    if (!(near == near)) near = INFINITY;
  }

  // The typical error of a distance; `y_squared` is |y|².
  template <bool PRODUCTS>
  __device__ double noise(const WeightLaw& law, double y_squared) const {
    if (!PRODUCTS) return law.byte_noise * (norm + base) + law.noise * base;
    return law.noise * (2 * root * square_root64(y_squared) + y_squared);
  }

  // Below this distance they are refined: 0 if errors do not change the result. `farthest` is the
  // largest |y|² that may be refined, `close` the number of tiles with a weight within a nat of the
  // largest.
  template <bool PRODUCTS>
  __device__ double largest(const WeightLaw& law, double farthest, int close) const {
    const double error = smallest + noise<PRODUCTS>(law, farthest);
    // The error may be at most √averaged times that of one weight, and as large as the score
    // allows.
    const double one = kTolerance * within;
    const float averaged = fmaxf(static_cast<float>(close) * (1 / 2.718f), 1);
    const float score_limit = fmaxf(1, law.score_size(base, s)) * static_cast<float>(kDigits);
    const double most = one * fminf(square_root(averaged), score_limit);
    if (!(error > most || near == INFINITY))  // The smallest distance is a result itself.
      return error > kTolerance * kDigits * base ? base + bound : 0;
    const float nats = law.others + logarithm_of_ratio(error, one * fminf(1, score_limit));
    if (near == INFINITY || !(nats < static_cast<float>(kNear))) return near;
    const float few = fmaxf(nats, 0);
    return base + bound + few * relative_growth(few * law.per_power) * within;
  }

  // The power of two that brings √near to at least 1, below 2, or the nearest one that float32
  // holds together with its double.
  __device__ float unit() const {
    if (!(near < INFINITY)) return 0x1p-76f;  // float32 then holds the squares of all differences
    const int power = (static_cast<int>(bits_of(near) >> 52) - 1023) >> 1;
    const int biased = 127 - power;
    return float_of(static_cast<std::uint32_t>(biased < 1 ? 1 : biased > 253 ? 253 : biased) << 23);
  }
};

// Distances are compared by their bits, which takes no float64. These are the bits of |v|.
__device__ inline std::int64_t bits_of_size(double v) { return bits_of(v) & 0x7fffffffffffffff; }
__device__ inline bool is_finite(double v) {
  return static_cast<std::uint64_t>(bits_of_size(v)) < kInfiniteBits;
}

template <int WARPS>
struct LimitMemory {
  std::int64_t least[WARPS], farthest[WARPS];
  int close[WARPS];
  std::int64_t near, close_to;  // QueryLimit::near; the largest minimum of a close tile
  std::int64_t limit;           // finite distances below it are refined

  // The minima and the norm bounds of all tiles follow.
  static std::size_t bytes(int tiles) {
    return sizeof(LimitMemory) + 2 * sizeof(double) * static_cast<std::size_t>(tiles);
  }
};

// ---- the list of pairs -----------------------------------------------------------------------

// The tile that a warp takes at its turn number `turn`. It may be after the last one.
template <int WARPS>
__device__ inline int tile_of(int turn, int warp) {
  return turn * WARPS + warp;
}

constexpr int kTilesAtOnce = 4;  // tiles that a warp looks through at once

// Some tiles of a query, and the two references of this lane in each.
struct SomeTiles {
  int tile[kTilesAtOnce];   // −1 after the last one
  int first[kTilesAtOnce];  // the lane's first reference, or 0 if it has none
  int left[kTilesAtOnce];   // how many references there are from the first one on
  double2 distance[kTilesAtOnce];
  unsigned refined[kTilesAtOnce][2];  // a bit for each lane whose distance is refined
  std::int64_t least[kTilesAtOnce];   // the smallest of all other distances

  // Starts to load the tiles of the lowest set bits of `candidates`, and clears these bits.
  template <int WARPS>
  __device__ void load(const double* squared, int references, int turn, unsigned& candidates,
                       const Lane& lane) {
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i, candidates &= candidates - 1) {
      const int next = turn + __ffs(static_cast<int>(candidates)) - 1;
      tile[i] = candidates != 0 ? tile_of<WARPS>(next, lane.warp) : -1;
      const int j = tile[i] * kTileReferences + 2 * lane.lane;
      left[i] = tile[i] < 0 ? 0 : references - j;
      first[i] = left[i] > 0 ? j : 0;
      distance[i] = *reinterpret_cast<const double2*>(squared + first[i]);
    }
  }

  // Marks the distances below the limit and those that are not finite in `refined`, and finds the
  // smallest of the others. Returns the number of marks.
  __device__ unsigned select(std::int64_t limit) {
    // A distance stays if limit ≤ bits < kInfiniteBits: one comparison of unsigned numbers.
    const auto from = static_cast<std::uint64_t>(limit), between = kInfiniteBits - from;
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      least[i] = kInfiniteBits;
      for (int e = 0; e < 2; ++e) {
        const std::int64_t bits = bits_of(e == 0 ? distance[i].x : distance[i].y);
        const bool stays = static_cast<std::uint64_t>(bits) - from < between;
        refined[i][e] = __ballot_sync(kAll, left[i] > e && !stays);
        count += static_cast<unsigned>(__popc(refined[i][e]));
        if (left[i] > e && stays) least[i] = Least()(least[i], bits);
      }
      least[i] = least_of_warp(least[i]);
    }
    return count;
  }

  // Writes the indices of the marked pairs to `list`, and stores the minima of the tiles. `row` is
  // the index of the query's first pair.
  __device__ void store(unsigned* list, unsigned row, double* lowest, const Lane& lane) const {
    const unsigned before = (1u << lane.lane) - 1;  // the lanes before this one
    int stored = -1;                                // each of the first lanes stores one minimum
    std::int64_t minimum = 0;
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      for (int e = 0; e < 2; ++e) {
        if ((refined[i][e] >> lane.lane & 1u) != 0)
          list[__popc(refined[i][e] & before)] = row + static_cast<unsigned>(first[i] + e);
        list += __popc(refined[i][e]);
      }
      if (lane.lane == i) stored = tile[i], minimum = least[i];
    }
    if (stored >= 0) lowest[stored] = double_of(minimum);
  }
};

// Lists the pairs of a query whose distance is below the limit, or not finite. The minima of
// their tiles, which are in `low`, become those of all other distances. All warps of a block call
// this. The order of the list may differ between runs.
template <int WARPS>
__device__ inline void list_pairs(const Pairs& pairs, Index query, int references,
                                  std::int64_t limit, const double* low) {
  const Lane lane = this_lane();
  const Index row = query * pairs.stride;
#pragma unroll 1
  for (int turn = 0; tile_of<WARPS>(turn, 0) < pairs.tiles; turn += 32) {
    const int tile = tile_of<WARPS>(turn + lane.lane, lane.warp);
    unsigned candidates = __ballot_sync(kAll, tile < pairs.tiles && bits_of(low[tile]) < limit);
#pragma unroll 1
    while (candidates != 0) {
      SomeTiles tiles;
      tiles.load<WARPS>(pairs.squared + row, references, turn, candidates, lane);
      const unsigned count = tiles.select(limit);
      const unsigned at = lane.lane == 0 ? atomicAdd(pairs.listed, count) : 0;
      tiles.store(pairs.list + __shfl_sync(kAll, at, 0), static_cast<unsigned>(row),
                  pairs.lowest + query * pairs.tiles, lane);
    }
  }
}

// ---- find_limits -----------------------------------------------------------------------------

// Finds the limit of a query, and lists its pairs up to it. units[query] is the power of two by
// which differences are multiplied, so that float32 holds their squares. `nearest` is the smallest
// distance to references of other chunks, or null; `width` is √features; `scale` is that of the
// centred references. Without PRODUCTS distances were found from differences.
template <bool PRODUCTS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 1)
    find_limits(const WeightLaw law, const double* radius, const double* nearest, const Pairs pairs,
                int references, float width, const float* scale, float* units) {
  auto& shared = *reinterpret_cast<LimitMemory<WARPS>*>(shared_memory());
  double* const low = reinterpret_cast<double*>(&shared + 1);
  double* const reach = low + pairs.tiles;
  const Lane lane = this_lane();
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  // One warp does the arithmetic in float64. Those of the blocks of a multiprocessor are spread
  // over its schedulers.
  const bool computes = lane.warp == static_cast<int>((blockIdx.x * 2654435769u >> 29) % WARPS);
  QueryLimit limit = {};
  limit.base = nearest ? nearest[query] : INFINITY;
  limit.norm = pairs.norms[query];
  const double r = radius[query];

  std::int64_t least = kInfiniteBits;
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += 32 * WARPS) {
    low[tile] = pairs.lowest[query * pairs.tiles + tile];
    if (PRODUCTS) reach[tile] = pairs.reach[tile];
    least = Least()(least, bits_of_size(low[tile]));
  }
  least = least_of_warp(least);
  if (lane.lane == 0) shared.least[lane.warp] = least;
  __syncthreads();
  if (computes) {
    for (const std::int64_t bits : shared.least) least = Least()(least, bits);
    limit.base = fmin(limit.base, double_of(least));
    limit.start<PRODUCTS>(law, r, width, PRODUCTS ? scale[1] : 0);
    if (lane.lane == 0) {
      shared.near = bits_of(limit.near);
      shared.close_to = bits_of(limit.base + limit.within);
    }
  }
  __syncthreads();

  std::int64_t farthest = 0;
  int close = 0;
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += 32 * WARPS) {
    const std::int64_t bits = bits_of_size(low[tile]);
    close += bits <= shared.close_to;
    if (PRODUCTS && bits <= shared.near) farthest = Most()(farthest, bits_of(reach[tile]));
  }
  farthest = -least_of_warp(-farthest);
  close = __reduce_add_sync(kAll, close);
  if (lane.lane == 0) shared.farthest[lane.warp] = farthest, shared.close[lane.warp] = close;
  __syncthreads();
  if (computes) {
    for (const std::int64_t bits : shared.farthest) farthest = Most()(farthest, bits);
    close = 0;
    for (const int each : shared.close) close += each;
    const double largest = limit.largest<PRODUCTS>(law, double_of(farthest), close);
    if (lane.lane == 0) {
      const std::int64_t most = kInfiniteBits;
      shared.limit = Least()(bits_of(largest), most);
      units[query] = limit.unit();
    }
  }
  __syncthreads();
  list_pairs<WARPS>(pairs, query, references, shared.limit, low);
}

// ---- differences in two floats ---------------------------------------------------------------

// This lane's part of Σ (unit (x − y))²; `unit` is a power of two. With CUT, differences count as
// at most 2^55: such a reference is too far away to have a weight. Without it, a sum that is too
// large is not finite.
template <bool CUT, class R>
__device__ inline TwoFloats sum_of_squares(const float* x, const R* y, int features, float unit,
                                           int lane) {
  constexpr int kAhead = CUT ? 1 : 16;  // loads of each row that are under way together
  const R zero = {};
  const float nothing = two_floats(&zero).high;  // its difference from `zero` is 0
  const float twice = 2 * unit;
  TwoFloats total = {};
  x += lane, y += lane;
#pragma unroll 1
  for (int left = features; left > 0; left -= 32 * kAhead) {
    float a[kAhead];
    R b[kAhead];
    if (left >= 32 * kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) a[i] = x[32 * i], b[i] = y[32 * i];
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const bool inside = lane + 32 * i < left;
        a[i] = inside ? x[32 * i] : nothing;
        b[i] = inside ? y[32 * i] : zero;
      }
    }
    x += 32 * kAhead, y += 32 * kAhead;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const TwoFloats y_value = two_floats(&b[i]);
      // With the larger operand first, the rounding error takes two additions rather than five
      // (Dekker's fast two-sum). The comparison leaves the units that add and multiply free.
      const bool x_first = fabsf(a[i]) >= fabsf(y_value.high);
      const float one = x_first ? a[i] : -y_value.high, other = x_first ? -y_value.high : a[i];
      float high = one + other, rest = other - (high - one);
      const bool finite = fabsf(high) < INFINITY;
      high *= unit, rest = (rest - y_value.low) * twice;
      if constexpr (CUT) {
        const bool cut = finite && fabsf(high) > 0x1p55f;
        high = cut ? 0x1p55f : high, rest = cut ? 0 : rest;
      }
      // If the query is a rounded byte, the rest may be all of the difference: its square counts.
      const float more = std::is_same_v<R, std::uint8_t> ? high + 0.25f * rest : high;
      // (high + rest/2)² with what float32 loses of high²: the score may be thousands of nats.
      total.add_product(high, high);
      total.low += more * rest;
    }
  }
  return total;
}

// Σ (x − y)², computed by a warp. All lanes get the result. If the input is not finite, it is NaN,
// which reaches the result; infinity would not.
template <class R>
__device__ inline double squared_distance(const float* x, const R* y, int features, float unit,
                                          int lane) {
  TwoFloats part = sum_of_squares<false>(x, y, features, unit, lane);
  if (!(part.high < INFINITY)) part = sum_of_squares<true>(x, y, features, unit, lane);
  part = over_warp(TwoFloats{part.high * 0x1p-6f, part.low * 0x1p-6f});  // float32 holds the sum
  // If one reference is far from all others, `unit` may be too small for the squares of the others.
  if (part.high < 0x1p-60f && unit < 0x1p60f) {
    unit *= 0x1p60f;
    part = sum_of_squares<true>(x, y, features, unit, lane);
    part = over_warp(TwoFloats{part.high * 0x1p-6f, part.low * 0x1p-6f});
  }
  const std::int64_t power =
      127 - static_cast<std::int64_t>(bits_of(unit) >> 23);  // 1/unit = 2^power
  const double factor = double_of((1023 + 2 * power + 6) << 52);
  const double sum = part.sum() * factor;
  // Rounding may leave less than 0, which would say that a distance is NaN.
  return is_finite(sum) ? (sum < 0 ? 0 : sum) : NAN;
}

// Computes the listed distances of a chunk again. Updates the minima of their tiles, to −1 if a
// distance is NaN. A warp takes one pair at a time. A block takes neighbouring pairs of the list,
// most of them of one query, whose row then comes from the L1 cache.
template <class R>
__global__ void __launch_bounds__(kRefineThreads, kRefineBlocks)
    refine(const Rows<float> x, const Rows<R> y, int features, const float* units,
           const Pairs pairs) {
  const Lane lane = this_lane();
  const unsigned block = blockIdx.x, listed = *pairs.listed;
  const unsigned each = listed / gridDim.x, more = listed % gridDim.x;  // blocks have one more
  const unsigned begin = block * each + (block < more ? block : more);
  const unsigned end = begin + each + (block < more ? 1 : 0);
  const auto stride = static_cast<unsigned>(pairs.stride);
#pragma unroll 1
  for (unsigned i = begin + static_cast<unsigned>(lane.warp); i < end; i += kRefineWarps) {
    const unsigned pair = pairs.list[i], query = pair / stride, reference = pair % stride;
    const double distance =
        squared_distance(x.row(query), y.row(reference), features, units[query], lane.lane);
    if (lane.lane == 0) {
      pairs.squared[pair] = distance;
      double* const lowest = pairs.lowest + static_cast<Index>(query) * pairs.tiles;
      atomic_least(lowest + reference / kTileReferences, is_finite(distance) ? distance : -1);
    }
  }
}

}  // namespace
}  // namespace pfgm
