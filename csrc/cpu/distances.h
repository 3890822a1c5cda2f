// Squared distances between a block of queries and a chunk of references, on the CPU.
//
// Distances are sums of exact differences: |x|² + |y|² − 2x·y would lose digits, and the exponent
// (N + D)/2 multiplies that error. Float32 sums are merged in float64. Distances that decide the
// result are recomputed in float64.
//
// With many features, lower bounds come first (cpu/byte_screen.h and cpu/line_screen.h). The
// distance of any one reference is an upper bound of the smallest distance. It gives the largest
// distance at which a weight still counts. A reference whose lower bound is larger is skipped.
#pragma once
#include "cpu/byte_screen.h"
#include "cpu/kept_distances.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kListedFeatures = 512;  // with fewer features all pairs are computed
// Bytes of references in a chunk: the chunk stays in cache for all passes.
constexpr Index kMaxChunkBytes = 16 << 20;
// Up to this many references near the nearest always have their distances recomputed.
constexpr Index kFewCandidates = 16;
// With more, samples of these sizes tell whether rounding errors average out, the smallest first.
constexpr Index kSamples[] = {8, 16, 64}, kMostSamples = 64;
// Stands for a distance that is not needed.
constexpr double kSkipped = std::numeric_limits<double>::max();
// When float32 distances do not suffice (Distances::refine):
constexpr double kFloatUnderflow = 1e-30;  // squared distances below this lose digits to underflow
// Distances below this fraction of |x| suffer from the rounding of y.
constexpr double kCloseFraction = 0.1;
// A query is close if its squared distance from the nearest reference is below this fraction of
// |x|².
constexpr double kCloseSquare = 0.25;
constexpr double kNear = 20.0;  // a weight below e^-20 of the largest needs no more digits
// Tolerated error of a score (root mean square, and twice the mean): at least kScoreError, and this
// times √N, with sums in halves and without. It lies above the rounding of N distinct terms, or too
// many rows of real images would be computed again.
constexpr double kScoreError = 1e-5, kHalvesScoreError = 7e-7, kAverageScoreError = 1.2e-6;
// That of points drawn from up to 64 features, about features/2, and half as much again.
constexpr double kUsualSensitivity = 48;

constexpr Index kChunkUnit = kBatch / 8;  // whole words of Groups, and tiles of the screen
static_assert(kChunkUnit % kByteTile == 0, "a chunk begins with a tile of the screen");

inline Index chunk_size(const Problem& problem) {
  const Index fitting = kMaxChunkBytes / (problem.features * bytes_of(problem.reference_type));
  return smaller(kChunk, larger(kChunkUnit, round_up(fitting, kChunkUnit)));
}

template <class T>
double squared_norm(const T* x, Index features) {
  double sum = 0;
  for (Index k = 0; k < features; ++k) sum += static_cast<double>(x[k]) * x[k];
  return sum;
}

// Whether a query is close to its nearest reference, beside its own size.
template <class T>
bool is_close(const T* x, Index features, double nearest) {
  return nearest < kCloseSquare * squared_norm(x, features);
}

// The positions of `count` values up to `most` among the first `total`, which must hold at least so
// many. They are tried in a fixed order that spreads over blocks and periods of the data. Queries
// mostly share their samples, whose features then stay in cache.
template <class V>
void sample(const V* values, V most, Index total, Index count, Index* sampled) {
  Index size = 64;
  while (size < total) size *= 2;
  const Index step = static_cast<Index>(0.618 * static_cast<double>(size)) | 1;  // golden ratio
  for (Index at = 0, i = 0; i < count; at = (at + step) & (size - 1))
    if (at < total && values[at] <= most) sampled[i++] = at;
}

// The position of the first of the values that is `value`.
template <class V>
Index find(const V* values, V value) {
  constexpr Index block = 64;
  for (Index begin = 0;; begin += block) {
    Index equal = 0;
    for (Index j = begin; j < begin + block; ++j) equal += values[j] == value;
    for (Index j = begin; equal > 0; ++j)
      if (values[j] == value) return j;
  }
}

// How exact the distances of one query must be. `base` is the smallest of them.
template <class T>
class NeededDigits {
 public:
  NeededDigits(const Problem& problem, const WeightLaw& law, const T* x, double base, double radius)
      : law_(law),
        x_(x),
        features_(problem.features),
        norm_(holds_exactly<T>(problem) ? 0 : std::sqrt(squared_norm(x, features_))),
        base_(base),
        radius_(radius),
        tolerated_(larger(features_ * 3 / 4, 256)) {}

