// Squared distances between a block of queries and a chunk of references, on CUDA devices.
//
// distances computes |x|² + |y|² − 2 x·y from products in matrix units, of centred data in two
// float16 parts (cuda/centering.h). For Rounded references they are the distances between centred
// values rounded to float16: one product takes the place of three. For few queries or features,
// differences computes Σ (x − y)² instead. Both also find the smallest distance of each tile of
// references. With PROJECT they compute G·y instead, up to a number for each query. A reference
// that float16 cannot hold has no products; its G·y is then found without them. If there are few
// pairs, blocks of distances share out the features, and finish_distances adds up what they leave.
#pragma once
#include "cuda/squared_distances.h"
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// ---- what both do with a tile ----------------------------------------------------------------

// Empties the list. find_limits, a later launch of the stream, fills it.
__device__ inline void clear_list(const Pairs& out) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *out.listed = 0;
}

// The smallest finite distance; its sign is negative if a distance of the tile is not finite, so
// that refine looks at the tile.
struct LeastFinite {
  __device__ double operator()(double a, double b) const {
    const double least = fmin(fabs(a), fabs(b));
    return signbit(a) || signbit(b) ? -least : least;
  }
};

__device__ inline double finite_or_marked(double distance) {
  return distance < INFINITY ? distance : -INFINITY;
}

// The smallest distance as it is stored: below 0 if it has a negative sign, even if it is 0.
__device__ inline double stored_lowest(double least) {
  return signbit(least) ? -fmax(-least, 1e-300) : least;
}

// Stores the smallest distance of a tile for each query, from low[row of warps][query].
template <int QUERIES>
__device__ inline void store_lowest(const double (*low)[QUERIES], int rows, int tile, int query0,
                                    int queries, const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= QUERIES || query0 + q >= queries || tile >= out.tiles) return;
  double least = low[0][q];
  for (int w = 1; w < rows; ++w) least = LeastFinite()(least, low[w][q]);
  out.lowest[static_cast<Index>(query0 + q) * out.tiles + tile] = stored_lowest(least);
}

// ---- products --------------------------------------------------------------------------------

constexpr int kDistanceThreads = 256;

// The smallest distances that threads have found of each query: bits, one row for each g and group
// of warps. The lanes of a warp write 16 bytes each, and eight of them, which have two rows, reach
// different banks. `finite` says whether all distances of a warp are.
template <int QUERIES, int ROWS, int THREADS = kDistanceThreads>
struct LeastOfRows {
  alignas(16) std::uint64_t of[ROWS][QUERIES + 8];
  bool finite[THREADS / 32];
};

// A block has REFERENCES × QUERIES pairs. A warp has one or two slabs of 16 references. With 64
// references, each half of the warps takes every second panel. With 128 queries, each half of the
// warps takes half of these, and the block converts references one panel ahead, for all its warps.
//
// A lane accesses 16 bytes. Eight lanes, which have two rows, must reach different banks. So in
// rows of float32 the 16-byte pieces of odd rows trade places in pairs; rows of queries have 64
// bytes. Of short types a lane reads eight values, and the two panels of a row trade places: in odd
// rows of 16-bit types, and of bytes, whose rows are half as long, in every second pair of rows.
template <class R, int QUERIES, int REFERENCES>
struct DistanceMemory {
  static constexpr int kQueries = QUERIES, kReferences = REFERENCES, kThreads = kDistanceThreads;
  static constexpr bool kAhead = QUERIES == 128;
  static constexpr int kReferenceStages = kAhead ? 4 : REFERENCES == 64 ? 3 : 2;
  static constexpr int kQueryStages = kAhead ? 2 : kReferenceStages;
  static constexpr int kPanels = kAhead ? 1 : 2, kFeatures = kPanels * kPanel;  // of a stage
  static constexpr int kQueryParts = kRounded<R> ? 1 : 2;
  static constexpr int kSlabs = kAhead ? 2 : 1, kSides = kAhead ? 2 : 1;
  static constexpr int kColumns = QUERIES / kSides / 8;  // of 8 queries, of a warp
  static constexpr int kGroups = REFERENCES / 16 / kSlabs;
  static constexpr int kParts = kDistanceThreads / 32 / kGroups / kSides;
  static constexpr int kTurns = 1;
  // Two parts in float16 take the place of a value that is converted ahead.
  // Before that, values of short types start in different places of neighbouring rows.
  static constexpr int kSpread = kAhead ? 4 / static_cast<int>(sizeof(R)) : 1;
  static constexpr int kPitch = kSpread * kFeatures;
  // Whether neighbouring stretches of so many 16-byte pieces trade places in a row.
  __device__ static constexpr bool trades(int row) {
    if (sizeof(R) == sizeof(float)) return row % 2 != 0;
    return !kAhead && (row & (2 / static_cast<int>(sizeof(R)))) != 0;
  }
  static constexpr int kTraded = sizeof(R) == sizeof(float) ? 1 : kPanel * sizeof(R) / 16;
  struct References {
    R y[REFERENCES][kPitch];
    float center[kFeatures];
  };
  struct Queries {
    std::uint16_t x[kPanels][kQueryParts][QUERIES][kPanel];  // panel, part, query
  };
  struct Stages {
    References references[kReferenceStages];
    Queries queries[kQueryStages];
  };
  struct Sums {
    float2 products[kParts > 1 ? REFERENCES : 1][QUERIES + 1];  // of the other half of the warps
    double squares[kParts][REFERENCES];
    LeastOfRows<QUERIES, 8 * kGroups> least;
    double farthest[REFERENCES / 16];
  };
  union {
    Stages stages;
    Sums sums;
  };
  double units[QUERIES], norms[QUERIES];
};
static_assert(sizeof(DistanceMemory<float, 64, 64>) <= kSharedLimit &&
                  sizeof(DistanceMemory<float, 64, 128>) <= kSharedLimit &&
                  sizeof(DistanceMemory<float, 128, 128>) <= kSharedLimit,
              "a block fits everywhere");

