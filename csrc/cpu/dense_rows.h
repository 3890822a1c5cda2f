// Few features: a block of queries against a chunk of references, as rows of float32.
//
// With few features distances, weights and sums cost about the same, and so does each pass over
// memory. One task takes a block of queries through all chunks of references. The references of a
// chunk are packed once, with references as lanes, for distances and sums alike. The distances of a
// query are a row, which becomes its weights in place.
//
// If float32 is not accurate enough, or only a few references of a row have weight, those go into a
// list in float64. At low noise most rows are such lists and need no sums over whole rows.
#pragma once
#include "cpu/distances.h"
#include "cpu/float_weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kFewestRows = 8;               // with fewer queries packing does not pay
constexpr Index kMaxRows = 64;                 // most queries in a block
constexpr Index kDenseMultiple = 15 * kChunk;  // a multiple of every dense_chunk()
constexpr Index kMaxPackedBytes = 512 << 10;   // packed references stay in cache for all queries
constexpr Index kFloatStride = kChunk + 64;    // between rows; not a power of two, as kStride
constexpr Index kFewReferences = 64;           // up to this many are a list rather than a whole row
constexpr Index kSumSegment = 1024;            // references summed in float32 before float64

// Whether the kernels for few features take the problem. Few queries leave too few blocks
// for the threads, which share the references instead (cpu/blocks.h).
inline bool is_dense(const Problem& problem) {
  return problem.type == Type::float32 && problem.features < kListedFeatures &&
         problem.queries >= kFewestRows;
}

// Features of a packed tile. An odd multiple of 4: with a power of two the same features of
// all tiles would compete for a few cache sets.
inline Index packed_features(Index features) {
  return features < 16 ? features : round_up(features + 4, 8) - 4;
}

// References in a chunk: whole tiles, and a divisor of kChunk or kDenseMultiple, which keeps
// chunk_rows() small.
inline Index dense_chunk(const Problem& problem) {
  constexpr Index tile = Simd<float>::tile;
  const Index row = packed_features(problem.features) * static_cast<Index>(sizeof(float));
  Index tiles = smaller(kChunk, larger(kMaxPackedBytes / row, tile)) / tile;
  while (kChunk % (tiles * tile) != 0 && kDenseMultiple % (tiles * tile) != 0) --tiles;
  return tiles * tile;
}

// Calls f with each index, unrolled.
template <class F, int... kIndex>
void unroll(const F& f, Indices<kIndex...>) {
  (f(kIndex), ...);
}

// Calls finish(q, sums) for each row, with Σ Term over a panel of n features. kHalves sums its two
// halves apart, which halves the rounding error.
template <class Term, bool kHalves, int kRows, class Finish>
void sum_panel(const float* const* x, const float* const* g, const float* y, Index n,
               const Finish& finish) {
  constexpr Index lanes = kFloats, tile = Simd<float>::tile;
  typedef Floats Sums[kRows][kTileVectors];
  const auto add = [&](Index begin, Index end, Sums& sum) __attribute__((always_inline)) {
    set_zero(sum);
    for (Index k = begin; k < end; ++k) {
      Floats reference[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) reference[v] = vector_at(y + k * tile + v * lanes);
      for (int q = 0; q < kRows; ++q)
        for (int v = 0; v < kTileVectors; ++v) Term::add(sum[q][v], x[q][k], g[q][k], reference[v]);
    }
  };
  Sums sum;
  add(kHalves ? dense_part(n) : 0, n, sum);
  if constexpr (kHalves) {
    Sums first;
    add(0, dense_part(n), first);
    for (int q = 0; q < kRows; ++q)
      for (int v = 0; v < kTileVectors; ++v) sum[q][v] += first[q][v];
  }
  unroll([&](int q) { finish(q, sum[q]); }, typename CountTo<kRows>::Type());
}

template <class Term, bool kHalves, int kRows, class Finish>
void sum_panel(Index rows, const float* const* x, const float* const* g, const float* y, Index n,
               const Finish& finish) {
  if constexpr (kRows > 1)
    if (rows < kRows) return sum_panel<Term, kHalves, kRows - 1>(rows, x, g, y, n, finish);
  sum_panel<Term, kHalves, kRows>(x, g, y, n, finish);
}

// Adds a value to the sum of two floats.
inline void add_exactly(const Floats& value, Floats& high, Floats& low) {
  const Floats sum = high + value, added = sum - high;
  low += (high - (sum - added)) + (value - added);
  high = sum;
}

// References of a chunk in float64.
struct List {
  Index length;
  // The smallest squared distance of the row; NaN if one is not finite, kUnderflowed if the
  // result depends on distances that underflow.
  double nearest;
  alignas(64) double squared[kChunk], weight[kChunk], term[kChunk];
  std::int32_t index[kChunk];
};

class DenseRows {
 public:
  // Values of float32 for `workspace`.
  static Index space(const Problem& problem) {
    return dense_chunk(problem) * packed_features(problem.features) +
           kMaxRows * (kFloatStride * (has_low(problem) ? 2 : 1) + 2 * kFloats);
  }