  // The largest squared distance at which a score may be within `fall` of the best. It grows with
  // the nearest distance, which the rounding of y may have made much smaller than it is.
  double farthest(double fall) const {
    const double base = widened(base_ * (2 * kSumError<T> + 1) + kFloatUnderflow);
    return widened(base + law_.excess_at(fall, base, radius_));
  }

  // Whether errors of T would change the weights even if they average out. The sensitivity of a
  // point drawn from the references is about features/2. Half as much again is tolerated, and
  // always 256.
  bool insufficient() const {
    return law_.sensitivity(base_, radius_) > tolerated_ ||
           base_ < kCloseFraction * norm_ * kCloseFraction * norm_;
  }

  // Whether the errors of `candidates` of `total` distances, those up to `near`, average out. Where
  // the terms of a sum repeat, or one is much larger than the others, all errors have one sign
  // instead. The exact errors of a sample and of the nearest tell. squared_of(j) is the distance of
  // reference(j) with all its digits. One panel alone, added in halves, has small errors whatever
  // the terms: if the score does not multiply them by more than usual, none is looked at.
  template <class V, class Squared, class Reference>
  bool average_out(const V* squared, Index total, V near, V nearest, Index candidates,
                   const Squared& squared_of, const Reference& reference) const {
    if (features_ <= kMaxAdditions && law_.sensitivity(base_, radius_) <= kUsualSensitivity)
      return true;
    const double average = in_halves(features_) ? kHalvesScoreError : kAverageScoreError;
    const double tolerated =
        std::fmax(kScoreError, average * std::sqrt(static_cast<double>(features_)));
    for (const Index samples : kSamples) {
      Index sampled[kMostSamples + 1], count = smaller(samples, candidates);
      sample(squared, near, total, count, sampled);
      sampled[count++] = find(squared, nearest);
      double sum = 0, squares = 0;
      for (Index i = 0; i < count; ++i) {
        if (i + 1 < count) prefetch(reference(sampled[i + 1]), features_);
        const double exact = exact_distance(x_, reference(sampled[i]), features_);
        if (exact == 0) continue;
        const double error =
            law_.sensitivity(exact, radius_) * (squared_of(sampled[i]) / exact - 1);
        sum += error;
        squares += error * error;
      }
      const double most = static_cast<double>(count) * tolerated;
      if (squares <= most * tolerated && std::fabs(sum) <= most / 2) return true;
    }
    return false;
  }

 private:
  // The squared distance plus the largest error from the rounding of y.
  double widened(double squared) const {
    if (norm_ == 0) return squared;
    const double distance = std::sqrt(squared) + 2 * std::numeric_limits<T>::epsilon() * norm_;
    return distance * distance;
  }

  const WeightLaw& law_;
  const T* x_;
  const Index features_;
  const double norm_, base_, radius_, tolerated_;
};

// Squared distances of one query are a row; rows are kStride apart.
template <class T>
class Distances {
 public:
  // The pairs to compute.
  using Lists = Groups<T, kTileQueries>;

  Distances(const Problem& problem, const WeightLaw& law, Index max_queries)
      : problem_(problem),
        law_(law),
        listed_(problem.features >= kListedFeatures),
        screened_(listed_ && (max_queries >= kScreenedQueries || problem.sketch)),
        // Consecutive rows start one vector apart in the cache sets. Otherwise the rows of 2^n
        // features would compete for the same sets.
        padded_(round_up(problem.features, 64) + 16),
        queries_(max_queries * padded_),
        squared_(max_queries * kStride),
        needed_(max_queries),
        dense_(problem.threads),
        pairs_(problem.threads),
        screen_(problem, screened_ ? max_queries : 0, screened_ ? chunk_size(problem) : 0) {}

  explicit operator bool() const {
    return queries_ && squared_ && needed_ && dense_ && pairs_ && screen_;
  }

  void set_queries(Index first, Index count) {
    first_query_ = first;
    queries_count_ = count;
    parallel(count, problem_.threads, [&](Index b, int) {
      T* out = queries_.at(b * padded_);
      std::memcpy(out, query(b), problem_.features * sizeof(T));
      std::memset(out + problem_.features, 0, (padded_ - problem_.features) * sizeof(T));
    });
    screening_ = screened_;
    if (screened_) screen_.set_queries(count, [&](Index b) { return query(b); });
  }

