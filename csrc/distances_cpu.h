// Squared distances between a block of queries and a chunk of references.
//
// Exact differences, for |x|² + |y|² − 2x·y loses the digits that the exponent (N + D)/2 multiplies.
// Float32 sums are merged in float64, and those that decide the answer are computed again in it.
//
// With many features the work is done in phases. A sum of squares over some of the features is a
// lower bound of the squared distance, and the distance of any one reference is an upper bound of
// the nearest; a reference whose lower bound lies beyond the farthest distance whose weight can be
// seen from the upper bound has a weight that counts for nothing, whatever its other features.
// Where few references are left, a query leaves the tiles and they are computed one by one.
#pragma once
#include "weights_cpu.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kChunk = 2048;     // references a chunk, a multiple of every Simd::tile
constexpr Index kPanel = 256;      // features of a packed tile
constexpr Index kAdditions = 64;   // into one sum of T before it is merged in float64
constexpr Index kLine = 16;        // features that stay together when phases pick theirs
constexpr Index kPhases = 3;
constexpr Index kPhaseFeatures = 512;  // fewer features are not worth phases
constexpr Index kFew = 16;         // so many near references are worth their digits in any case
constexpr Index kManyFold = 32;    // a query leaves the tiles with 1/kManyFold of its references
// What float32 distances cannot decide is computed again in float64 (Distances::refine):
constexpr double kTiny = 1e-30;    // squared distances below this lose digits to underflow
constexpr double kNear = 20.0;     // a weight below e^-20 of the largest needs no more digits
// Bound of the relative error of a squared distance that does not underflow.
template <class T> constexpr double kRounding = sizeof(T) == sizeof(float) ? 2e-5 : 1e-13;

static_assert(kChunk % Simd<float>::tile == 0, "a chunk is whole tiles");
static_assert(kPanel % kAdditions == 0 && kPanel % kLine == 0, "a panel is whole lines");

// out[q][r] += |x_q − y_r|² over n features for a tile of references, packed feature by feature.
template <class T, int kRows>
void distance_tile(const T* const* x, const T* y, Index n, double* const* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes, tile = Simd<T>::tile;
  for (Index begin = 0; begin < n; begin += kAdditions) {
    const Index end = smaller(begin + kAdditions, n);
    Vector sum[kRows][kTileVectors] = {};
    for (Index k = begin; k < end; ++k) {
      Vector reference[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) reference[v] = vector_at(y + k * tile + v * lanes);
      for (int q = 0; q < kRows; ++q)
        for (int v = 0; v < kTileVectors; ++v) {
          const Vector difference = x[q][k] - reference[v];
          sum[q][v] += difference * difference;
        }
    }
    for (int q = 0; q < kRows; ++q)
      for (int v = 0; v < kTileVectors; ++v)
        for (Index lane = 0; lane < lanes; ++lane) out[q][v * lanes + lane] += sum[q][v][lane];
  }
}

template <class T, int kRows>
void distance_tile(Index rows, const T* const* x, const T* y, Index n, double* const* out) {
  if constexpr (kRows > 1)
    if (rows < kRows) return distance_tile<T, kRows - 1>(rows, x, y, n, out);
  distance_tile<T, kRows>(x, y, n, out);
}

// A block of queries against chunks of references: squared distances, rows kChunk apart.
template <class T, class R>
class Distances {
 public:
  Distances(const Problem& problem, const Law& law, Index max_queries)
      : problem_(problem),
        law_(law),
        lines_(problem.features / kLine),
        queries_(max_queries * problem.features),
        squared_(max_queries * kChunk),
        packed_(problem.threads * kPanel * Simd<T>::tile),
        active_(max_queries),
        left_(max_queries) {
    if (*this) plan();
  }

  explicit operator bool() const {
    return lines_ && queries_ && squared_ && packed_ && active_ && left_;
  }

  void set_queries(Index first, Index count) {
    first_query_ = first;
    queries_count_ = count;
    parallel(count, problem_.threads, [&](Index b, int) {
      for (Index k = 0; k < problem_.features; k += kLine)
        for (Index i = 0; i < smaller(kLine, problem_.features - k); ++i)
          queries_[b * problem_.features + k + i] = query(b)[feature(k) + i];
    });
  }

  // Squared distances of the chunk; infinite for references that count for nothing. rows[b].nearest
  // bounds that of query b, from other chunks or passes.
  void set_chunk(Index first, Index count, const Row* rows) {
    first_reference_ = first;
    count_ = count;
    Index active = queries_count_;
    for (Index b = 0; b < active; ++b) {
      active_[b] = b;
      left_[b] = 0;
    }
    for (Index phase = 0; phase < phases_ && active > 0; ++phase) {
      add_features(phase, active);
      if (phase + 1 == phases_) break;
      parallel(active, problem_.threads, [&](Index i, int) { decide(active_[i], rows); });
      Index kept = 0;
      for (Index i = 0; i < active; ++i)
        if (!left_[active_[i]]) active_[kept++] = active_[i];
      active = kept;
    }
  }

