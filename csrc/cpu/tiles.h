// Sums over features for pairs of queries and references, in register tiles.
#pragma once
#include "cpu/groups.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// ---- all pairs: references feature by feature, one to a lane --------------------------------

constexpr Index kPanel = 256;            // features in a packed tile
constexpr Index kMaxAdditions = 64;      // into one sum of T before it is merged with more digits
constexpr Index kPrefetchFeatures = 64;  // how far ahead a reference is prefetched, in features

// What one feature adds for a pair: to the squared distance, or to g · (y − x).
struct Distance {
  template <class V, class T>
  static void add(V& sum, T x, T, const V& y) {
    const V difference = x - y;
    sum += difference * difference;
  }
};
struct Projection {
  template <class V, class T>
  static void add(V& sum, T x, T g, const V& y) {
    sum += g * (y - x);
  }
};

// Features summed at a time in a dense tile: panels of equal width. The same for any number of
// queries, so that a row alone has the same distances as in a batch.
inline Index dense_panel(Index features) {
  return divide_up(features, divide_up(features, kMaxAdditions));
}

// Features that are added into one sum of T.
inline Index dense_part(Index features) {
  return features <= kMaxAdditions ? divide_up(features, 2) : dense_panel(features);
}

// Adds the sum over n features, in panels, to out[q][r] for a tile of references; assigns it if
// `fresh`.
template <class Term, class T, int kRows>
void sum_features(const T* const* x, const T* const* g, const T* y, Index n, Index panel,
                  bool fresh, double* const* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes, tile = Simd<T>::tile;
  for (Index begin = 0; begin < n; begin += panel) {
    const Index end = smaller(begin + panel, n);
    Vector sum[kRows][kTileVectors];
    set_zero(sum);
    for (Index k = begin; k < end; ++k) {
      Vector reference[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) reference[v] = vector_at(y + k * tile + v * lanes);
      for (int q = 0; q < kRows; ++q)
        for (int v = 0; v < kTileVectors; ++v) Term::add(sum[q][v], x[q][k], g[q][k], reference[v]);
    }
    for (int q = 0; q < kRows; ++q)
      for (int v = 0; v < kTileVectors; ++v)
        if (fresh)
          for (Index lane = 0; lane < lanes; ++lane) out[q][v * lanes + lane] = sum[q][v][lane];
        else
          for (Index lane = 0; lane < lanes; ++lane) out[q][v * lanes + lane] += sum[q][v][lane];
    fresh = false;
  }
}

template <class Term, class T, int kRows>
void sum_features(Index rows, const T* const* x, const T* const* g, const T* y, Index n,
                  Index panel, bool fresh, double* const* out) {
  if constexpr (kRows > 1)
    if (rows < kRows) return sum_features<Term, T, kRows - 1>(rows, x, g, y, n, panel, fresh, out);
  sum_features<Term, T, kRows>(x, g, y, n, panel, fresh, out);
}

template <class T>
class DenseTiles {
 public:
  explicit DenseTiles(int threads) : threads_(threads), packed_(threads * kPanel * Simd<T>::tile) {}

  explicit operator bool() const { return static_cast<bool>(packed_); }

  // out(b)[j] = Σ Term over the features. Values up to the end of the last tile are undefined. Only
  // Projection uses g(b).
  template <class Term, class Queries, class Factors, class Out>
  void sum(Index queries, Index references, Index features, const Queries& x, const Factors& g,
           const Rows& y, const Out& out) {
    const Index tiles = divide_up(references, Simd<T>::tile);
    const Index parts = parts_of(tiles, threads_, divide_up(queries, kTileQueries));
    const Index part = round_up(divide_up(queries, parts), kTileQueries);
    const Index panel = dense_part(features), packed_panels = kPanel / panel * panel;
    parallel(tiles * parts, threads_, [&](Index task, int thread) {
      const Index first = task % parts * part, last = smaller(first + part, queries);
      const Index j = task / parts * Simd<T>::tile;
      T* packed = packed_.at(thread * kPanel * Simd<T>::tile);
      for (Index k = 0; k < features; k += packed_panels) {
        const Index n = smaller(packed_panels, features - k);
        pack(y, j, smaller(Simd<T>::tile, references - j), k, n, packed);
        for (Index b = first; b < last; b += kTileQueries)
          add_rows<Term>(b, smaller(kTileQueries, last - b), last, j, k, n, panel, packed, x, g,
                         out);
      }
    });
  }