// Copies the panels of a tile, one after the other. A thread copies the same piece of each of its
// rows. In place of rows after the last it copies its first one; their distances are not stored.
template <class R, int QUERIES, int REFERENCES>
class TileCopy {
 public:
  using Memory = DistanceMemory<R, QUERIES, REFERENCES>;

  // Starts at the feature `first`.
  __device__ TileCopy(const Halves& x, int query0, const Rows<R>& y, int reference0,
                      const Center& center, int first)
      : center_(center),
        aligned_(y.aligned),
        to_low_(x.low - x.high),
        apart_(kStep * y.stride),
        left_(center.features - first) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, piece_ = thread % kPieces;
    rows_ = y.count - reference0 - row_, half_rows_ = x.rows - query0 - half_row();
    from_ = y.row(rows_ > 0 ? reference0 + row_ : 0) + first + piece_ * kCount;
    high_ = x.high + static_cast<Index>(half_rows_ > 0 ? query0 + half_row() : 0) * center.width +
            first + half_panel() * kPanel + thread % kHalfPieces * 8;
  }

  // Starts the copies of the next panels of references.
  __device__ void next(typename Memory::References& stage) {
    const int known = left_ - piece_ * kCount;
    const int count = known < 0 ? 0 : known < kCount ? known : kCount;
    R* const to = stage.y[row_] + row_ % Memory::kSpread * Memory::kFeatures +
                  (piece_ ^ (Memory::trades(row_) ? Memory::kTraded : 0)) * kCount;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        copy_async<16>(to + i * kStep * Memory::kPitch,
                       i * kStep < rows_ ? from_ + i * apart_ : from_,
                       count * static_cast<int>(sizeof(R)));
    } else {
      for (int i = 0; i < kRows; ++i)
        for (int k = 0; k < kCount; ++k)
          to[i * kStep * Memory::kPitch + k] =
              k < count ? from_[(i * kStep < rows_ ? i * apart_ : 0) + k] : R{};
    }
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < Memory::kFeatures / 4)
      copy_async<16>(&stage.center[4 * thread],
                     center_.scaled + (center_.features - left_) + 4 * thread);
    from_ += Memory::kFeatures;
    left_ -= Memory::kFeatures;
  }

  // The same for queries.
  __device__ void next(typename Memory::Queries& stage) {
    const int piece = static_cast<int>(threadIdx.x) % kHalfPieces;
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {
      const int panel = i * kHalfStep / QUERIES, row = i * kHalfStep % QUERIES;
      const std::uint16_t* const high =
          (row < half_rows_ ? high_ + row * center_.width : high_) + panel * kPanel;
      auto& half = stage.x[half_panel() + panel];
      copy_async<16>(&half[0][half_row() + row][8 * piece], high);
      if constexpr (!kRounded<R>)
        copy_async<16>(&half[1][half_row() + row][8 * piece], high + to_low_);
    }
    high_ += Memory::kFeatures;
  }

 private:
  static constexpr int kCount = 16 / sizeof(R), kPieces = Memory::kFeatures / kCount;
  static constexpr int kStep = kDistanceThreads / kPieces;
  static constexpr int kRows = REFERENCES / kStep;
  // Of queries: eight threads copy a panel of two rows, which reach different banks.
  static constexpr int kHalfPieces = kPanel / 8;
  static constexpr int kHalfStep = kDistanceThreads / kHalfPieces;
  static constexpr int kHalfRows = Memory::kPanels * QUERIES / kHalfStep;
  static_assert(kStep <= REFERENCES && kHalfRows > 0, "every thread copies");

  // The first row and panel of queries that this thread copies, found again to save registers.
  __device__ static int half_row() { return static_cast<int>(threadIdx.x) / kHalfPieces % QUERIES; }
  __device__ static int half_panel() {
    return kHalfStep > QUERIES ? static_cast<int>(threadIdx.x) / kHalfPieces / QUERIES : 0;
  }

  const Center& center_;
  const bool aligned_;
  const Index to_low_, apart_;  // from a high part to the low part; between rows of y
  int left_, row_, piece_;      // features that are left; what this thread copies
  int rows_, half_rows_;        // rows that there are from the first one of this thread on
  const R* from_;
  const std::uint16_t* high_;
};

// The panel of a lane: references g and g + 8, features 8t to 8t + 7, times the scale and centred,
// in two parts, as the operands of two products.
struct ReferencePanel {
  std::uint32_t high[2][4], low[2][4];
};

