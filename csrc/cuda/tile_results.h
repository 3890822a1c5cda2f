// What becomes of the sums of a tile of pairs: distances and their minima, G·y, or the sums over a
// slice of the features. The main loop (cuda/warp_products.h) computes the sums.
#pragma once
#include "cuda/arrays.h"
#include "cuda/squared_distances.h"
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// ---- minima ------------------------------------------------------------------------------------

// Empties the list. find_limits, a later launch of the stream, fills it.
__device__ inline void clear_list(const Pairs& out) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *out.listed = 0;
}

// The smallest distance as it is stored: −0 becomes −1e-300, so that every marked one is below 0.
__device__ inline double stored_lowest(double least) {
  return signbit(least) ? -fmax(-least, 1e-300) : least;
}

// The smallest distance of each query, as bits: one row for each g and group of warps. Lanes write
// 16 bytes each. Rows are padded so that eight lanes, which write to two rows, reach different
// banks. finite[w] says whether all distances of warp w are finite.
template <int QUERIES, int ROWS, int THREADS>
struct LeastOfRows {
  alignas(16) std::uint64_t rows[ROWS][QUERIES + 8];
  bool finite[THREADS / 32];
};

// Stands for |y − centre|² after the last reference. Such distances are larger than all real ones,
// which are sums of squares of float32.
constexpr double kBeyondAll = 0x1p1000;

// Stores the smallest distance of each tile of references for each query. It is marked in all tiles
// of the block if a distance of these is not finite.
template <int REFERENCES, int QUERIES, int ROWS, int THREADS>
__device__ inline void store_lowest(const LeastOfRows<QUERIES, ROWS, THREADS>& least, int query0,
                                    int queries, const Pairs& out) {
  constexpr int kTiles = REFERENCES / kTileReferences, kTileRows = ROWS / kTiles;
  bool finite = true;
  for (const bool each : least.finite) finite = finite && each;
#pragma unroll
  for (int start = 0; start < QUERIES * kTiles; start += THREADS) {
    const int i = start + static_cast<int>(threadIdx.x), q = i % QUERIES, local_tile = i / QUERIES;
    const int tile = static_cast<int>(blockIdx.x) * kTiles + local_tile;
    if (i >= QUERIES * kTiles || query0 + q >= queries || tile >= out.tiles) continue;
    std::uint64_t lowest = kInfiniteBits;
#pragma unroll
    for (int row = 0; row < kTileRows; ++row)
      lowest = Least()(lowest, least.rows[kTileRows * local_tile + row][q]);
    const double distance = double_of(lowest) < kBeyondAll / 2 ? double_of(lowest) : INFINITY;
    out.lowest[static_cast<Index>(query0 + q) * out.tiles + tile] =
        stored_lowest(finite ? distance : -distance);
  }
}

// A reference's part in the norm bound of its tile: |y − centre|², or 0 if it is too large for
// products in float16.
__device__ inline double reach_of(double scaled, double squared, int features, bool exists) {
  return exists && scaled <= features * 0x1p32 ? squared : 0;
}

// Stores the norm bound of each tile of the block.
template <int REFERENCES>
__device__ inline void store_reach(const double (&farthest)[REFERENCES / 16], const Pairs& out) {
  constexpr int kTiles = REFERENCES / kTileReferences, kSlabs = kTileReferences / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int tile = static_cast<int>(blockIdx.x) * kTiles + thread;
  if (blockIdx.y > 0 || thread >= kTiles || tile >= out.tiles) return;
  double most = 0;
  for (int i = 0; i < kSlabs; ++i) most = fmax(most, farthest[kSlabs * thread + i]);
  out.reach[tile] = most;
}

// ---- projections -------------------------------------------------------------------------------

// Multiplies a product, a sum of two floats, by its unit. This power of two may be out of the range
// of float32, so it is applied as two factors.
class ProductUnit {
 public:
  __device__ explicit ProductUnit(double unit) {
    const int power = exponent_of(unit) - 1023;
    half_ = power_of_two(power / 2), rest_ = power_of_two(power - power / 2);
  }
  __device__ float operator()(float2 product) const {
    return (product.x + product.y) * half_ * rest_;
  }

 private:
  float half_, rest_;
};