  // packed[feature][reference], zero where there is no reference.
  static void pack(const Rows& y, Index j, Index filled, Index k, Index n, T* packed) {
    constexpr Index tile = Simd<T>::tile, lanes = Simd<T>::lanes;
    if (filled < tile) std::memset(packed, 0, n * tile * sizeof(T));
    const Index whole = filled / lanes * lanes, n_whole = n / lanes * lanes;
    with_values(y(j) + k, [&](const auto* values) {
      for (Index r = 0; r < whole; r += lanes)
        for (Index i = 0; i < n_whole; i += lanes) {
          typename Simd<T>::Vector square[lanes];
          for (Index lane = 0; lane < lanes; ++lane) {
            const auto* from = values + (r + lane) * y.stride + i;
            if (i + kPrefetchFeatures < n) prefetch(from + kPrefetchFeatures, lanes);
            square[lane] = load_vector<T>(from);
          }
          transpose<T>(square);
          for (Index lane = 0; lane < lanes; ++lane)
            vector_at(packed + (i + lane) * tile + r) = square[lane];
        }
      for (Index r = 0; r < filled; ++r)
        for (Index i = r < whole ? n_whole : 0; i < n; ++i)
          packed[i * tile + r] = load<T>(values[r * y.stride + i]);
    });
  }

 private:
  template <class Term, class Queries, class Factors, class Out>
  static void add_rows(Index b, Index rows, Index last, Index j, Index k, Index n, Index panel,
                       const T* packed, const Queries& x, const Factors& g, const Out& out) {
    const T *from[kTileQueries], *factor[kTileQueries];
    double* to[kTileQueries];
    for (Index q = 0; q < rows; ++q) {
      from[q] = x(b + q) + k;
      factor[q] = g(b + q) + k;
      to[q] = out(b + q) + j;
    }
    for (Index next = b + rows; next < smaller(b + 2 * kTileQueries, last); ++next) {
      prefetch(x(next) + k, n);
      prefetch(out(next) + j, Simd<T>::tile);
    }
    sum_features<Term, T, kTileQueries>(rows, from, factor, packed, n, panel, k == 0, to);
  }

  const int threads_;
  Buffer<T> packed_;
};

// ---- listed pairs: features contiguous, a lane sums each `lanes`-th of them -------------------

constexpr Index kPairReferences = 64;  // references packed at a time, those of a word of Groups
// Most features packed at a time: the rows of a register tile fit L1.
template <class T> constexpr Index kPairPanel = 3136 / sizeof(T);
// Features packed at a time: panels of equal width, in whole cache lines, of which a lane adds at
// most kMaxAdditions.
template <class T>
Index pair_panel(Index features) {
  const Index most = smaller(kPairPanel<T>, kMaxAdditions * Simd<T>::lanes);
  return round_up(divide_up(features, divide_up(features, most)),
                  64 / static_cast<Index>(sizeof(T)));
}
constexpr int kPairColumns = kVectorBytes == 64 ? 4 : 2;  // references in a register tile

// Whether distances of so many features are added in halves of a panel. With half as many additions
// a sum has less than half the error. More features have more panels, over which errors average
// out.
inline bool in_halves(Index features) { return features < 1152; }

// out[q][c] = |x_q − y_c|² over n features, all padded with zeros to whole vectors, of which `half`
// are added apart from the rest; 0 if all are added together.
template <class T>
void distance_pairs(const T* const* x, const T* const* y, Index half, Index n,
                    double (*out)[kPairColumns]) {
  using Vector = typename Simd<T>::Vector;
  typedef Vector Sums[kTileQueries][kPairColumns];
  const auto add = [&](Index begin, Index end, Sums& sum) __attribute__((always_inline)) {
    set_zero(sum);
    for (Index k = begin; k < end; k += Simd<T>::lanes) {
      Vector reference[kPairColumns];
      for (int c = 0; c < kPairColumns; ++c) reference[c] = vector_at(y[c] + k);
      for (int q = 0; q < kTileQueries; ++q) {
        const Vector query = vector_at(x[q] + k);
        for (int c = 0; c < kPairColumns; ++c) {
          const Vector difference = query - reference[c];
          sum[q][c] += difference * difference;
        }
      }
    }
  };
  Sums sum;
  if (half > 0) {
    Sums first;
    add(0, half, first);
    add(half, n, sum);
    for (int q = 0; q < kTileQueries; ++q)
      for (int c = 0; c < kPairColumns; ++c) sum[q][c] += first[q][c];
  } else {
    add(0, n, sum);
  }
  sum_all_lanes<T, kTileQueries * kPairColumns>(sum[0], out[0]);
}

