// Products of a tile of queries and references in the matrix units of warps: the main loop of
// `distances` (cuda/distances.h).
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// A block has REFERENCES × QUERIES pairs. A warp has one or two slabs of 16 references. In tiles of
// 64 references each half of the warps takes every second panel. In those of 128 × 128 each half of
// the warps takes half of the queries, and the block converts references one panel ahead, for all
// its warps.
//
// Staged rows are swizzled against bank conflicts: a lane accesses 16 bytes, and eight lanes, which
// have two rows, must reach different banks. In odd rows of float32 neighbouring vectors of 16
// bytes trade places. Of short types a lane reads eight values, and the two panels of a row trade
// places: in odd rows of 16-bit types, and in every second pair of rows of bytes, which are half as
// long. Rows of queries have 64 bytes and need no swizzle.
template <class R, int QUERIES, int REFERENCES>
struct WarpShape {
  using Reference = R;
  static constexpr int kQueries = QUERIES, kReferences = REFERENCES, kThreads = 256;
  // Blocks whose registers a multiprocessor must hold. With more, compilers would spill.
  static constexpr int kBlocks = QUERIES == 32 ? 2 : 1;
  static constexpr bool kAhead = QUERIES == 128;
  static_assert(REFERENCES == (kAhead ? 128 : 64));
  static constexpr int kReferenceStages = kAhead ? 4 : 3, kQueryStages = kAhead ? 2 : 3;
  static constexpr int kPanels = kAhead ? 1 : 2, kFeatures = kPanels * kPanel;  // of a stage
  static constexpr int kSlabs = kAhead ? 2 : 1, kSides = kAhead ? 2 : 1, kParts = 2 / kSides;
  static constexpr int kColumns = QUERIES / kSides / 8;  // of 8 queries, of a warp
  static constexpr int kGroups = REFERENCES / 16 / kSlabs;
  // A value that is converted ahead needs room for two float16 parts. Until then rows of short
  // types start in different places, so that neighbouring rows reach different banks.
  static constexpr int kSpread = kAhead ? 4 / static_cast<int>(sizeof(R)) : 1;
  static constexpr int kPitch = kSpread * kFeatures;
  // Whether neighbours trade places in a row: groups of kTraded vectors of 16 bytes.
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
    std::uint16_t x[kPanels][2][QUERIES][kPanel];  // panel, high or low, query
  };
  struct Memory {
    References references[kReferenceStages];
    Queries queries[kQueryStages];
  };
};

// Copies the panels of a tile, one after the other. A thread copies the same vector of all its
// rows. In place of rows after the last it copies its first one; their distances are not stored.
template <class Shape>
class TileCopy {
 public:
  using R = typename Shape::Reference;