// Row g + 8e has features from `rows[e]` on; in odd rows of float32 pieces of four trade places.
// squares[e] is the sum of their squares, of their high parts if R is Rounded.
template <class R>
__device__ inline ReferencePanel convert(const R* const (&rows)[2], const float* center,
                                         float scale, int known, const Lane& lane,
                                         float (&squares)[2]) {
  ReferencePanel panel;
  float c[8];
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(center + 8 * lane.t + i);
    c[i] = four.x, c[i + 1] = four.y, c[i + 2] = four.z, c[i + 3] = four.w;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float v[8];
    if constexpr (sizeof(R) == sizeof(float)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float four[4];
        load4(rows[e] + 8 * lane.t + 4 * (i ^ (lane.g & 1)), four);
        for (int k = 0; k < 4; ++k) v[4 * i + k] = four[k] * scale - c[4 * i + k];
      }
    } else {
      load8(rows[e] + 8 * lane.t, known - 8 * lane.t, v);
      // Rounded once: a byte's product with the scale is not exact.
      for (int k = 0; k < 8; ++k) v[k] = fmaf(v[k], scale, -c[k]);
    }
    squares[e] = 0;
    if constexpr (!kRounded<R>)
      for (float value : v) squares[e] += value * value;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const TwoHalves parts = split_halves(v[2 * i], v[2 * i + 1]);
      // Operands have features 0, 1 of rows g and g + 8, then features 2, 3.
      panel.high[i / 2][i % 2 * 2 + e] = parts.high;
      panel.low[i / 2][i % 2 * 2 + e] = parts.low;
      if constexpr (kRounded<R>) squares[e] += sum_of_squares(parts.high);
    }
  }
  return panel;
}

// Operand i of a lane, of 4, in the place of the values of its slab.
template <class R>
__device__ inline uint4& operand_of(R* slab, int i, const Lane& lane) {
  return reinterpret_cast<uint4*>(slab)[32 * i + lane.lane];
}

template <class R>
__device__ inline void store_panel(R* slab, const ReferencePanel& panel, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t (&high)[4] = panel.high[i], (&low)[4] = panel.low[i];
    operand_of(slab, i, lane) = {high[0], high[1], high[2], high[3]};
    if constexpr (!kRounded<R>) operand_of(slab, 2 + i, lane) = {low[0], low[1], low[2], low[3]};
  }
}

template <class R>
__device__ inline ReferencePanel load_panel(R* slab, const Lane& lane) {
  ReferencePanel panel;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 high = operand_of(slab, i, lane);
    panel.high[i][0] = high.x, panel.high[i][1] = high.y;
    panel.high[i][2] = high.z, panel.high[i][3] = high.w;
    if constexpr (kRounded<R>) continue;
    const uint4 low = operand_of(slab, 2 + i, lane);
    panel.low[i][0] = low.x, panel.low[i][1] = low.y;
    panel.low[i][2] = low.z, panel.low[i][3] = low.w;
  }
  return panel;
}

// The queries of TOGETHER columns as operands. Their panel starts at `x`.
template <int TOGETHER>
__device__ inline void load_query_operands(std::uint32_t (&of_x)[TOGETHER][2][2],
                                           const std::uint16_t* x) {
#pragma unroll
  for (int j = 0; j < TOGETHER; ++j) {
    const uint4 four = *reinterpret_cast<const uint4*>(x + 8 * j * kPanel);
    of_x[j][0][0] = four.x, of_x[j][0][1] = four.y, of_x[j][1][0] = four.z, of_x[j][1][1] = four.w;
  }
}

// Adds two neighbouring values of `rest` to two totals, and leaves what rounding loses in `rest`.
__device__ inline void add_rest(float* total, float* rest) {
  const float2 old = {total[0], total[1]}, value = {rest[0], rest[1]};
  const float2 larger = add_pairs(old, value);
  const float2 lost = subtract_pairs(value, subtract_pairs(larger, old));
  total[0] = larger.x, total[1] = larger.y;
  rest[0] = lost.x, rest[1] = lost.y;
}

// The same for TOGETHER columns of 8 queries from column `first` on.
template <int TOGETHER, int SLABS, int COLUMNS>
__device__ inline void add_rests(float (&total)[SLABS][COLUMNS][4],
                                 float (&rest)[SLABS][COLUMNS][4], int first) {
#pragma unroll
  for (int s = 0; s < SLABS; ++s)
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j)
      for (int e = 0; e < 4; e += 2) add_rest(&total[s][first + j][e], &rest[s][first + j][e]);
}

// Adds the products with TOGETHER columns of 8 queries from column `first` on to the rest:
// high·high + high·low + low·high. They take turns, so that none waits for another. The panel of
// these queries is at `x_high` and `x_low`.
//
// Matrix units round every addition toward zero, so panels are added up outside of them, in two
// floats, total + rest. The products of a panel are added to the rest. What the new total cannot
// hold of that is the next rest (add_rests).
//
// If HALF_SUMS, the products with a low part of a panel are added up in float16. They are 2^11
// times smaller than the product of the high parts, so the digits that float16 lacks do not count.
template <bool HALF_SUMS, int TOGETHER, int SLABS, int COLUMNS>
__device__ inline void add_products(float (&rest)[SLABS][COLUMNS][4], int first,
                                    const ReferencePanel (&y)[SLABS], const std::uint16_t* x_high,
                                    const std::uint16_t* x_low) {
  std::uint32_t of_high[TOGETHER][2][2], of_low[TOGETHER][2][2];
  load_query_operands(of_high, x_high);
  load_query_operands(of_low, x_low);
  const auto each = [&](auto multiply) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int s = 0; s < SLABS; ++s)
        for (int j = 0; j < TOGETHER; ++j) multiply(i, s, j);
  };
  std::uint32_t small[SLABS][TOGETHER][2] = {};
  each([&](int i, int s, int j) {
    if constexpr (HALF_SUMS)
      multiply_add_halves(small[s][j], y[s].low[i], of_high[j][i]);
    else
      multiply_add_halves(rest[s][first + j], y[s].low[i], of_high[j][i]);
  });
  each([&](int i, int s, int j) {
    if constexpr (HALF_SUMS)
      multiply_add_halves(small[s][j], y[s].high[i], of_low[j][i]);
    else
      multiply_add_halves(rest[s][first + j], y[s].high[i], of_low[j][i]);
  });
  each([&](int i, int s, int j) {
    multiply_add_halves(rest[s][first + j], y[s].high[i], of_high[j][i]);
  });
  if constexpr (HALF_SUMS)