// Σ g (y − centre), computed by a warp; lane 0 gets the result.
template <class R>
__device__ inline float centered_product(const float* g, const R* y, const float* center,
                                         int features, int lane) {
  TwoFloats total = {};
#pragma unroll 1
  for (int k = lane; k < features; k += 32) total.add(g[k] * (load_float(y + k) - center[k]));
  return static_cast<float>(over_warp(total.sum(), Sum()));
}

// A warp's part of a tile: some queries, and at most 32 references, one for each of the first
// lanes.
struct TilePart {
  int query0, queries, reference0, references;
};

// Replaces what is not finite in G·y, which the warp has stored, by sums of float32 products.
template <class R>
__device__ inline void replace_infinite(const TilePart& part, const Rows<float>& upstream,
                                        const Rows<R>& y, const Center& center, const Pairs& out,
                                        const Lane& lane) {
  __syncwarp();
  const bool exists =
      lane.lane < part.references && part.reference0 + lane.lane < static_cast<int>(y.count);
#pragma unroll 1
  for (int query = part.query0; query < part.query0 + part.queries && query < upstream.count;
       ++query) {
    float* const row = out.projected + query * out.stride + part.reference0;
    unsigned infinite =
        __ballot_sync(kAll, exists && !(fabsf(row[exists ? lane.lane : 0]) < INFINITY));
#pragma unroll 1
    for (; infinite != 0; infinite &= infinite - 1) {
      const int i = __ffs(static_cast<int>(infinite)) - 1;
      const float product = centered_product(upstream.row(query), y.row(part.reference0 + i),
                                             center.at, center.features, lane.lane);
      if (lane.lane == 0) row[i] = product;
    }
  }
}

// ---- the tile of a block -----------------------------------------------------------------------

// Sums that the other half of the warps finishes.
template <int REFERENCES, int QUERIES>
struct OtherHalf {
  float2 products[REFERENCES][QUERIES + 1];
};
template <int QUERIES>
struct OtherHalf<0, QUERIES> {};

// What a block shares when its main loop has ended.
template <class Loop>
struct TileSums : OtherHalf<(Loop::kParts > 1 ? Loop::kReferences : 0), Loop::kQueries> {
  double squares[Loop::kParts][Loop::kReferences];
  LeastOfRows<Loop::kQueries, 8 * Loop::kGroups, Loop::kThreads> least;
  double farthest[Loop::kReferences / 16];

  // |y − centre|² of a reference, times the square of the scale.
  __device__ double scaled_square(int row) const {
    double sum = squares[0][row];
    for (int more = 1; more < Loop::kParts; ++more) sum += squares[more][row];
    return sum;
  }

  // Stores the squares of references g and g + 8 of the 16 from `first` on, whose parts the lanes t
  // have.
  __device__ void store_squares(int part, int first, const Lane& lane,
                                const TwoFloats (&square)[2]) {
    for (int e = 0; e < 2; ++e) {
      const double sum = over_quad(square[e].sum());
      if (lane.t == 0) squares[part][first + 8 * e + lane.g] = sum;
    }
  }
};

template <class Loop>
struct TileMemory {
  union {
    typename Loop::Memory loop;
    TileSums<Loop> sums;
  };
  double units[Loop::kQueries], norms[Loop::kQueries];
};

// Sums of a thread, in registers: total + rest.
template <class Loop> using Sums = float[Loop::kSlabs][Loop::kColumns][4];

// Which sums of the tile a thread has: those of its warp's slabs of 16 references with columns of 8
// queries. If kParts is 2, both halves of the warps have the same sums, over alternate panels. Each
// half then finishes half of the columns, with the sums of the other half. Otherwise each half has
// columns of its own.
template <class Loop>
struct ThreadSums {
  static constexpr int kColumns = Loop::kColumns / Loop::kParts;  // that the thread finishes
  const Lane lane = this_lane();
  const int reference0 = static_cast<int>(blockIdx.x) * Loop::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * Loop::kQueries;
  // Unsigned, so that compilers compute them again in two instructions rather than keep them.
  const int group = static_cast<int>(threadIdx.x / 32 % Loop::kGroups);
  const int half = static_cast<int>(threadIdx.x / 32 / Loop::kGroups);
  const int part = Loop::kParts > 1 ? half : 0;
  const int side0 = Loop::kSides > 1 ? 8 * Loop::kColumns* half : 0;  // first query of the warp

  __device__ int row(int slab) const { return 16 * (Loop::kSlabs * group + slab) + lane.g; }
  __device__ int first_query() const { return side0 + 8 * kColumns * part; }
};

