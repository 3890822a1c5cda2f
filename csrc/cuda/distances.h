// Squared distances between a block of queries and a chunk of references, on CUDA devices.
//
// distances computes |x|² + |y|² − 2 x·y from products in matrix units, of centred data in two
// float16 parts (cuda/centering.h). For few queries or features, differences computes Σ (x − y)²
// instead. Both also find the smallest distance of each tile of references. With PROJECT they
// compute G·y instead, up to a number for each query.
#pragma once
#include "cuda/centering.h"

namespace pfgm {
namespace {

constexpr int kTileReferences = 64;  // references in a tile, whose smallest distance is kept

constexpr Index kMostPairs = Index{1} << 31;  // of a block and a chunk, for places of 32 bits

// Arrays in the workspace. Rows are `stride` apart.
struct Pairs {
  Index stride;
  double* squared;   // (queries, stride)
  float* projected;  // (queries, stride): G·y; may be null
  double* lowest;    // (queries, tiles); negative if a distance of the tile is not finite
  double* reach;     // (tiles): the largest |y − centre|²
  double* norms;     // (queries): |x − centre|², or |x|² beside differences
  unsigned* list;    // (queries · stride): places in `squared` of the pairs that refine takes
  unsigned* listed;  // their number
  int tiles;
};

// ---- what both do with a tile ----------------------------------------------------------------

// Empties the list. find_limits, a later launch of the stream, fills it.
__device__ inline void clear_list(const Pairs& out) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *out.listed = 0;
}

// Numbers ≥ 0 have the order of their bits; infinity and NaN follow. Comparing bits takes no
// float64 instructions, which are slow on GeForce cards.
constexpr std::uint64_t kInfiniteBits = 0x7ffull << 52;

// The bits of the distance, or of 0 if it is negative.
__device__ inline std::uint64_t not_negative(double distance) {
  const auto bits = static_cast<std::uint64_t>(bits_of(distance));
  const auto front = static_cast<std::uint32_t>(bits >> 32);
  return front < 0x80000000u || front > 0xfff00000u ? bits : 0;
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

// Stores the smallest distance of a tile for each query, from low[row of warps][query].
template <int QUERIES>
__device__ inline void store_lowest(const double (*low)[QUERIES], int rows, int tile, int query0,
                                    int queries, const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= QUERIES || query0 + q >= queries || tile >= out.tiles) return;
  double least = low[0][q];
  for (int w = 1; w < rows; ++w) least = LeastFinite()(least, low[w][q]);
  if (signbit(least)) least = -fmax(-least, 1e-300);  // below 0 even if a distance is 0
  out.lowest[static_cast<Index>(query0 + q) * out.tiles + tile] = least;
}

// ---- products --------------------------------------------------------------------------------

constexpr int kDistanceThreads = 256;

// A block has REFERENCES × QUERIES pairs. A warp has 16 references × QUERIES; if that takes half of
// the warps, each half takes every second panel. Two panels are staged together. In rows of float32
// the 16-byte pieces of odd rows trade places in pairs, so that the accesses of a warp lie in
// different banks.
template <class R, int QUERIES, int REFERENCES>
struct DistanceMemory {
  static constexpr int kStages = REFERENCES == 64 ? 3 : 2, kFeatures = 2 * kPanel;
  static constexpr int kSwap = sizeof(R) == 4 ? 1 : 0;
  static constexpr int kGroups = REFERENCES / 16, kParts = kDistanceThreads / 32 / kGroups;
  struct Stage {
    R y[REFERENCES][kFeatures];
    std::uint16_t x[2][2][QUERIES][kPanel];  // panel, part, query
    float center[kFeatures];
  };
  struct Sums {
    double products[kParts > 1 ? REFERENCES : 1][QUERIES + 1];  // of the other half of the warps
    double squares[kParts][REFERENCES];
    double low[kGroups][QUERIES];
    double farthest[kGroups];
  };
  union {
    Stage stages[kStages];
    Sums sums;
  };
  double units[QUERIES], norms[QUERIES];
};
static_assert(sizeof(DistanceMemory<float, 64, 64>) <= kSharedLimit &&
                  sizeof(DistanceMemory<float, 64, 128>) <= kSharedLimit,
              "a block fits everywhere");

// Copies the panels of a tile, one after the other. A thread copies the same piece of each of its
// rows. In place of rows after the last it copies its first one; their distances are not stored.
template <class R, int QUERIES, int REFERENCES>
class TileCopy {
 public:
  using Memory = DistanceMemory<R, QUERIES, REFERENCES>;
  using Stage = typename Memory::Stage;