  // Computes the squared distances of a chunk, kSkipped where a reference does not count.
  // earlier[b].nearest is an upper bound from other chunks or passes. `lists` is overwritten.
  void set_chunk(Index first, Index count, const QueryState* earlier, Lists& lists) {
    first_reference_ = first;
    count_ = count;
    const Rows y = references();
    const auto out = [&](Index b) { return row(b); };
    if (!listed_) {
      const auto x = [&](Index b) { return queries_.at(b * padded_); };
      dense_.template sum<Distance>(queries_count_, count, problem_.features, x, x, y, out);
      return;
    }
    if (screening_) screen_.bound(first, count, y, out);
    parallel(queries_count_, problem_.threads, [&](Index b, int) {
      choose(b, earlier[b]);
      lists.note(b, row(b), count, [](double squared) { return squared == 0; });
    });
    screening_ = screening_ && pays(count);
    lists.arrange(queries_count_, count, problem_.threads);
    pairs_.add(
        lists, count, problem_.features, y,
        [&](const Index* b, Index k, Index n, const T* const* y, double (*sums)[kPairColumns]) {
          const T* x[kTileQueries];
          for (int q = 0; q < kTileQueries; ++q) x[q] = queries_.at(b[q] * padded_ + k);
          const Index half = in_halves(problem_.features) ? round_up(n / 2, Simd<T>::lanes) : 0;
          distance_pairs<T>(x, y, half, n, sums);
        },
        out);
  }

  // The same, from the distances that a forward pass kept. They need no refinement.
  void read_chunk(Index first, Index count, const KeptDistances& kept) {
    first_reference_ = first;
    count_ = count;
    parallel(queries_count_, problem_.threads, [&](Index b, int) {
      needed_[b] = kept.read(first_query_ + b, first, kSkipped, row(b), count);
    });
  }

  // Makes the chunk's distances of query b as exact as the result needs. Returns the smallest; NaN
  // if a distance is not finite, kUnderflowed if the result depends on distances that underflow.
  //
  // If a float32 distance overflowed, all are recomputed in float64. Distances near the smallest
  // are recomputed if they are few, or if their errors would change the weights.
  double refine(Index b, const QueryState& earlier) {
    double* squared = this->row(b);
    if (listed_ && needed_[b] == 0) return kSkipped;
    pad(squared);
    const Least smallest = least(squared);
    if (sizeof(T) != sizeof(float)) return smallest.finite ? told_apart(b, smallest.value) : kNaN;
    double limit = kInfinity;
    if (smallest.finite) {
      const double base = smallest.value < earlier.nearest ? smallest.value : earlier.nearest;
      const NeededDigits<T> needed(problem_, law_, query(b), base, radius(b));
      const double near = needed.farthest(kNear);
      if (smallest.value > near) return smallest.value;
      Index candidates = 0;
      for (Index j = 0; j < count_; ++j) candidates += squared[j] <= near;
      const bool decisive =
          candidates <= kFewCandidates || needed.insufficient() ||
          !needed.average_out(
              squared, count_, near, smallest.value, candidates,
              [&](Index j) { return squared[j]; }, [&](Index j) { return reference(j); });
      limit = decisive ? near : kFloatUnderflow;
      if (smallest.value > limit) return smallest.value;
    }
    Index last = -1;
    const auto recompute_last = [&] {
      if (last >= 0) squared[last] = exact_distance(query(b), reference(last), problem_.features);
    };
    for (Index j = 0; j < count_; ++j) {
      if (smallest.finite && !(squared[j] <= limit)) continue;
      prefetch(reference(j), problem_.features);
      recompute_last();
      last = j;
    }
    recompute_last();
    const Least refined = least(squared);
    return refined.finite ? told_apart(b, refined.value) : kNaN;
  }

  double* row(Index b) const { return squared_.at(b * kStride); }
  Row reference(Index j) const { return references_of(problem_)(first_reference_ + j); }
  Rows references() const { return references_of(problem_).from(first_reference_); }
  const T* query(Index b) const {
    return static_cast<const T*>(problem_.x) + (first_query_ + b) * problem_.x_stride;
  }
  // Whether all pairs are computed, without lists.
  bool takes_all_pairs() const { return !listed_; }
  double radius(Index b) const { return problem_.radius[first_query_ + b]; }
  Index count() const { return count_; }