// Loads what the results need of the queries of a block.
template <Target TARGET, class Loop>
__device__ inline void load_queries(TileMemory<Loop>& shared, const Halves& x, int query0,
                                    const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= Loop::kQueries) return;
  const int query = query0 + q < x.rows ? query0 + q : 0;
  shared.units[q] = x.units[query];
  if constexpr (TARGET == Target::distances) shared.norms[q] = out.norms[query];
}

// Stores the sums that the other half of the warps finishes in shared memory, and moves the
// thread's own ones to the first columns.
template <class Loop>
__device__ inline void exchange_halves(TileSums<Loop>& sums, Sums<Loop>& total, Sums<Loop>& rest,
                                       const ThreadSums<Loop>& at) {
  constexpr int kColumns = ThreadSums<Loop>::kColumns;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * (kColumns * (1 - at.part) + j) + 2 * at.lane.t + i % 2;
      const int kept = kColumns + j;
      const float sum = at.part > 0 ? total[0][j][i] : total[0][kept][i];
      const float more = at.part > 0 ? rest[0][j][i] : rest[0][kept][i];
      sums.products[at.row(0) + 8 * (i / 2)][column] = {sum, more};
      if (at.part > 0) total[0][j][i] = total[0][kept][i], rest[0][j][i] = rest[0][kept][i];
    }
}

// The whole sum of a pair: `sum`, and the sum of the other half of the warps if there is one.
template <class Loop>
__device__ inline float2 joined(const TileSums<Loop>& sums, float2 sum, int row, int column) {
  if constexpr (Loop::kParts > 1) return add_sums(sum, sums.products[row][column]);
  return sum;
}

// ---- a slice of the features -------------------------------------------------------------------

template <class Loop>
__device__ inline void store_slice(const TileSums<Loop>& sums, const Sums<Loop>& total,
                                   const Sums<Loop>& rest, const ThreadSums<Loop>& at, int queries,
                                   const Slices& slices) {
  const Index slice = blockIdx.z;
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.y == 0 && thread < Loop::kReferences && at.reference0 + thread < slices.stride)
    slices.squares[slice * slices.stride + at.reference0 + thread] = sums.scaled_square(thread);
#pragma unroll
  for (int j = 0; j < ThreadSums<Loop>::kColumns; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      const int column =
          at.side0 + 8 * (ThreadSums<Loop>::kColumns * at.part + j) + 2 * at.lane.t + odd;
      if (at.query0 + column >= queries) continue;
      float2* const to = slices.products + (slice * queries + at.query0 + column) * slices.stride;
#pragma unroll
      for (int s = 0; s < Loop::kSlabs; ++s)
        for (int e = 0; e < 2; ++e) {
          const int row = at.row(s) + 8 * e;
          // A float2 store needs neighbouring registers. Adding 0 copies the sums, so that they
          // need not be neighbours in the main loop, where compilers would spill.
          float2 sum = {total[s][j][2 * e + odd] + 0.0f, rest[s][j][2 * e + odd] + 0.0f};
          sum = joined(sums, sum, row, column);
          if (at.reference0 + row < slices.stride) to[at.reference0 + row] = sum;
        }
    }
}

// ---- distances and projections -----------------------------------------------------------------

// |y − centre|² of the thread's references, and whether there are such references.
template <class Loop>
struct ThreadReferences {
  double squared[Loop::kSlabs][2];
  bool exists[Loop::kSlabs][2];

  // If MEASURES, also stores the largest one of each slab.
  template <bool MEASURES>
  __device__ void load(TileSums<Loop>& sums, const ThreadSums<Loop>& at, int references,
                       const Center& center) {
    const double per_scale = center.scale[1];
#pragma unroll
    for (int s = 0; s < Loop::kSlabs; ++s) {
      double farthest = 0;
      for (int e = 0; e < 2; ++e) {
        const int row = at.row(s) + 8 * e;
        const double scaled = sums.scaled_square(row);
        squared[s][e] = center.true_square(scaled * per_scale * per_scale);
        exists[s][e] = at.reference0 + row < references;
        farthest = fmax(farthest, reach_of(scaled, squared[s][e], center.features, exists[s][e]));
        if (!exists[s][e]) squared[s][e] = kBeyondAll;
      }
      if constexpr (MEASURES) {
        farthest = over_warp(farthest, Most());
        if (at.lane.lane == 0 && at.half == 0)
          sums.farthest[Loop::kSlabs * at.group + s] = farthest;
      }
    }
  }
};