  __device__ TileCopy(const Halves& x, int query0, const Rows<R>& y, int reference0,
                      const Center& center)
      : center_(center),
        aligned_(y.aligned),
        to_low_(x.low - x.high),
        apart_(kStep * y.stride),
        left_(center.features) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, piece_ = thread % kPieces, half_row_ = thread / kHalfPieces;
    rows_ = y.count - reference0 - row_, half_rows_ = x.rows - query0 - half_row_;
    from_ = y.row(rows_ > 0 ? reference0 + row_ : 0) + piece_ * kCount;
    high_ = x.high + static_cast<Index>(half_rows_ > 0 ? query0 + half_row_ : 0) * center.width +
            thread % kHalfPieces * 8;
  }

  // Starts the copies of the next panels.
  __device__ void next(Stage& stage) {
    const int known = left_ - piece_ * kCount;
    const int count = known < 0 ? 0 : known < kCount ? known : kCount;
    R* const to = stage.y[row_] + (piece_ ^ (row_ & Memory::kSwap)) * kCount;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        copy_async<16>(to + i * kStep * Memory::kFeatures,
                       i * kStep < rows_ ? from_ + i * apart_ : from_,
                       count * static_cast<int>(sizeof(R)));
    } else {
      for (int i = 0; i < kRows; ++i)
        for (int k = 0; k < kCount; ++k)
          to[i * kStep * Memory::kFeatures + k] =
              k < count ? from_[(i * kStep < rows_ ? i * apart_ : 0) + k] : R{};
    }
    const int thread = static_cast<int>(threadIdx.x), piece = thread % kHalfPieces;
    std::uint16_t* const half = &stage.x[piece / 4][0][half_row_][piece % 4 * 8];
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {
      const std::uint16_t* const high =
          i * kHalfStep < half_rows_ ? high_ + i * kHalfStep * center_.width : high_;
      copy_async<16>(half + i * kHalfStep * kPanel, high);
      copy_async<16>(half + (QUERIES + i * kHalfStep) * kPanel, high + to_low_);
    }
    if (thread < Memory::kFeatures / 4)
      copy_async<16>(&stage.center[4 * thread],
                     center_.scaled + (center_.features - left_) + 4 * thread);
    from_ += Memory::kFeatures, high_ += Memory::kFeatures;
    left_ -= Memory::kFeatures;
  }

 private:
  static constexpr int kCount = 16 / sizeof(R), kPieces = Memory::kFeatures / kCount;
  static constexpr int kStep = kDistanceThreads / kPieces;
  static constexpr int kRows = REFERENCES / kStep;
  static constexpr int kHalfPieces = Memory::kFeatures / 8;
  static constexpr int kHalfStep = kDistanceThreads / kHalfPieces;
  static constexpr int kHalfRows = QUERIES / kHalfStep;
  static_assert(kStep <= REFERENCES && kHalfStep <= QUERIES, "every thread copies");

  const Center& center_;
  const bool aligned_;
  const Index to_low_, apart_;         // from a high part to the low part; between rows of y
  int left_, row_, piece_, half_row_;  // features that are left; what this thread copies
  int rows_, half_rows_;               // rows that there are from the first one of this thread on
  const R* from_;
  const std::uint16_t* high_;
};

// The panel of a lane: references g and g + 8, features 8t to 8t + 7, times the scale and centred,
// in two parts, as the operands of two products. Adds up their squares.
template <class R>
struct ReferencePanel {
  std::uint32_t high[2][4], low[2][4];

  // Row g + 8e has features from `rows[e]` on.
  template <int SWAP>
  __device__ void load(const R* const (&rows)[2], const float* center, float scale, int known,
                       const Lane& lane, float (&square)[2], float (&square_lost)[2]) {
    float c[8];
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(center + 8 * lane.t + i);
      c[i] = four.x, c[i + 1] = four.y, c[i + 2] = four.z, c[i + 3] = four.w;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float v[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int feature = 8 * lane.t + 4 * i;
        float four[4];
        load4(rows[e] + 8 * lane.t + 4 * (i ^ (lane.g & SWAP)), known - feature, four);
        for (int k = 0; k < 4; ++k) v[4 * i + k] = four[k] * scale - c[4 * i + k];
      }
      for (float value : v) sum += value * value;
      add_compensated(square[e], square_lost[e], sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const TwoHalves parts = split_halves(v[2 * i], v[2 * i + 1]);
        // Operands have features 0, 1 of rows g and g + 8, then features 2, 3.
        high[i / 2][i % 2 * 2 + e] = parts.high;
        low[i / 2][i % 2 * 2 + e] = parts.low;
      }
    }
  }
};