  // Rows are those of queries first … first + count − 1.
  DenseRows(const Problem& problem, const WeightLaw& law, Index first, Index count,
            float* workspace)
      : problem_(problem),
        law_(law),
        first_query_(first),
        queries_(count),
        packed_(workspace),
        rows_(packed_ + dense_chunk(problem) * packed_features(problem.features)),
        least_(rows_ + kMaxRows * kFloatStride),
        not_finite_(least_ + kMaxRows * kFloats),
        low_rows_(has_low(problem) ? not_finite_ + kMaxRows * kFloats : nullptr) {}

  // Packs a chunk of references and computes its squared distances.
  void set_chunk(Index first, Index count) {
    constexpr Index tile = Simd<float>::tile;
    first_reference_ = first;
    count_ = count;
    for (Index b = 0; b < queries_; ++b) {
      vector_at(least_ + b * kFloats) = Floats{} + kLargestFloat;
      vector_at(not_finite_ + b * kFloats) = Floats{};
    }
    for (Index j = 0; j < count; j += tile) {
      float* packed = packed_ + j * packed_features(problem_.features);
      pack(j, smaller(tile, count - j), packed);
      const Index panel = dense_panel(problem_.features);
      for (Index k = 0; k < problem_.features; k += panel)
        for (Index b = 0; b < queries_; b += kTileQueries)
          measure(b, j, k, smaller(panel, problem_.features - k), packed + k * tile);
    }
    for (Index b = 0; b < queries_; ++b)
      for (Index j = count; j < padded(); ++j) remove(b, j);
  }

  // Splits the references that may count for query b into a list and the rest of its row, in which
  // the listed ones are infinitely far. Returns whether the rest has any that count. Everything
  // goes into the list if not `in_float`. earlier.nearest is an upper bound of the nearest
  // distance.
  bool split(Index b, const QueryState& earlier, bool in_float, List& list) const {
    const Least smallest = least(b);
    list.length = 0;
    list.nearest = kSkipped;
    if (!smallest.finite) return take(b, kInfinity, kInfinity, list);
    const bool nearer = smallest.value < earlier.nearest;
    const double base = nearer ? smallest.value : earlier.nearest, r = radius(b);
    const double fall = nearer ? law_.cutoff : visible_fall(law_, earlier);
    const NeededDigits<float> needed(problem_, law_, query(b), base, r);
    const double near = needed.farthest(kNear);
    const double far = needed.farthest(fall > kNear ? fall : kNear);
    if (smallest.value > far) return false;
    if (!in_float || !FloatWeights(law_, base, r, fall).fits()) return take(b, far, near, list);
    const Index candidates = number_within(b, near);
    if (candidates > kFewCandidates && smallest.value > kFloatUnderflow && !needed.insufficient() &&
        needed.average_out(
            row(b), count_, float_limit(near), static_cast<float>(smallest.value), candidates,
            [&](Index j) { return squared(b, j); }, [&](Index j) { return reference(j); })) {
      list.nearest = nearest(b, smallest.value);
      return true;
    }
    if (number_within(b, far) <= candidates + kFewReferences) return take(b, far, near, list);
    take(b, near, near, list);
    return true;
  }

  // Squared distances of a query in float32, and what rounding left of them. With one panel of
  // features nothing is left, and low_row is null.
  float* row(Index b) const { return rows_ + b * kFloatStride; }
  float* low_row(Index b) const { return low_rows_ ? low_rows_ + b * kFloatStride : nullptr; }
  // Packed features of the references from the j-th on, the first of a tile.
  const float* packed(Index j) const { return packed_ + j * packed_features(problem_.features); }
  Index count() const { return count_; }
  Index padded() const { return round_up(count_, Simd<float>::tile); }
  double radius(Index b) const { return problem_.radius[first_query_ + b]; }
  const float* query(Index b) const {
    return static_cast<const float*>(problem_.x) + (first_query_ + b) * problem_.x_stride;
  }
  Row reference(Index j) const { return references_of(problem_)(first_reference_ + j); }

 private:
  struct Least {
    double value;
    bool finite;  // whether all values are finite
  };

  static bool has_low(const Problem& problem) {
    return dense_panel(problem.features) < problem.features;
  }

  double squared(Index b, Index j) const {
    const double high = row(b)[j];
    return low_rows_ ? high + static_cast<double>(low_row(b)[j]) : high;
  }

  // The smallest squared distance of a row, from the smallest rounded one.
  double nearest(Index b, double rounded) const {
    if (!low_rows_) return rounded;
    const float *high = row(b), *low = low_row(b), smallest = static_cast<float>(rounded);
    Floats least = Floats{} + kLargestFloat;
    for (Index j = 0; j < padded(); j += kFloats) {
      const Ints lower = (vector_at(high + j) == smallest) & (vector_at(low + j) < least);
      least = lower ? vector_at(low + j) : least;
    }
    float rest = least[0];
    for (Index lane = 1; lane < kFloats; ++lane) rest = least[lane] < rest ? least[lane] : rest;
    return rounded + static_cast<double>(rest);
  }

  // Makes a reference infinitely far.
  void remove(Index b, Index j) const {
    row(b)[j] = std::numeric_limits<float>::infinity();
    if (low_rows_) low_row(b)[j] = 0;
  }