// Stores the thread's distances and the smallest one of each query, or its G·y. Returns whether all
// are finite.
template <Target TARGET, class Loop>
__device__ inline bool store_pairs(TileMemory<Loop>& shared, const Sums<Loop>& total,
                                   const Sums<Loop>& rest, const ThreadSums<Loop>& at,
                                   const ThreadReferences<Loop>& y, int queries, const Pairs& out) {
  constexpr bool kProject = TARGET == Target::projections;
  TileSums<Loop>& sums = shared.sums;
  const auto stride = static_cast<unsigned>(out.stride);
  const int first_column = at.first_query() + 2 * at.lane.t;
  bool all_finite = true;
#pragma unroll
  for (int j = 0; j < ThreadSums<Loop>::kColumns; ++j) {
    std::uint64_t least[2] = {kInfiniteBits, kInfiniteBits};
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int column = first_column + 8 * j + odd;
      const bool inside = at.query0 + column < queries;
      const double unit = shared.units[column], norm = kProject ? 0 : shared.norms[column];
      const ProductUnit projection(unit);
#pragma unroll
      for (int s = 0; s < Loop::kSlabs; ++s) {
        const unsigned pair = static_cast<unsigned>(at.query0 + column) * stride +
                              static_cast<unsigned>(at.reference0 + at.row(s));
        const ReferenceNorms reference_norms(y.squared[s]);
        const DistanceOfQuery distance_of(norm, unit, reference_norms);
        for (int e = 0; e < 2; ++e) {
          float2 product = {total[s][j][2 * e + odd], rest[s][j][2 * e + odd]};
          product = joined(sums, product, at.row(s) + 8 * e, column);
          if constexpr (kProject) {
            const float projected = projection(product);
            if (inside && y.exists[s][e]) (out.projected + pair)[8 * e] = projected;
            all_finite = all_finite && fabsf(projected) < INFINITY;
          } else {
            const std::uint64_t distance = distance_of(e, product);
            if (inside && y.exists[s][e]) (out.squared + pair)[8 * e] = double_of(distance);
            all_finite = all_finite && static_cast<std::uint32_t>(distance >> 32) < 0x7ff00000u;
            least[odd] = Least()(least[odd], distance);
          }
        }
      }
    }
    if constexpr (!kProject) {
      auto* const to = &sums.least.rows[8 * at.group + at.lane.g][first_column + 8 * j];
      *reinterpret_cast<double2*>(to) = {double_of(least[0]), double_of(least[1])};
    }
  }
  return all_finite;
}

// Finishes the sums of a tile, total + rest. The loop has stored the squares of the references in
// `shared`; the barrier that they need is here.
template <Target TARGET, class Loop>
__device__ inline void finish_tile(TileMemory<Loop>& shared, Sums<Loop>& total, Sums<Loop>& rest,
                                   const Halves& x, const Rows<typename Loop::Reference>& y,
                                   const Center& center, const Pairs& out, const Slices& slices) {
  const ThreadSums<Loop> at;
  if constexpr (Loop::kParts > 1) exchange_halves(shared.sums, total, rest, at);
  __syncthreads();
  if constexpr (TARGET == Target::slice) {
    store_slice(shared.sums, total, rest, at, x.rows, slices);
    return;
  } else {
    ThreadReferences<Loop> references;
    references.template load<TARGET == Target::distances>(shared.sums, at, y.count, center);
    const bool finite = store_pairs<TARGET>(shared, total, rest, at, references, x.rows, out);
    const bool all_finite = __ballot_sync(kAll, finite) == kAll;
    if constexpr (TARGET == Target::projections) {
      const TilePart part = {at.query0 + at.first_query(), 8 * ThreadSums<Loop>::kColumns,
                             at.reference0 + at.row(0) - at.lane.g, 16 * Loop::kSlabs};
      if (!all_finite) replace_infinite(part, x.whole, y, center, out, at.lane);
    } else {
      if (at.lane.lane == 0) shared.sums.least.finite[at.lane.warp] = all_finite;
      __syncthreads();
      store_lowest<Loop::kReferences>(shared.sums.least, at.query0, x.rows, out);
      store_reach<Loop::kReferences>(shared.sums.farthest, out);
    }
  }
}

}  // namespace
}  // namespace pfgm