 private:
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  // The smallest distance of a row, after separate() where it is needed.
  double told_apart(Index b, double nearest) {
    if (may_underflow<T>(problem_)) {
      const double least = least_square(problem_.features), r = radius(b);
      if (nearest < least && r * r < least)
        return separate(
            query(b), [&](Index j) { return reference(j); }, problem_.features, r, row(b), count_);
    }
    return nearest;
  }

  // Whether screening the next chunk is likely to pay, judged by this one. Many queries share the
  // cost of a screen.
  bool pays(Index count) const {
    if (queries_count_ >= kScreenedQueries) return true;
    Index pairs = 0;
    for (Index b = 0; b < queries_count_; ++b) pairs += needed_[b];
    return 2 * pairs < queries_count_ * count;
  }

  // Replaces bounds by 0 where the distance is needed and by kSkipped elsewhere.
  void choose(Index b, const QueryState& earlier) {
    double* squared = row(b);
    needed_[b] = count_;
    if (!screening_) {
      std::memset(squared, 0, count_ * sizeof(double));
      return;
    }
    pad(squared);
    Index candidate = -1;
    const double far = farthest(b, earlier, &candidate);
    needed_[b] = screen_.choose(b, far, kSkipped, squared, count_);
    // The candidate's distance is computed whatever its bound is, so that each query has one.
    if (candidate < 0 || squared[candidate] == 0) return;
    squared[candidate] = 0;
    ++needed_[b];
  }

  // The squared distance beyond which no reference counts. The cutoff is relative to the sum of all
  // weights, which is at least the weight of the nearest and at least the sum over earlier chunks.
  // If references of the chunk may be nearer than all before, `likeliest` becomes the one with the
  // lowest bound.
  double farthest(Index b, const QueryState& earlier, Index* likeliest) const {
    const double* bounds = row(b);
    const double lowest = least(bounds).value;
    double far = kInfinity;
    if (earlier.total > 0) {
      const double before = earlier.total > 1 ? earlier.total : 1;
      far = earlier.nearest +
            law_.excess_at(law_.cutoff - std::log(before), earlier.nearest, radius(b));
    }
    if (!(lowest < earlier.nearest && lowest < kSkipped)) return far;  // padding has kSkipped
    Index candidate = 0;
    while (bounds[candidate] != lowest) ++candidate;
    *likeliest = candidate;
    double upper = exact_distance(query(b), reference(candidate), problem_.features);
    // The candidate itself and what separate() must see stay within the bound.
    if (may_underflow<T>(problem_) && upper < least_square(problem_.features))
      upper = least_square(problem_.features);
    const double other = upper + law_.excess_at(law_.cutoff, upper, radius(b));
    return other > far ? far : other;
  }

  void pad(double* squared) const {
    for (Index j = count_; j < padded_count(count_); ++j) squared[j] = kSkipped;
  }

  struct Least {
    double value;  // NaN if any value is NaN
    bool finite;   // whether all values are finite
  };

  Least least(const double* squared) const {
    Doubles low = Doubles{} + kInfinity;
    Longs not_finite = {}, nan = {};
    for (Index j = 0; j < padded_count(count_); j += kDoubles) {
      const Doubles s = vector_at(squared + j);
      nan |= s != s;
      not_finite |= ~(s <= kSkipped);
      low = s < low ? s : low;
    }
    Least result = {kInfinity, true};
    for (Index lane = 0; lane < kDoubles; ++lane) {
      if (nan[lane]) return {kNaN, false};
      if (not_finite[lane]) result.finite = false;
      if (low[lane] < result.value) result.value = low[lane];
    }
    return result;
  }

  const Problem& problem_;
  const WeightLaw law_;
  const bool listed_, screened_;
  bool screening_ = false;  // whether the next chunk is screened
  const Index padded_;
  Buffer<T> queries_;  // rows of padded_ features, with zeros at the end
  Buffer<double> squared_;
  Buffer<Index> needed_;
  DenseTiles<T> dense_;
  PairTiles<T, kTileQueries> pairs_;
  Screen<T> screen_;
  Index first_query_ = 0, queries_count_ = 0, first_reference_ = 0, count_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