  Least least(Index b) const {
    const float *least = least_ + b * kFloats, *not_finite = not_finite_ + b * kFloats;
    Least smallest = {kLargestFloat, true};
    for (Index lane = 0; lane < kFloats; ++lane) {
      if (least[lane] < smallest.value) smallest.value = least[lane];
      if (not_finite[lane] != 0) smallest.finite = false;
    }
    return smallest;
  }

  // packed[feature][reference]. The last reference fills the tile, so that no lane has a distance
  // of its own.
  void pack(Index j, Index filled, float* packed) const {
    constexpr Index tile = Simd<float>::tile;
    DenseTiles<float>::pack(references_of(problem_), first_reference_ + j, filled, 0,
                            problem_.features, packed);
    if (filled == tile) return;
    for (Index k = 0; k < problem_.features; ++k)
      for (Index i = filled; i < tile; ++i) packed[k * tile + i] = packed[k * tile + filled - 1];
  }

  // Adds n features from k on to the distances of a tile of queries and references.
  void measure(Index b, Index j, Index k, Index n, const float* packed) const {
    const Index count = smaller(kTileQueries, queries_ - b);
    const float* x[kTileQueries];
    for (Index q = 0; q < count; ++q) x[q] = query(b + q) + k;
    const bool last = k + n == problem_.features;
    if (!low_rows_) {
      sum_panel<Distance, true, kTileQueries>(
          count, x, x, packed, n, [&](int q, const Floats(&squared)[kTileVectors]) {
            for (int v = 0; v < kTileVectors; ++v)
              vector_at(row(b + q) + j + v * kFloats) = squared[v];
            note(b + q, squared);
          });
      return;
    }
    sum_panel<Distance, false, kTileQueries>(
        count, x, x, packed, n, [&](int q, const Floats(&part)[kTileVectors]) {
          Floats squared[kTileVectors];
          for (int v = 0; v < kTileVectors; ++v) {
            Floats& high = vector_at(row(b + q) + j + v * kFloats);
            Floats& low = vector_at(low_row(b + q) + j + v * kFloats);
            if (k == 0) high = low = Floats{};
            add_exactly(part[v], high, low);
            if (last) {  // what is left is half a unit in the last place at most
              const Floats rest = low;
              low = Floats{};
              add_exactly(rest, high, low);
            }
            squared[v] = high;
          }
          if (last) note(b + q, squared);
        });
  }

  // Keeps the smallest distance of row b in each lane, and whether all are finite.
  void note(Index b, const Floats (&squared)[kTileVectors]) const {
    Floats lowest = squared[0], zero = {};
    for (int v = 0; v < kTileVectors; ++v) {
      lowest = squared[v] < lowest ? squared[v] : lowest;
      zero += squared[v] * 0.0f;  // NaN if the distance is not finite
    }
    Floats& least = vector_at(least_ + b * kFloats);
    least = lowest < least ? lowest : least;
    vector_at(not_finite_ + b * kFloats) += zero;
  }

  Index number_within(Index b, double limit) const {
    const float *squared = row(b), most = float_limit(limit);
    Ints number = {};
    for (Index j = 0; j < padded(); j += kFloats) number -= vector_at(squared + j) <= most;
    Index total = 0;
    for (Index lane = 0; lane < kFloats; ++lane) total += number[lane];
    return total;
  }

  // Moves the references within `far` to the list; those within `near` get their exact distances.
  // Returns false, which split() returns if nothing is left in the row.
  bool take(Index b, double far, double near, List& list) const {
    float* squared = row(b);
    const float most = float_limit(far);
    for (Index j = 0; j < padded(); j += kFloats)
      if (std::isinf(far) || any(vector_at(squared + j) <= most))
        for (Index i = j; i < smaller(j + kFloats, count_); ++i)
          if (std::isinf(far) || squared[i] <= most) {
            list.squared[list.length] = this->squared(b, i);
            list.index[list.length++] = static_cast<std::int32_t>(i);
            remove(b, i);
          }
    for (Index i = 0; i < list.length; ++i) {
      if (std::isinf(near) || list.squared[i] <= near)
        list.squared[i] = exact_distance(query(b), reference(list.index[i]), problem_.features);
      if (!(list.squared[i] <= kSkipped)) {
        list.nearest = std::numeric_limits<double>::quiet_NaN();
        return false;
      }
      if (list.squared[i] < list.nearest) list.nearest = list.squared[i];
    }
    if (may_underflow<float>(problem_)) {
      const double least = least_square(problem_.features), r = radius(b);
      if (list.nearest < least && r * r < least)
        list.nearest = separate(
            query(b), [&](Index i) { return reference(list.index[i]); }, problem_.features, r,
            list.squared, list.length);
    }
    for (Index i = list.length; i < padded_count(list.length); ++i) list.squared[i] = kSkipped;
    return false;
  }

  const Problem& problem_;
  const WeightLaw& law_;
  const Index first_query_, queries_;
  float *const packed_, *const rows_, *const least_, *const not_finite_, *const low_rows_;
  Index first_reference_ = 0, count_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