// Adds the products with COLUMNS columns of 8 queries: high·high + high·low + low·high. They take
// turns, so that none waits for another. The panel of the first column is at `x_high` and `x_low`.
// Matrix units round every addition toward zero, so panels are added up outside of them, in two
// floats.
template <int COLUMNS>
__device__ inline void add_products(float (*total)[4], float (*lost)[4],
                                    const std::uint32_t (&high)[2][4],
                                    const std::uint32_t (&low)[2][4], const std::uint16_t* x_high,
                                    const std::uint16_t* x_low) {
  float panel[COLUMNS][4];
  std::uint32_t of_high[COLUMNS][2][2], of_low[COLUMNS][2][2];
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    const uint4 a = *reinterpret_cast<const uint4*>(x_high + 8 * j * kPanel);
    const uint4 b = *reinterpret_cast<const uint4*>(x_low + 8 * j * kPanel);
    of_high[j][0][0] = a.x, of_high[j][0][1] = a.y, of_high[j][1][0] = a.z, of_high[j][1][1] = a.w;
    of_low[j][0][0] = b.x, of_low[j][0][1] = b.y, of_low[j][1][0] = b.z, of_low[j][1][1] = b.w;
  }
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) multiply_halves(panel[j], low[0], of_high[j][0]);
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) multiply_add_halves(panel[j], low[1], of_high[j][1]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < COLUMNS; ++j) multiply_add_halves(panel[j], high[i], of_low[j][i]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < COLUMNS; ++j) multiply_add_halves(panel[j], high[i], of_high[j][i]);
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
    for (int e = 0; e < 4; ++e) add_compensated(total[j][e], lost[j][e], panel[j][e]);
}

// Σ over the lanes t of a group of four.
__device__ inline double over_quad(double value) {
  value += __shfl_xor_sync(kAll, value, 1);
  return value + __shfl_xor_sync(kAll, value, 2);
}

// |y − centre|², if the reference counts for the reach of its tile: larger ones have no products in
// float16.
__device__ inline double reach_of(double scaled, double squared, int features, bool known) {
  return known && scaled <= features * 0x1p32 ? squared : 0;
}