  // Starts at the feature `first`.
  __device__ TileCopy(const Halves& x, int query0, const Rows<R>& y, int reference0,
                      const Center& center, int first)
      : center_(center),
        aligned_(y.aligned),
        to_low_(x.low - x.high),
        apart_(kStep * y.stride),
        left_(center.features - first) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kVectors, vector_ = thread % kVectors;
    rows_ = y.count - reference0 - row_, query_rows_ = x.rows - query0 - query_row();
    from_ = y.row(rows_ > 0 ? reference0 + row_ : 0) + first + vector_ * kCount;
    high_ = x.high + static_cast<Index>(query_rows_ > 0 ? query0 + query_row() : 0) * center.width +
            first + query_panel() * kPanel + thread % kQueryVectors * 8;
  }

  // Starts the copies of the next panels of references.
  __device__ void next(typename Shape::References& stage) {
    const int left = left_ - vector_ * kCount;
    const int count = left < 0 ? 0 : left < kCount ? left : kCount;
    R* const to = stage.y[row_] + row_ % Shape::kSpread * Shape::kFeatures +
                  (vector_ ^ (Shape::trades(row_) ? Shape::kTraded : 0)) * kCount;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        copy_async<16>(to + i * kStep * Shape::kPitch,
                       i * kStep < rows_ ? from_ + i * apart_ : from_,
                       count * static_cast<int>(sizeof(R)));
    } else {
      for (int i = 0; i < kRows; ++i)
        for (int k = 0; k < kCount; ++k)
          to[i * kStep * Shape::kPitch + k] =
              k < count ? from_[(i * kStep < rows_ ? i * apart_ : 0) + k] : R{};
    }
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < Shape::kFeatures / 4)
      copy_async<16>(&stage.center[4 * thread],
                     center_.scaled + (center_.features - left_) + 4 * thread);
    from_ += Shape::kFeatures;
    left_ -= Shape::kFeatures;
  }

  // The same for queries.
  __device__ void next(typename Shape::Queries& stage) {
    const int vector = static_cast<int>(threadIdx.x) % kQueryVectors;
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
      const int panel = i * kQueryStep / Shape::kQueries, row = i * kQueryStep % Shape::kQueries;
      const std::uint16_t* const high =
          (row < query_rows_ ? high_ + row * center_.width : high_) + panel * kPanel;
      auto& half = stage.x[query_panel() + panel];
      copy_async<16>(&half[0][query_row() + row][8 * vector], high);
      copy_async<16>(&half[1][query_row() + row][8 * vector], high + to_low_);
    }
    high_ += Shape::kFeatures;
  }

 private:
  static constexpr int kCount = 16 / sizeof(R), kVectors = Shape::kFeatures / kCount;
  static constexpr int kStep = Shape::kThreads / kVectors;
  static constexpr int kRows = Shape::kReferences / kStep;
  // Of queries: eight threads copy a panel of two rows, which reach different banks.
  static constexpr int kQueryVectors = kPanel / 8;
  static constexpr int kQueryStep = Shape::kThreads / kQueryVectors;
  static constexpr int kQueryRows = Shape::kPanels * Shape::kQueries / kQueryStep;
  static_assert(kStep <= Shape::kReferences && kQueryRows > 0, "every thread copies");

  // The first row and panel of queries that this thread copies, found again to save registers.
  __device__ static int query_row() {
    return static_cast<int>(threadIdx.x) / kQueryVectors % Shape::kQueries;
  }
  __device__ static int query_panel() {
    return kQueryStep > Shape::kQueries
               ? static_cast<int>(threadIdx.x) / kQueryVectors / Shape::kQueries
               : 0;
  }

  const Center& center_;
  const bool aligned_;
  const Index to_low_, apart_;  // from a high part to the low part; between rows of y
  int left_, row_, vector_;     // features that are left; what this thread copies
  int rows_, query_rows_;       // rows that there are from the first one of this thread on
  const R* from_;
  const std::uint16_t* high_;
};

// Scales and centres a lane's features of rows g + 8e, which start at rows[e] (swizzled as in
// WarpShape), and splits them into float16 parts. squares[e] becomes the sum of their squares.
template <class R>
__device__ inline ReferencePanel convert(const R* const (&rows)[2], const float* center,
                                         float scale, int left, const Lane& lane,
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
      load8(rows[e] + 8 * lane.t, left - 8 * lane.t, v);
      // Rounded once: a byte's product with the scale is not exact.
      for (int k = 0; k < 8; ++k) v[k] = fmaf(v[k], scale, -c[k]);
    }
    squares[e] = 0;
    for (float value : v) squares[e] += value * value;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const TwoHalves parts = split_halves(v[2 * i], v[2 * i + 1]);
      // Operands have features 0, 1 of rows g and g + 8, then features 2, 3.
      panel.high[i / 2][i % 2 * 2 + e] = parts.high;
      panel.low[i / 2][i % 2 * 2 + e] = parts.low;
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
    operand_of(slab, 2 + i, lane) = {low[0], low[1], low[2], low[3]};
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
    const uint4 low = operand_of(slab, 2 + i, lane);
    panel.low[i][0] = low.x, panel.low[i][1] = low.y;
    panel.low[i][2] = low.z, panel.low[i][3] = low.w;
  }
  return panel;
}

// The queries of TOGETHER columns as operands. Their panel starts at `x`.
template <int TOGETHER>
__device__ inline void load_query_operands(std::uint32_t (&operands)[TOGETHER][2][2],
                                           const std::uint16_t* x) {
#pragma unroll
  for (int j = 0; j < TOGETHER; ++j) {
    const uint4 four = *reinterpret_cast<const uint4*>(x + 8 * j * kPanel);
    operands[j][0][0] = four.x, operands[j][0][1] = four.y, operands[j][1][0] = four.z,
    operands[j][1][1] = four.w;
  }
}