  // Makes the chunk's distances of query b as exact as the answer needs, and returns the nearest;
  // NaN if a distance is not finite. Float32 distances are computed again in float64 where one
  // overflowed, and for references near the minimum where few compete or their error would show: a
  // point drawn from the references has a sensitivity of features/2, and the error of many averages
  // out.
  double refine(Index b, const Row& row) {
    double* squared = this->row(b);
    pad(squared);
    const double found = nearest(squared);
    if (left_[b]) return found;
    const bool finite = all_finite(squared);
    if (sizeof(T) != sizeof(float)) return finite ? found : kNaN;
    const double base = found < row.nearest ? found : row.nearest;
    double limit = kInfinity;
    if (finite) {
      const double near = base * (1 + 2 * kRounding<T>) + law_.excess(kNear, base, radius(b)) + kTiny;
      if (found > near) return found;
      Index candidates = 0;
      for (Index j = 0; j < count_; ++j) candidates += squared[j] <= near;
      const double tolerated = larger(problem_.features * 3 / 4, 256);
      const bool decisive = candidates <= kFew || law_.sensitivity(base, radius(b)) > tolerated;
      limit = decisive ? near : kTiny;
      if (found > limit) return found;
    }
    for (Index j = 0; j < count_; ++j)
      if (!finite || squared[j] <= limit) squared[j] = exact(query(b), reference(j));
    return all_finite(squared) ? nearest(squared) : kNaN;
  }

  double* row(Index b) const { return squared_.at(b * kChunk); }
  const R* reference(Index j) const {
    return static_cast<const R*>(problem_.y) + (first_reference_ + j) * problem_.y_stride;
  }
  const T* query(Index b) const {
    return static_cast<const T*>(problem_.x) + (first_query_ + b) * problem_.x_stride;
  }
  double radius(Index b) const { return problem_.radius[first_query_ + b]; }
  Index count() const { return count_; }

 private:
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  // Phases take features in this order: a sixteenth of the lines, evenly spread, then another three
  // sixteenths, then the rest.
  void plan() {
    const Index lines = problem_.features / kLine;
    Index at = 0;
    if (problem_.features < kPhaseFeatures) {
      phases_ = 1;
      for (; at < lines; ++at) lines_[at] = at;
    } else {
      for (Index phase = 0; phase < kPhases; ++phase) {
        for (Index line = 0; line < lines; ++line)
          if (phase_of(line) == phase) lines_[at++] = line;
        phase_end_[phase] = at * kLine;
      }
    }
    phase_end_[phases_ - 1] = problem_.features;
  }

  static Index phase_of(Index line) { return line % 4 != 0 ? 2 : line % 16 != 8 ? 1 : 0; }

  // Where the line of features that comes at position k (a multiple of kLine) lies in memory.
  Index feature(Index k) const {
    return k / kLine < problem_.features / kLine ? lines_[k / kLine] * kLine : k;
  }

  void add_features(Index phase, Index active) {
    const Index begin = phase == 0 ? 0 : phase_end_[phase - 1], end = phase_end_[phase];
    const Index tiles = divide_up(count_, Simd<T>::tile);
    const Index parts = parts_of(tiles, problem_.threads, divide_up(active, kTileQueries));
    const Index part_rows = round_up(divide_up(active, parts), kTileQueries);
    parallel(tiles * parts, problem_.threads, [&](Index task, int thread) {
      const Index first = task % parts * part_rows, last = smaller(first + part_rows, active);
      T* packed = packed_.at(thread * kPanel * Simd<T>::tile);
      const Index j = task / parts * Simd<T>::tile;
      if (phase == 0)
        for (Index i = first; i < last; ++i)
          std::memset(row(active_[i]) + j, 0, Simd<T>::tile * sizeof(double));
      for (Index k = begin; k < end; k += kPanel) {
        const Index n = smaller(kPanel, end - k);
        pack(j, k, n, packed);
        add_tile(first, last, j, k, n, packed);
      }
    });
  }

  void add_tile(Index first, Index last, Index j, Index k, Index n, const T* packed) {
    for (Index i = first; i < last; i += kTileQueries) {
      const Index rows = smaller(kTileQueries, last - i);
      const T* x[kTileQueries];
      double* out[kTileQueries];
      for (Index q = 0; q < rows; ++q) {
        x[q] = queries_.at(active_[i + q] * problem_.features + k);
        out[q] = row(active_[i + q]) + j;
      }
      distance_tile<T, kTileQueries>(rows, x, packed, n, out);
    }
  }