template <class R, int QUERIES, int REFERENCES, bool PROJECT>
__global__ void __launch_bounds__(kDistanceThreads, QUERIES == 32 ? 2 : 1)
    distances(const Halves x, const Rows<R> y, const Center center, const Pairs out) {
  using Memory = DistanceMemory<R, QUERIES, REFERENCES>;
  constexpr int kColumns = QUERIES / 8, kParts = Memory::kParts;
  constexpr int kTogether = QUERIES == 32 ? 2 : 4;  // columns; smaller tiles have fewer registers
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int group = lane.warp % Memory::kGroups, part = lane.warp / Memory::kGroups;
  const int row0 = 16 * group;
  const int reference0 = static_cast<int>(blockIdx.x) * REFERENCES;
  const int query0 = static_cast<int>(blockIdx.y) * QUERIES;
  const float scale = *center.scale, factor = scale * kUnit<R>;
  if constexpr (!PROJECT) clear_list(out);
  float total[kColumns][4] = {}, lost[kColumns][4] = {}, square[2] = {}, square_lost[2] = {};

  if (const int q = static_cast<int>(threadIdx.x); q < QUERIES) {
    const int query = query0 + q < x.rows ? query0 + q : 0;
    shared.units[q] = x.units[query];
    if constexpr (!PROJECT) shared.norms[q] = out.norms[query];
  }
  TileCopy<R, QUERIES, REFERENCES> copy(x, query0, y, reference0, center);
  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(center.features, Memory::kFeatures)),
      [&](int, int slot) { copy.next(shared.stages[slot]); },
      [&](int p, int slot) {
        const auto& stage = shared.stages[slot];
#pragma unroll
        for (int half = part, i = 0; i < 2 / kParts; half += kParts, ++i) {
          const int first = half * kPanel;
          const int known = center.features - p * Memory::kFeatures - first;
          // Without a branch between them, the products of two panels take turns. Short types need
          // too many registers for that.
          constexpr bool kBranch = kParts > 1 || sizeof(R) < 4;
          if (kBranch && known <= 0) return;
          const R* const rows[2] = {&stage.y[row0 + lane.g][first],
                                    &stage.y[row0 + lane.g + 8][first]};
          ReferencePanel<R> panel;
          panel.template load<Memory::kSwap>(rows, stage.center + first, factor, known, lane,
                                             square, square_lost);
#pragma unroll
          for (int j = 0; j < kColumns; j += kTogether)
            add_products<kTogether>(&total[j], &lost[j], panel.high, panel.low,
                                    &stage.x[half][0][8 * j + lane.g][8 * lane.t],
                                    &stage.x[half][1][8 * j + lane.g][8 * lane.t]);
        }
      });

  // Each half of the warps finishes half of the columns, with the sums of the other half.
  constexpr int kOwn = kColumns / kParts;
  if constexpr (kParts > 1)
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * (kOwn * (1 - part) + j) + 2 * lane.t + i % 2;
        double& given = shared.sums.products[row0 + 8 * (i / 2) + lane.g][column];
        const int own = kOwn + j;
        given = part > 0 ? static_cast<double>(total[j][i]) - lost[j][i]
                         : static_cast<double>(total[own][i]) - lost[own][i];
        if (part > 0) total[j][i] = total[own][i], lost[j][i] = lost[own][i];
      }
  for (int e = 0; e < 2; ++e) {
    const double sum = over_quad(static_cast<double>(square[e]) - square_lost[e]);
    if (lane.t == 0) shared.sums.squares[part][row0 + 8 * e + lane.g] = sum;
  }
  __syncthreads();
  const double per_scale = center.scale[1];
  double squares[2], farthest = 0;
  bool known[2];
  for (int e = 0; e < 2; ++e) {
    const int row = row0 + 8 * e + lane.g;
    double scaled = shared.sums.squares[0][row];
    if constexpr (kParts > 1) scaled += shared.sums.squares[1][row];
    squares[e] = scaled * per_scale * per_scale;
    known[e] = reference0 + row < y.count;
    farthest = fmax(farthest, reach_of(scaled, squares[e], center.features, known[e]));
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      const int column = 8 * (kOwn * part + j) + 2 * lane.t + odd;
      const bool inside = query0 + column < x.rows;
      const double unit = shared.units[column], norm = PROJECT ? 0 : shared.norms[column];
      const Index place = (query0 + column) * out.stride + reference0 + row0 + lane.g;
      std::uint64_t low = kInfiniteBits;
      bool infinite = false;
      for (int e = 0; e < 2; ++e) {
        double product = static_cast<double>(total[j][2 * e + odd]) - lost[j][2 * e + odd];
        if constexpr (kParts > 1) product += shared.sums.products[row0 + 8 * e + lane.g][column];
        if constexpr (PROJECT) {
          if (inside && known[e]) out.projected[place + 8 * e] = static_cast<float>(unit * product);
        } else {
          const std::uint64_t distance = not_negative(squares[e] + norm - 2 * unit * product);
          if (inside && known[e]) out.squared[place + 8 * e] = double_of(distance);
          if (!known[e]) continue;
          infinite = infinite || distance >= kInfiniteBits;
          low = Least()(low, distance);
        }
      }
      if constexpr (!PROJECT) {
        for (int apart = 4; apart < 32; apart *= 2)
          low = Least()(low, __shfl_xor_sync(kAll, low, apart));
        const bool marked = (__ballot_sync(kAll, infinite) & 0x11111111u << lane.t) != 0;
        const double least = double_of(low < kInfiniteBits ? low : kInfiniteBits);
        if (lane.g == 0) shared.sums.low[group][column] = marked ? -least : least;
      }
    }
  if constexpr (!PROJECT) {
    farthest = over_warp(farthest, Most());
    if (lane.lane == 0 && part == 0) shared.sums.farthest[group] = farthest;
    __syncthreads();
    constexpr int kTileGroups = kTileReferences / 16;
#pragma unroll
    for (int i = 0; i < REFERENCES / kTileReferences; ++i) {
      const int tile = static_cast<int>(blockIdx.x) * (REFERENCES / kTileReferences) + i;
      store_lowest<QUERIES>(shared.sums.low + i * kTileGroups, kTileGroups, tile, query0, x.rows,
                            out);
      if (blockIdx.y > 0 || threadIdx.x > 0 || tile >= out.tiles) continue;
      double most = 0;
      for (int w = 0; w < kTileGroups; ++w)
        most = fmax(most, shared.sums.farthest[i * kTileGroups + w]);
      out.reach[tile] = most;
    }
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