// Adds `rest` to the total, and keeps the rounding error in `rest`. If `rest` is the larger one, up
// to 2^-24 of it is lost, less than its products have lost already.
__device__ inline void add_rest(float& total, float& rest) {
  const float larger = total + rest;
  rest -= larger - total;
  total = larger;
}

// The same for TOGETHER columns of 8 queries from column `first` on.
template <int TOGETHER, int SLABS, int COLUMNS>
__device__ inline void add_rests(float (&total)[SLABS][COLUMNS][4],
                                 float (&rest)[SLABS][COLUMNS][4], int first) {
#pragma unroll
  for (int s = 0; s < SLABS; ++s)
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j)
      for (int e = 0; e < 4; ++e) add_rest(total[s][first + j][e], rest[s][first + j][e]);
}

// Adds the products with TOGETHER columns of 8 queries from column `first` on to the rest:
// high·high + high·low + low·high. Products of different sums take turns, so that none waits for
// another. The panel of these queries is at `x_high` and `x_low`.
//
// Matrix units round every addition toward zero, so panels are added up outside of them, in two
// floats, total + rest. The products of a panel are added to the rest. What the new total cannot
// hold of that is the next rest (add_rests).
template <int TOGETHER, int SLABS, int COLUMNS>
__device__ inline void add_products(float (&rest)[SLABS][COLUMNS][4], int first,
                                    const ReferencePanel (&y)[SLABS], const std::uint16_t* x_high,
                                    const std::uint16_t* x_low) {
  std::uint32_t x_highs[TOGETHER][2][2], x_lows[TOGETHER][2][2];
  load_query_operands(x_highs, x_high);
  load_query_operands(x_lows, x_low);
  const auto each = [&](auto multiply) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int s = 0; s < SLABS; ++s)
        for (int j = 0; j < TOGETHER; ++j) multiply(i, s, j);
  };
  each([&](int i, int s, int j) {
    multiply_add_halves(rest[s][first + j], y[s].low[i], x_highs[j][i]);
  });
  each([&](int i, int s, int j) {
    multiply_add_halves(rest[s][first + j], y[s].high[i], x_lows[j][i]);
  });
  each([&](int i, int s, int j) {
    multiply_add_halves(rest[s][first + j], y[s].high[i], x_highs[j][i]);
  });
}

// ---- the main loop -----------------------------------------------------------------------------

// The sums of a tile of the features [first, first + trips · kFeatures), panel after panel.
template <class R, int QUERIES, int REFERENCES>
class WarpProducts : public WarpShape<R, QUERIES, REFERENCES> {
 public:
  using Shape = WarpShape<R, QUERIES, REFERENCES>;
  using Shape::kAhead, Shape::kColumns, Shape::kFeatures, Shape::kParts, Shape::kSlabs;
  using Shape::kQueryStages, Shape::kReferenceStages;
  using typename Shape::Memory;
  __device__ WarpProducts(Memory& stages, const Halves& x, int query0, const Rows<R>& y,
                          int reference0, const Center& center, int first, int trips)
      : stages_(stages),
        copy_(x, query0, y, reference0, center, first),
        features_(center.features - first),
        trips_(trips),
        factor_(*center.scale * kUnit<R>) {}

  // Calls finish(total, rest) with the sums of the thread, which are total + rest. Leaves the
  // squares of the references in `tile`.
  template <class Tile, class Finish>
  __device__ void run(Tile& tile, const Finish& finish) {
    for (int p = 0; p < kReferenceStages - 1; ++p) {
      if (p < kQueryStages - 1) stage_queries(p);
      stage_references(p);
    }
    if constexpr (kAhead) {
      wait_copies<kReferenceStages - 2>();
      __syncthreads();
      convert_ahead(0);
    }
    int p = 0;
#pragma unroll 1
    do {  // There is a panel: a loop that might make no trip takes more registers.
      step(p);
    } while (++p < trips_);
    wait_copies<0>();
    __syncthreads();
    tile.store_squares(part_, converted_, lane_, square_);
    finish(total_, rest_);
  }