template <class T, int kRows>
class PairTiles {
 public:
  explicit PairTiles(int threads)
      : threads_(threads), packed_(threads * kPairReferences * kPairPanel<T>) {}

  explicit operator bool() const { return static_cast<bool>(packed_); }

  // Adds the sum over features to out(b)[j] for the pairs of each group. kernel(rows, k, n, y,
  // sums) computes sums[kRows][kPairColumns] over features k … k + n − 1, for references y padded
  // with zeros to whole vectors.
  template <class Kernel, class Out>
  void add(const Groups<T, kRows>& groups, Index references, Index features, const Rows& y,
           const Kernel& kernel, const Out& out) {
    const Index tiles = divide_up(references, kPairReferences);
    const Index parts = parts_of(tiles, threads_, groups.count());
    parallel(tiles * parts, threads_, [&](Index task, int thread) {
      const Index begin = task / parts * kPairReferences;
      const Index end = smaller(begin + kPairReferences, references);
      T* packed = packed_.at(thread * kPairReferences * kPairPanel<T>);
      const Index width = pair_panel<T>(features);
      for (Index k = 0; k < features; k += width) {
        const Index n = smaller(width, features - k);
        const T* from[kPairReferences];
        for (Index j = begin; j < end; ++j)
          if (groups.needed(j))
            from[j - begin] = aligned(y(j) + k, n, packed + (j - begin) * kPairPanel<T>);
        for (Index g = task % parts; g < groups.count(); g += parts)
          add_group(groups[g], task / parts, k, n, from, kernel, out);
      }
    });
  }

 private:
  // The n elements as whole aligned vectors: in place if they already are, else copied to `out`.
  static const T* aligned(const Row& y, Index n, T* out) {
    const Index whole = n / Simd<T>::lanes * Simd<T>::lanes;
    return with_values(y, [&](const auto* values) -> const T* {
      if constexpr (std::is_same_v<decltype(values), const T*>)
        if (n == whole && reinterpret_cast<std::uintptr_t>(values) % kVectorBytes == 0)
          return values;
      for (Index i = 0; i < whole; i += Simd<T>::lanes)
        vector_at(out + i) = load_vector<T>(values + i);
      for (Index i = whole; i < n; ++i) out[i] = load<T>(values[i]);
      for (Index i = n; i < round_up(n, Simd<T>::lanes); ++i) out[i] = 0;
      return out;
    });
  }

  template <class Kernel, class Out>
  static void add_group(const Group<T, kRows>& group, Index tile, Index k, Index n,
                        const T* const* from, const Kernel& kernel, const Out& out) {
    Index rows[kRows];
    double* to[kRows];
    for (Index q = 0; q < kRows; ++q) {
      rows[q] = group.row[smaller(q, group.rows - 1)];
      to[q] = out(rows[q]);
    }
    const Index begin = tile * kPairReferences, last = group.start[tile + 1];
    for (Index i = group.start[tile]; i < last; i += kPairColumns) {
      const Index columns = smaller(kPairColumns, last - i);
      const T* y[kPairColumns];
      for (Index c = 0; c < kPairColumns; ++c)
        y[c] = from[group.index[i + smaller(c, columns - 1)] - begin];
      double sums[kRows][kPairColumns];
      kernel(rows, k, n, y, sums);
      for (Index q = 0; q < group.rows; ++q)
        for (Index c = 0; c < columns; ++c) to[q][group.index[i + c]] += sums[q][c];
    }
  }

  const int threads_;
  Buffer<T> packed_;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