#pragma unroll
    for (int s = 0; s < SLABS; ++s)
#pragma unroll
      for (int j = 0; j < TOGETHER; ++j)
        for (int e = 0; e < 4; ++e)
          rest[s][first + j][e] += half_of_word(small[s][j][e / 2], e % 2);
}

// The same for the high parts alone. What is lost where one float adds up the panels is less than
// rounding to float16 loses.
template <int TOGETHER, int SLABS, int COLUMNS>
__device__ inline void add_rounded_products(float (&total)[SLABS][COLUMNS][4], int first,
                                            const ReferencePanel (&y)[SLABS],
                                            const std::uint16_t* x) {
  float panel[SLABS][TOGETHER][4];
  std::uint32_t of_x[TOGETHER][2][2];
  load_query_operands(of_x, x);
#pragma unroll
  for (int s = 0; s < SLABS; ++s)
    for (int j = 0; j < TOGETHER; ++j) multiply_halves(panel[s][j], y[s].high[0], of_x[j][0]);
#pragma unroll
  for (int s = 0; s < SLABS; ++s)
    for (int j = 0; j < TOGETHER; ++j) multiply_add_halves(panel[s][j], y[s].high[1], of_x[j][1]);
#pragma unroll
  for (int s = 0; s < SLABS; ++s)
    for (int j = 0; j < TOGETHER; ++j)
      for (int e = 0; e < 4; ++e) total[s][first + j][e] += panel[s][j][e];
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
  const bool known =
      lane.lane < part.references && part.reference0 + lane.lane < static_cast<int>(y.count);
#pragma unroll 1
  for (int query = part.query0; query < part.query0 + part.queries && query < upstream.count;
       ++query) {
    float* const row = out.projected + query * out.stride + part.reference0;
    unsigned infinite =
        __ballot_sync(kAll, known && !(fabsf(row[known ? lane.lane : 0]) < INFINITY));
#pragma unroll 1
    for (; infinite != 0; infinite &= infinite - 1) {
      const int i = __ffs(static_cast<int>(infinite)) - 1;
      const float product = centered_product(upstream.row(query), y.row(part.reference0 + i),
                                             center.at, center.features, lane.lane);
      if (lane.lane == 0) row[i] = product;
    }
  }
}

// |y − centre|², if the reference counts for the reach of its tile: larger ones have no products in
// float16.
__device__ inline double reach_of(double scaled, double squared, int features, bool known) {
  return known && scaled <= features * 0x1p32 ? squared : 0;
}

// A product, which is a sum of two floats, in its unit. Its power of two may be out of the range of
// float32, but is not if split in two.
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

// In place of |y − centre|² of a row after the last one. Its distances are larger than all others,
// which are sums of squares of float32, and do not count.
constexpr double kBeyondAll = 0x1p1000;

// Stores the smallest distance of each tile of references for each query. It is marked in all tiles
// of the block if a distance of these is not finite.
template <int REFERENCES, int QUERIES, int ROWS, int THREADS>
__device__ inline void store_lowest(const LeastOfRows<QUERIES, ROWS, THREADS>& least, int query0,
                                    int queries, const Pairs& out) {
  constexpr int kTiles = REFERENCES / kTileReferences, kRowsOfTile = ROWS / kTiles;
  bool finite = true;
  for (const bool each : least.finite) finite = finite && each;
#pragma unroll
  for (int start = 0; start < QUERIES * kTiles; start += THREADS) {
    const int i = start + static_cast<int>(threadIdx.x), q = i % QUERIES, of_block = i / QUERIES;
    const int tile = static_cast<int>(blockIdx.x) * kTiles + of_block;
    if (i >= QUERIES * kTiles || query0 + q >= queries || tile >= out.tiles) continue;
    std::uint64_t lowest = kInfiniteBits;
#pragma unroll
    for (int row = 0; row < kRowsOfTile; ++row)
      lowest = Least()(lowest, least.of[kRowsOfTile * of_block + row][q]);
    const double distance = double_of(lowest) < kBeyondAll / 2 ? double_of(lowest) : INFINITY;
    out.lowest[static_cast<Index>(query0 + q) * out.tiles + tile] =
        stored_lowest(finite ? distance : -distance);
  }
}

// Sums of a thread in registers.
template <int SLABS, int COLUMNS>
struct SumsInRegisters {
  float (&of)[SLABS][COLUMNS][4];

  __device__ float at(int slab, int column, int i) const { return of[slab][column][i]; }
  // Leaves out the first COUNT columns, which are half of those that are left.
  template <int COUNT>
  __device__ void drop() {
    for (int s = 0; s < SLABS; ++s)
      for (int j = 0; j < COUNT; ++j)
        for (int i = 0; i < 4; ++i) of[s][j][i] = of[s][COUNT + j][i];
  }
};

// Zero for all sums.
struct NoSums {
  __device__ float at(int, int, int) const { return 0; }
  template <int COUNT>
  __device__ void drop() {}
};

// Stores the squares of references g and g + 8 of the 16 from `first` on, whose parts the lanes t
// have.
template <class Memory>
__device__ inline void store_squares(Memory& shared, int part, int first, const Lane& lane,
                                     const float (&square)[2], const float (&lost)[2]) {
  for (int e = 0; e < 2; ++e) {
    const double sum = over_quad(static_cast<double>(square[e]) - lost[e]);
    if (lane.t == 0) shared.sums.squares[part][first + 8 * e + lane.g] = sum;
  }
}

