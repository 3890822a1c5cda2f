// From squared distances to weights.
#pragma once
#include "cpu/weight_law.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kChunk = 2048;  // most references in a chunk; a multiple of every Simd::tile
// Distance between rows of a chunk, in doubles. With a power of two all rows would compete for a
// few cache sets.
constexpr Index kStride = kChunk + 64;
static_assert(kChunk % Simd<float>::tile == 0, "a chunk is whole tiles");

constexpr double kSmallestDouble = std::numeric_limits<double>::min();

// The largest allowed radius. With a larger one, places that hold no reference, at the squared
// distance kSkipped, would get a weight that counts. With more dimensions weights fall faster. The
// same limits as in pfgm/common/values.py.
inline double largest_radius(double dimensions) {
  return std::fmin(1e150, 1e130 * std::sqrt(std::fmax(1, dimensions)));
}

inline Status check_radius(const Problem& problem) {
  const double most = largest_radius(problem.dimensions);
  for (Index b = 0; b < problem.queries; ++b)
    if (!(problem.radius[b] >= 0 && problem.radius[b] <= most)) return {Failure::radius, b};
  return {};
}

// Where d² + r² is at least this, what underflow takes from the squares of the features is below
// the rounding of their sum.
inline double least_square(Index features) {
  return static_cast<double>(features) * kSmallestDouble / std::numeric_limits<double>::epsilon();
}

// Stands for the nearest distance where the result depends on squared distances that underflow.
constexpr double kUnderflowed = -1;

inline bool is_distance(double nearest) { return nearest >= 0; }

// The failure that a sentinel in `nearest` stands for.
inline Failure failure_of(double nearest) {
  return nearest == kUnderflowed ? Failure::underflow : Failure::value;
}

// Tells references at a query from others whose squared distance underflows. At r = 0 the others
// get at least kSmallestDouble, and check_result() fails if no reference is at the query. At any
// other r that is too small for them the result is kUnderflowed; else the smallest squared
// distance. reference(j) is the reference of squared[j].
template <class T, class Reference>
double separate(const T* x, const Reference& reference, Index features, double radius,
                double* squared, Index count) {
  const double least = least_square(features);
  double nearest = kInfinity;
  for (Index j = 0; j < count; ++j) {
    if (squared[j] < least && !coincide(x, reference(j), features)) {
      if (radius > 0) return kUnderflowed;
      squared[j] = squared[j] > kSmallestDouble ? squared[j] : kSmallestDouble;
    }
    nearest = squared[j] < nearest ? squared[j] : nearest;
  }
  return nearest;
}

// The merge state of one query. Everything is relative to the nearest reference so far.
struct QueryState {
  double nearest = kInfinity, total = 0;
  double scale = 1;   // factor for the sums over earlier chunks
  Index nonzero = 0;  // weights of this chunk that count
};

// The state that earlier calls or the forward pass ended with.
template <class Results>
QueryState state_of(const Results& results, Index query) {
  QueryState state;
  state.nearest = results.nearest[query];
  state.total = results.total[query];
  return state;
}

// Number of doubles in a row of weights or squared distances: whole pairs of vectors, the last
// padded.
inline Index padded_count(Index count) { return round_up(count, 2 * kDoubles); }

inline double sum_of(Doubles v) {
  double total = 0;
  for (Index lane = 0; lane < kDoubles; ++lane) total += v[lane];
  return total;
}

// weights[j] = weight of squared[j] relative to that of nearest, 0 if below e^-fall. Returns the
// sum. Both may be the same array, and both are padded, with distances that do not count.
inline double weigh(const WeightLaw& law, double nearest, double radius, double fall,
                    const double* squared, double* weights, Index count) {
  const double visible = law.excess_at(fall, nearest, radius);
  Doubles total = {};
  for (Index j = 0; j < padded_count(count); j += kDoubles) {
    // Rounding may make the nearest a little nearer than in the forward pass.
    const Doubles difference = vector_at(squared + j) - nearest;
    const Doubles excess = difference > 0.0 ? difference : Doubles{};
    const Longs seen = excess <= visible;
    std::int64_t any = 0;
    for (Index lane = 0; lane < kDoubles; ++lane) any |= seen[lane];
    Doubles weight = {};
    if (any) weight = seen ? exponential(law.relative_score(excess, nearest, radius)) : Doubles{};
    vector_at(weights + j) = weight;
    total += weight;
  }
  return sum_of(total);
}

// Two vectors of doubles as one of floats, and back.
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2), may_alias));
inline Floats narrowed(const Doubles (&wide)[2]) {
  Floats narrow;
  for (int half = 0; half < 2; ++half) {
    const HalfFloats part = __builtin_convertvector(wide[half], HalfFloats);
    std::memcpy(reinterpret_cast<char*>(&narrow) + half * sizeof part, &part, sizeof part);
  }
  return narrow;
}
inline void widen(const Floats& narrow, Doubles (&wide)[2]) {
  for (int half = 0; half < 2; ++half) {
    HalfFloats part;
    std::memcpy(&part, reinterpret_cast<const char*>(&narrow) + half * sizeof part, sizeof part);
    wide[half] = __builtin_convertvector(part, Doubles);
  }
}