  // A tile of references from the j-th, n features from position k: packed[feature][reference],
  // zero where there is no reference.
  void pack(Index j, Index k, Index n, T* packed) const {
    constexpr Index tile = Simd<T>::tile;
    const Index filled = smaller(tile, count_ - j);
    if (filled < tile) std::memset(packed, 0, n * tile * sizeof(T));
    for (Index line = 0; line < n; line += kLine) {
      const Index from = feature(k + line), features = smaller(kLine, n - line);
      T* out = packed + line * tile;
      for (Index r = 0; r < filled; ++r) {
        const R* y = reference(j + r) + from;
        T values[kLine];
        if (features == kLine)
          for (Index i = 0; i < kLine; ++i) values[i] = load<T>(y[i]);
        else
          for (Index i = 0; i < features; ++i) values[i] = load<T>(y[i]);
        for (Index i = 0; i < features; ++i) out[i * tile + r] = values[i];
      }
    }
  }

  // Whether query b can leave the tiles; then the distances of the references that are left become
  // exact and the others infinite.
  void decide(Index b, const Row* rows) {
    double* partial = row(b);
    pad(partial);
    const double limit = farthest(b, rows[b]) / (1 - kRounding<T>);
    Index survivors = 0;
    for (Index j = 0; j < count_; ++j) survivors += !(partial[j] > limit);
    if (survivors * kManyFold > count_) return;
    for (Index j = 0; j < count_; ++j)
      partial[j] = partial[j] > limit ? kInfinity : exact(query(b), reference(j));
    left_[b] = 1;
  }

  // The squared distance beyond which no reference counts. `unseen` is relative to the sum of all
  // weights, which is at least that of the nearest and at least what earlier chunks made it.
  double farthest(Index b, const Row& row) const {
    const double* partial = this->row(b);
    const Index candidate = index_of_least(partial);
    double upper = row.nearest, far = kInfinity;
    if (row.total > 0) {
      const double before = row.total > 1 ? row.total : 1;
      far = upper + law_.excess(law_.unseen - std::log(before), upper, radius(b));
    }
    if (partial[candidate] < upper) {
      upper = exact(query(b), reference(candidate));
      const double other = upper + law_.excess(law_.unseen, upper, radius(b));
      far = other > far ? far : other;
    }
    return far;
  }

  Index index_of_least(const double* squared) const {
    const double least = nearest(squared);
    for (Index j = 0; j < count_; ++j)
      if (squared[j] == least) return j;
    return 0;
  }

  void pad(double* squared) const {
    for (Index j = count_; j < padded_count(count_); ++j) squared[j] = kInfinity;
  }

  double nearest(const double* squared) const {
    Doubles least = Doubles{} + kInfinity;
    Longs nan = {};
    for (Index j = 0; j < padded_count(count_); j += kDoubles) {
      const Doubles s = vector_at(squared + j);
      nan |= s != s;
      least = s < least ? s : least;
    }
    double result = kInfinity;
    for (Index lane = 0; lane < kDoubles; ++lane) {
      if (nan[lane]) return kNaN;
      result = least[lane] < result ? least[lane] : result;
    }
    return result;
  }

  bool all_finite(const double* squared) const {
    Index finite = 0;
    for (Index j = 0; j < count_; ++j)
      finite += squared[j] <= std::numeric_limits<double>::max();
    return finite == count_;
  }

  double exact(const T* x, const R* y) const {
    constexpr Index lanes = 4 * kDoubles;
    double sum[lanes] = {};
    Index k = 0;
    for (; k + lanes <= problem_.features; k += lanes)
      for (Index lane = 0; lane < lanes; ++lane) {
        const double difference = static_cast<double>(x[k + lane]) - load<double>(y[k + lane]);
        sum[lane] += difference * difference;
      }
    for (; k < problem_.features; ++k) {
      const double difference = static_cast<double>(x[k]) - load<double>(y[k]);
      sum[0] += difference * difference;
    }
    double total = 0;
    for (Index lane = 0; lane < lanes; ++lane) total += sum[lane];
    return total;
  }

  const Problem& problem_;
  const Law law_;
  Buffer<Index> lines_;
  Index phases_ = kPhases, phase_end_[kPhases] = {};
  Buffer<T> queries_;  // features in the order of the phases
  Buffer<double> squared_;
  Buffer<T> packed_;
  Buffer<Index> active_;
  Buffer<std::uint8_t> left_;
  Index first_query_ = 0, queries_count_ = 0, first_reference_ = 0, count_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