// Finishes the sums of a tile, total + rest: distances and their minima, or G·y. If SLICED, it
// stores the sums over a slice of the features. The caller has stored the squares of the references
// in `shared`; the barrier that they need is here.
template <bool GEFORCE, bool PROJECT, bool SLICED, class Memory, class Total, class Rest, class R>
__device__ inline void finish_tile(Memory& shared, Total total, Rest rest, const Halves& x,
                                   const Rows<R>& y, const Center& center, const Pairs& out,
                                   const Slices& slices) {
  constexpr int QUERIES = Memory::kQueries, REFERENCES = Memory::kReferences;
  constexpr int kColumns = Memory::kColumns, kSlabs = Memory::kSlabs, kParts = Memory::kParts;
  const Lane lane = this_lane();
  const int group = static_cast<int>(threadIdx.x / 32 % Memory::kGroups);
  const int other = static_cast<int>(threadIdx.x / 32 / Memory::kGroups);
  const int part = kParts > 1 ? other : 0, column0 = Memory::kSides > 1 ? 8 * kColumns * other : 0;
  const int reference0 = static_cast<int>(blockIdx.x) * REFERENCES;
  const int query0 = static_cast<int>(blockIdx.y) * QUERIES;
  // Each half of the warps finishes half of the columns, with the sums of the other half.
  constexpr int kOwn = kColumns / kParts;
  const auto row_of = [&](int slab) { return 16 * (kSlabs * group + slab) + lane.g; };
  if constexpr (kParts > 1)
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * (kOwn * (1 - part) + j) + 2 * lane.t + i % 2;
        const int own = kOwn + j;
        const float sum = part > 0 ? total.at(0, j, i) : total.at(0, own, i);
        const float more = part > 0 ? rest.at(0, j, i) : rest.at(0, own, i);
        shared.sums.products[row_of(0) + 8 * (i / 2)][column] = {sum, more};
        if (part > 0)
          total.of[0][j][i] = total.at(0, own, i), rest.of[0][j][i] = rest.at(0, own, i);
      }
  __syncthreads();
  if constexpr (SLICED) {
    const Index slice = blockIdx.z;
    const int thread = static_cast<int>(threadIdx.x);
    if (blockIdx.y == 0 && thread < REFERENCES && reference0 + thread < slices.stride) {
      double sum = shared.sums.squares[0][thread];
      for (int more = 1; more < Memory::kParts; ++more) sum += shared.sums.squares[more][thread];
      slices.squares[slice * slices.stride + reference0 + thread] = sum;
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      for (int odd = 0; odd < 2; ++odd) {
        const int column = column0 + 8 * (kOwn * part + j) + 2 * lane.t + odd;
        if (query0 + column >= x.rows) continue;
        SliceSum<R>* const to = static_cast<SliceSum<R>*>(slices.products) +
                                (slice * x.rows + query0 + column) * slices.stride;
#pragma unroll
        for (int s = 0; s < kSlabs; ++s)
          for (int e = 0; e < 2; ++e) {
            const int row = row_of(s) + 8 * e;
            // A store of a pair needs neighbouring registers. Sums that it took as they are would
            // have these in the loop too, where compilers would spill.
            float2 sum = {total.at(s, j, 2 * e + odd) + 0.0f, rest.at(s, j, 2 * e + odd) + 0.0f};
            if constexpr (kParts > 1) sum = add_sums(sum, shared.sums.products[row][column]);
            if (reference0 + row >= slices.stride) continue;
            if constexpr (kRounded<R>)
              to[reference0 + row] = sum.x + sum.y;
            else
              to[reference0 + row] = sum;
          }
      }
    return;
  }
  const double per_scale = center.scale[1];
  double squared[kSlabs][2];
  bool known[kSlabs][2];
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    double farthest = 0;
    for (int e = 0; e < 2; ++e) {
      const int row = row_of(s) + 8 * e;
      double scaled = shared.sums.squares[0][row];
      for (int more = 1; more < Memory::kParts; ++more) scaled += shared.sums.squares[more][row];
      squared[s][e] = scaled * per_scale * per_scale;
      known[s][e] = reference0 + row < y.count;
      farthest = fmax(farthest, reach_of(scaled, squared[s][e], center.features, known[s][e]));
      if (!known[s][e]) squared[s][e] = kBeyondAll;
    }
    if constexpr (!PROJECT) {
      farthest = over_warp(farthest, Most());
      if (lane.lane == 0 && other == 0) shared.sums.farthest[kSlabs * group + s] = farthest;
    }
  }
  const auto stride = static_cast<unsigned>(out.stride);
  const int first_column = column0 + 8 * kOwn * part + 2 * lane.t;
  constexpr int kTurns = Memory::kTurns, kOfTurn = kOwn / kTurns;
  bool all_finite = true;  // of this thread's distances, or G·y
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int j = 0; j < kOfTurn; ++j) {
      std::uint64_t least[2] = {kInfiniteBits, kInfiniteBits};
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = first_column + 8 * (kOfTurn * turn + j) + odd;
        const bool inside = query0 + column < x.rows;
        const double unit = shared.units[column], norm = PROJECT ? 0 : shared.norms[column];
        const ProductUnit of_product(unit);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          const unsigned place = static_cast<unsigned>(query0 + column) * stride +
                                 static_cast<unsigned>(reference0 + row_of(s));
          const ReferenceNorms<GEFORCE> of_references(squared[s]);
          const DistanceOfQuery<GEFORCE> distance_of(norm, unit, of_references);
          for (int e = 0; e < 2; ++e) {
            float2 product = {total.at(s, j, 2 * e + odd), rest.at(s, j, 2 * e + odd)};
            if constexpr (kParts > 1)
              product = add_sums(product, shared.sums.products[row_of(s) + 8 * e][column]);
            if constexpr (PROJECT) {
              const float projected = of_product(product);
              if (inside && known[s][e]) (out.projected + place)[8 * e] = projected;
              all_finite = all_finite && fabsf(projected) < INFINITY;
            } else {
              const std::uint64_t distance = distance_of(e, product);
              if (inside && known[s][e]) (out.squared + place)[8 * e] = double_of(distance);
              all_finite = all_finite && static_cast<std::uint32_t>(distance >> 32) < 0x7ff00000u;
              least[odd] = Least()(least[odd], distance);
            }
          }
        }
      }
      if constexpr (!PROJECT) {
        auto* const to =
            &shared.sums.least.of[8 * group + lane.g][first_column + 8 * (kOfTurn * turn + j)];
        *reinterpret_cast<double2*>(to) = {double_of(least[0]), double_of(least[1])};
      }
    }
    if constexpr (kTurns > 1) total.template drop<kOfTurn>(), rest.template drop<kOfTurn>();
  }
  all_finite = __ballot_sync(kAll, all_finite) == kAll;
  if constexpr (PROJECT) {
    const TilePart part_of_warp = {query0 + column0 + 8 * kOwn * part, 8 * kOwn,
                                   reference0 + row_of(0) - lane.g, 16 * kSlabs};
    if (!all_finite) replace_infinite(part_of_warp, x.whole, y, center, out, lane);
  } else {
    if (lane.lane == 0) shared.sums.least.finite[lane.warp] = all_finite;
    __syncthreads();
    store_lowest<REFERENCES>(shared.sums.least, query0, x.rows, out);
    const int thread = static_cast<int>(threadIdx.x);
    const int tile = static_cast<int>(blockIdx.x) * (REFERENCES / kTileReferences) + thread;
    if (blockIdx.y > 0 || thread >= REFERENCES / kTileReferences || tile >= out.tiles) return;
    constexpr int kSlabsOfTile = kTileReferences / 16;
    double most = 0;
    for (int i = 0; i < kSlabsOfTile; ++i)
      most = fmax(most, shared.sums.farthest[kSlabsOfTile * thread + i]);
    out.reach[tile] = most;
  }
}