// As weigh(), in float32: sums in T = float need no more digits. The excess is formed in float64,
// because it is a small difference. Its ratio u to the scale s is rounded to 6e-8.
inline double weigh_in_float(const WeightLaw& law, double nearest, double radius, double fall,
                             const double* squared, double* weights, Index count) {
  const double visible = law.excess_at(fall, nearest, radius);
  const double inverse = law.per_scale(1.0, nearest, radius);
  // If the ratios do not fit float32, all is computed in float64.
  if (!(inverse > 1e-300 && inverse < 1e300 && visible * inverse < 1e30 && law.exponent < 1e30))
    return weigh(law, nearest, radius, fall, squared, weights, count);
  Doubles total[2] = {};
  law.with_weight([&](const auto& weight_of) {
    for (Index j = 0; j < padded_count(count); j += 2 * kDoubles) {
      Doubles ratio[2];
      Longs seen[2];
      for (int half = 0; half < 2; ++half) {
        const Doubles difference = vector_at(squared + j + half * kDoubles) - nearest;
        const Doubles excess = difference > 0.0 ? difference : Doubles{};
        seen[half] = excess <= visible;
        ratio[half] = seen[half] ? excess * inverse : Doubles{};
      }
      const Longs either = seen[0] | seen[1];
      std::int64_t any = 0;
      for (Index lane = 0; lane < kDoubles; ++lane) any |= either[lane];
      Doubles weight[2] = {};
      if (any) {
        widen(weight_of(narrowed(ratio)), weight);
        for (int half = 0; half < 2; ++half) weight[half] = seen[half] ? weight[half] : Doubles{};
      }
      for (int half = 0; half < 2; ++half) {
        vector_at(weights + j + half * kDoubles) = weight[half];
        total[half] += weight[half];
      }
    }
  });
  return sum_of(total[0] + total[1]);
}

// Weights with the digits that sums in T need.
template <class T>
double weigh_for(const WeightLaw& law, double nearest, double radius, double fall,
                 const double* squared, double* weights, Index count) {
  if constexpr (sizeof(T) == sizeof(float))
    return weigh_in_float(law, nearest, radius, fall, squared, weights, count);
  else
    return weigh(law, nearest, radius, fall, squared, weights, count);
}

// Sets weights below `least` to zero. Counts the others in `nonzero` and returns their sum.
inline double keep_visible(double* weights, Index count, double least, Index* nonzero) {
  Doubles total = {};
  Longs number = {};
  for (Index j = 0; j < padded_count(count); j += kDoubles) {
    const Doubles w = vector_at(weights + j);
    const Longs seen = w >= least;
    const Doubles kept = seen ? w : Doubles{};
    vector_at(weights + j) = kept;
    total += kept;
    number -= seen;
  }
  *nonzero = 0;
  for (Index lane = 0; lane < kDoubles; ++lane) *nonzero += number[lane];
  return sum_of(total);
}

// Makes the state relative to the nearest reference of a chunk, if that one is nearer.
inline void rebase(const WeightLaw& law, QueryState& state, double radius, double chunk_nearest) {
  state.scale = 1;
  state.nonzero = 0;
  if (!(chunk_nearest < state.nearest)) return;
  const double excess = state.nearest - chunk_nearest;
  state.scale = state.total == 0 ? 0 : std::exp(law.relative_score(excess, chunk_nearest, radius));
  state.total *= state.scale;
  state.nearest = chunk_nearest;
}

// By how much a score may be lower than that of the nearest reference and still count.
inline double visible_fall(const WeightLaw& law, const QueryState& state) {
  return law.cutoff - std::log(state.total > 1 ? state.total : 1);
}

// Merges a chunk into the state. Its squared distances become weights. Returns their sum. If none
// counts, `nonzero` is 0 and the row is left as it is.
template <class T>
double merge(const WeightLaw& law, QueryState& state, double radius, double chunk_nearest,
             double* squared, Index count) {
  rebase(law, state, radius, chunk_nearest);
  const double fall = visible_fall(law, state);
  if (chunk_nearest - state.nearest > law.excess_at(fall, state.nearest, radius)) return 0;
  const double sum = weigh_for<T>(law, state.nearest, radius, fall, squared, squared, count);
  const double least = std::exp(-law.cutoff) * (state.total + sum);
  const double kept = keep_visible(
      squared, count, least > kSmallestDouble ? least : kSmallestDouble, &state.nonzero);
  state.total += kept;
  return kept;
}

// Fails if the whole result of a query depends on squared distances that underflow, or if its mean,
// which may be null, has a value that T cannot hold. The last of several calls, without references,
// does not know their type.
template <class T>
Status check_result(const Problem& problem, const QueryState& state, double radius, const T* mean,
                    Index query) {
  const Index features = problem.features;
  const bool last = problem.references == 0;
  if (may_underflow<T>(problem) || last)
    if (state.nearest > 0 && state.nearest + radius * radius < least_square(features))
      return {Failure::underflow, query};
  if (mean && (may_exceed<T>(problem) || last || problem.difference))
    for (Index k = 0; k < features; ++k)
      if (!std::isfinite(mean[k])) return {Failure::range, query};
  return {};
}

inline double logsumexp(const WeightLaw& law, const QueryState& state, double radius) {
  return law.score(state.nearest, radius) + std::log(state.total);
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