 private:
  static constexpr int kTogether = QUERIES == 64 ? 4 : 2;  // columns; others have fewer registers
  static constexpr int kConvertAt = kTogether;             // column; elsewhere compilers spill

  __device__ void stage_queries(int p) {
    if (p < trips_) copy_.next(stages_.queries[p % kQueryStages]);
    if constexpr (kAhead) commit_copies();
  }
  __device__ void stage_references(int p) {
    if (p < trips_) copy_.next(stages_.references[p % kReferenceStages]);
    commit_copies();
  }
  __device__ void stage_next(int p) {
    stage_queries(p + kQueryStages - 1);
    stage_references(p + kReferenceStages - 1);
  }

  // Panel `half` of trip p, of the two rows of this lane, converted to high and low parts.
  __device__ ReferencePanel convert_panel(int p, int half) {
    auto& stage = stages_.references[p % kReferenceStages];
    const int first = half * kPanel, left = features_ - p * kFeatures - first;
    // In rows of short types the panels may trade places, and starts differ by kSpread (WarpShape).
    const int panel = sizeof(R) < 4 && Shape::trades(lane_.g) ? half ^ 1 : half;
    const int start = lane_.g % Shape::kSpread * kFeatures + panel * kPanel;
    const R* const rows[2] = {&stage.y[converted_ + lane_.g][start],
                              &stage.y[converted_ + lane_.g + 8][start]};
    return convert(rows, stage.center + first, factor_, left, lane_, squares_);
  }
  // The last trip converts a panel that is never used.
  __device__ void convert_ahead(int p) {
    const ReferencePanel panel = convert_panel(p, 0);
    __syncwarp();  // all values are read
    store_panel(stages_.references[p % kReferenceStages].y[converted_], panel, lane_);
  }
  __device__ void add_squares() {
    for (int e = 0; e < 2; ++e) square_[e].add(squares_[e]);
  }

  // Adds the products of the panels of stage p.
  __device__ void step(int p) {
    wait_copies<kAhead ? kReferenceStages - 3 : kReferenceStages - 2>();
    __syncthreads();  // copies have arrived, and no thread uses what the next ones replace
    if constexpr (!kAhead) stage_next(p);
#pragma unroll
    for (int half = part_, i = 0; i < Shape::kPanels / kParts; half += kParts, ++i) {
      if (!kAhead && features_ <= p * kFeatures + half * kPanel) continue;
      ReferencePanel panel[kSlabs];
      if constexpr (!kAhead) panel[0] = convert_panel(p, half);
      add_squares();
      if constexpr (kAhead)
        for (int s = 0; s < kSlabs; ++s)
          panel[s] = load_panel(
              stages_.references[p % kReferenceStages].y[16 * (kSlabs * group_ + s)], lane_);
      const auto& queries = stages_.queries[p % kQueryStages].x[half];
#pragma unroll
      for (int j = 0; j < kColumns; j += kTogether) {
        const int query = column0_ + 8 * j + lane_.g;
        add_products<kTogether>(rest_, j, panel, &queries[0][query][8 * lane_.t],
                                &queries[1][query][8 * lane_.t]);
        add_rests<kTogether>(total_, rest_, j);
        // Matrix units multiply meanwhile.
        if (kAhead && j == 0) stage_next(p);
        if (kAhead && j == kConvertAt) convert_ahead(p + 1);
      }
    }
  }

  Memory& stages_;
  TileCopy<Shape> copy_;
  const int features_, trips_;  // from the first one on
  const float factor_;
  const Lane lane_ = this_lane();
  // Unsigned, so that compilers compute them again in two instructions rather than keep them.
  const int group_ = static_cast<int>(threadIdx.x / 32 % Shape::kGroups);
  const int other_ = static_cast<int>(threadIdx.x / 32 / Shape::kGroups);
  const int part_ = kParts > 1 ? other_ : 0, column0_ = kAhead ? 8 * kColumns * other_ : 0;
  const int converted_ = 16 * (kAhead ? lane_.warp : group_);  // first row that the warp converts
  float total_[kSlabs][kColumns][4] = {}, rest_[kSlabs][kColumns][4] = {};
  TwoFloats square_[2] = {};
  float squares_[2];
};

}  // namespace
}  // namespace pfgm