// Whether no launch takes this instance of `distances` from this code: devices that run it have a
// GeForce card's chip, or not (is_geforce in cuda/runtime.h), or have warpgroup_distances.
template <class R, int QUERIES, bool GEFORCE>
__device__ constexpr bool unused() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  return !GEFORCE;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#if defined(PFGM_WARPGROUPS) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (sizeof(R) == sizeof(float) && QUERIES == 128) return true;
#endif
  return GEFORCE;
#else
  return false;
#endif
}

// Blocks whose registers a multiprocessor must hold. With more, compilers would spill.
template <class R, int QUERIES>
constexpr int kDistanceBlocks = QUERIES == 32 || (kRounded<R> && QUERIES == 64) ? 2 : 1;

// If SLICED, blockIdx.z says which slice of the features a block takes, and the sums over it are
// stored, which are the same with PROJECT. GEFORCE says whether it is for such a card.
template <class R, int QUERIES, int REFERENCES, bool GEFORCE, bool PROJECT, bool SLICED>
__global__ void __launch_bounds__(kDistanceThreads, (kDistanceBlocks<R, QUERIES>))
    distances(const Halves x, const Rows<R> y, const Center center, const Pairs out,
              const Slices slices) {
  wait_for_earlier_launches();
  using Memory = DistanceMemory<R, QUERIES, REFERENCES>;
  constexpr bool kAhead = Memory::kAhead;
  constexpr int kColumns = Memory::kColumns, kSlabs = Memory::kSlabs, kParts = Memory::kParts;
  constexpr int kTogether =
      QUERIES == 64 && !kRounded<R> ? 4 : 2;  // columns; the others have fewer registers
  constexpr int kConvert = kTogether;         // column; elsewhere compilers spill
  // Whether the totals of columns are found while matrix units multiply for the next ones, and
  // those of the last columns after the next barrier. Elsewhere it gains nothing, or compilers
  // spill.
  constexpr bool kLate = kAhead && !kRounded<R> && !GEFORCE && !PROJECT && sizeof(R) != 2;
  if constexpr (unused<R, QUERIES, GEFORCE>()) return __trap();
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  auto& stages = shared.stages;
  const Lane lane = this_lane();
  // Of unsigned numbers, to be found again in two instructions rather than kept.
  const int group = static_cast<int>(threadIdx.x / 32 % Memory::kGroups);
  const int other = static_cast<int>(threadIdx.x / 32 / Memory::kGroups);
  const int part = kParts > 1 ? other : 0, column0 = kAhead ? 8 * kColumns * other : 0;
  const int converted = kAhead ? 16 * lane.warp : 16 * group;  // first row that this warp converts
  const int reference0 = static_cast<int>(blockIdx.x) * REFERENCES;
  const int query0 = static_cast<int>(blockIdx.y) * QUERIES;
  if constexpr (!PROJECT && !SLICED) clear_list(out);
  const float factor = *center.scale * kUnit<R>;
  float total[kSlabs][kColumns][4] = {}, rest[kSlabs][kColumns][4] = {};
  float square[2] = {}, square_lost[2] = {}, squares[2];

  if (const int q = static_cast<int>(threadIdx.x); q < QUERIES) {
    const int query = query0 + q < x.rows ? query0 + q : 0;
    shared.units[q] = x.units[query];
    if constexpr (!PROJECT && !SLICED) shared.norms[q] = out.norms[query];
  }
  const int first_trip = SLICED ? static_cast<int>(blockIdx.z) * slices.trips : 0;
  const int features = center.features - first_trip * Memory::kFeatures;  // from the slice on
  const int left = static_cast<int>(divide_up(features, Memory::kFeatures));
  const int trips = SLICED && slices.trips < left ? slices.trips : left;
  TileCopy<R, QUERIES, REFERENCES> copy(x, query0, y, reference0, center,
                                        first_trip * Memory::kFeatures);
  const auto stage_queries = [&](int p) {
    if (p < trips) copy.next(stages.queries[p % Memory::kQueryStages]);
    if constexpr (kAhead) commit_copies();
  };
  const auto stage_references = [&](int p) {
    if (p < trips) copy.next(stages.references[p % Memory::kReferenceStages]);
    commit_copies();
  };
  const auto stage_next = [&](int p) {
    stage_queries(p + Memory::kQueryStages - 1);
    stage_references(p + Memory::kReferenceStages - 1);
  };
  const auto convert_panel = [&](int p, int half) {
    auto& stage = stages.references[p % Memory::kReferenceStages];
    const int first = half * kPanel, known = features - p * Memory::kFeatures - first;
    const int panel = sizeof(R) < 4 && Memory::trades(lane.g) ? half ^ 1 : half;
    const int start = lane.g % Memory::kSpread * Memory::kFeatures + panel * kPanel;
    const R* const rows[2] = {&stage.y[converted + lane.g][start],
                              &stage.y[converted + lane.g + 8][start]};
    return convert(rows, stage.center + first, factor, known, lane, squares);
  };
  const auto add_squares = [&] {
    for (int e = 0; e < 2; ++e) add_compensated(square[e], square_lost[e], squares[e]);
  };
  // After the last panel this converts what nothing reads.
  const auto convert_ahead = [&](int p) {
    const ReferencePanel panel = convert_panel(p, 0);
    __syncwarp();  // all values are read
    store_panel(stages.references[p % Memory::kReferenceStages].y[converted], panel, lane);
  };

  for (int p = 0; p < Memory::kReferenceStages - 1; ++p) {
    if (p < Memory::kQueryStages - 1) stage_queries(p);
    stage_references(p);
  }
  if constexpr (kAhead) {
    wait_copies<Memory::kReferenceStages - 2>();
    __syncthreads();
    convert_ahead(0);
  }
  int p = 0;
#pragma unroll 1
  do {  // There is a panel. A loop that may make no trip takes more registers.
    wait_copies<kAhead ? Memory::kReferenceStages - 3 : Memory::kReferenceStages - 2>();
    __syncthreads();  // copies have arrived, and no thread uses what the next ones replace
    if constexpr (!kAhead) stage_next(p);
#pragma unroll
    for (int half = part, i = 0; i < Memory::kPanels / kParts; half += kParts, ++i) {
      // Without a branch between them, the products of two panels take turns. Short types need too
      // many registers for that.
      constexpr bool kBranch = !kAhead && (kParts > 1 || sizeof(R) < 4 || kRounded<R>);
      if (kBranch && features <= p * Memory::kFeatures + half * kPanel) continue;
      ReferencePanel panel[kSlabs];
      if constexpr (!kAhead) panel[0] = convert_panel(p, half);
      add_squares();
      if constexpr (kLate) add_rests<kTogether>(total, rest, kColumns - 2 * kTogether);
      if constexpr (kAhead)
        for (int s = 0; s < kSlabs; ++s)
          panel[s] = load_panel(
              stages.references[p % Memory::kReferenceStages].y[16 * (kSlabs * group + s)], lane);
      const auto& queries = stages.queries[p % Memory::kQueryStages].x[half];
#pragma unroll
      for (int j = 0; j < kColumns; j += kTogether) {
        const int query = column0 + 8 * j + lane.g;
        if constexpr (kRounded<R>) {
          add_rounded_products<kTogether>(total, j, panel, &queries[0][query][8 * lane.t]);
        } else {
          add_products<GEFORCE, kTogether>(rest, j, panel, &queries[0][query][8 * lane.t],
                                           &queries[1][query][8 * lane.t]);
          if (!kLate)
            add_rests<kTogether>(total, rest, j);
          else if (j + kTogether < kColumns)
            add_rests<kTogether>(total, rest, (j > 0 ? j : kColumns) - kTogether);
        }
        // Matrix units multiply meanwhile.
        if (kAhead && j == 0) stage_next(p);
        if (kAhead && j == kConvert) convert_ahead(p + 1);
      }
    }
  } while (++p < trips);
  if constexpr (kLate) add_rests<2 * kTogether>(total, rest, kColumns - 2 * kTogether);
  wait_copies<0>();
  __syncthreads();
  store_squares(shared, part, converted, lane, square, square_lost);
  using Sums = SumsInRegisters<kSlabs, kColumns>;
  finish_tile<GEFORCE, PROJECT, SLICED>(shared, Sums{total}, Sums{rest}, x, y, center, out, slices);
}

// ---- slices of the features ------------------------------------------------------------------

constexpr int kFinishWarps = 4, kFinishQueries = 4;  // queries of a warp
constexpr int kFinishThreads = 32 * kFinishWarps;

// Distances, or G·y, from the sums over slices. A block takes a tile of references. A lane takes
// two neighbouring ones. The sums are added up in the order of the slices.
template <class R, bool GEFORCE, bool PROJECT>
__global__ void __launch_bounds__(kFinishThreads)
    finish_distances(const Halves x, const Rows<R> y, const Center center, const Pairs out,
                     const Slices slices) {
  wait_for_earlier_launches();
  let_next_launch_start();
  const Lane lane = this_lane();
  const int reference = static_cast<int>(blockIdx.x) * kTileReferences + 2 * lane.lane;
  const int query0 = (static_cast<int>(blockIdx.y) * kFinishWarps + lane.warp) * kFinishQueries;
  const bool known[2] = {reference < y.count, reference + 1 < y.count};
  if constexpr (!PROJECT) clear_list(out);
  if (query0 >= x.rows) return;
  float2 sum[kFinishQueries][2] = {};
  double scaled[2] = {};
  const Index from = known[0] ? reference : 0;
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
      const SliceSum<R>* const at = static_cast<const SliceSum<R>*>(slices.products) +
                                    (static_cast<Index>(slice) * x.rows + query) * slices.stride +
                                    from;
      if constexpr (kRounded<R>) {
        const float2 more = *reinterpret_cast<const float2*>(at);
        sum[q][0].x += more.x, sum[q][1].x += more.y;
      } else {
        const float4 more = *reinterpret_cast<const float4*>(at);
        sum[q][0] = add_sums(sum[q][0], {more.x, more.y});
        sum[q][1] = add_sums(sum[q][1], {more.z, more.w});
      }
    }
  }

  const double per_scale = center.scale[1];
  double squared[2], farthest = 0;
  for (int e = 0; e < 2; ++e) {
    squared[e] = scaled[e] * per_scale * per_scale;
    farthest = fmax(farthest, reach_of(scaled[e], squared[e], center.features, known[e]));
  }
  const ReferenceNorms<GEFORCE> of_references(squared);
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
    const Index place = query * out.stride + reference;
    if constexpr (PROJECT) {
      const ProductUnit of_product(unit);
      const float2 both = {of_product(sum[q][0]), of_product(sum[q][1])};
      if (known[1])
        *reinterpret_cast<float2*>(out.projected + place) = both;
      else if (known[0])
        out.projected[place] = both.x;
      all_finite = all_finite && fabsf(both.x) < INFINITY && fabsf(both.y) < INFINITY;
    } else {
      const DistanceOfQuery<GEFORCE> distance_of(out.norms[query], unit, of_references);
      std::uint64_t distance[2], low = kInfiniteBits;
      bool infinite = false;
      for (int e = 0; e < 2; ++e) {
        distance[e] = distance_of(e, sum[q][e]);
        if (!known[e]) continue;
        infinite = infinite || distance[e] >= kInfiniteBits;
        low = Least()(low, distance[e]);
      }
      const double2 both = {double_of(distance[0]), double_of(distance[1])};
      if (known[1])
        *reinterpret_cast<double2*>(out.squared + place) = both;
      else if (known[0])
        out.squared[place] = both.x;
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

// ---- differences -----------------------------------------------------------------------------

template <class R>
struct DifferenceMemory {
  static constexpr int kStages = 4, kQueries = 8;
  static constexpr int kPitch = kPanel + 4, kReferencePitch = kPanel + 16 / sizeof(R);
  float x[kStages][kQueries][kPitch];
  R y[kStages][kTileReferences][kReferencePitch];
  double low[8][kQueries];
};
static_assert(sizeof(DifferenceMemory<float>) <= kSharedLimit, "a block fits everywhere");

// A block has 8 warps and computes 64 references × 8 queries. A lane has reference 8·warp + g and a
// quarter of the features. It adds at most 256 values in float32 before float64 takes over.
template <class R, bool PROJECT>
__global__ void __launch_bounds__(256, 2)
    differences(const Rows<float> x, const Rows<R> y, int features, const Pairs out) {
  wait_for_earlier_launches();
  constexpr int kPanels = 256 / (kPanel / 4);
  using Memory = DifferenceMemory<R>;
  constexpr int kQueries = Memory::kQueries;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int row = 8 * lane.warp + lane.g;
  const Index reference = static_cast<Index>(blockIdx.x) * kTileReferences + row;
  const Index query0 = static_cast<Index>(blockIdx.y) * kQueries;
  double total[kQueries] = {}, norm = 0;
  float sum[kQueries] = {}, of_x = 0;
  if constexpr (!PROJECT) clear_list(out);

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
      if (known && lane.t == q % 4)
        out.projected[query * out.stride + reference] = static_cast<float>(value);
    } else {
      if (known && lane.t == q % 4) out.squared[query * out.stride + reference] = value;
      double low = known ? finite_or_marked(value) : INFINITY;
      for (int apart = 4; apart < 32; apart *= 2)
        low = LeastFinite()(low, __shfl_xor_sync(kAll, low, apart));
      if (lane.lane == 0) shared.low[lane.warp][q] = low;
    }
  }
  if constexpr (!PROJECT) {
    __syncthreads();
    store_lowest<kQueries>(shared.low, 8, static_cast<int>(blockIdx.x), static_cast<int>(query0),
                           x.count, out);
    norm += __shfl_xor_sync(kAll, norm, 1);
    norm += __shfl_xor_sync(kAll, norm, 2);
    const Index query = query0 + lane.g;
    if (blockIdx.x == 0 && lane.warp == 0 && lane.t == 0 && query < x.count)
      out.norms[query] = norm;
  }
}

}  // namespace
}  // namespace pfgm
