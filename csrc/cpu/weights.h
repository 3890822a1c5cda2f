// From squared distances to weights.
#pragma once
#include "cpu/simd.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kChunk = 2048;  // references a chunk, at most; a multiple of every Simd::tile
// Doubles between rows of a chunk; with a power of two all rows would compete for a few cache sets.
constexpr Index kStride = kChunk + 64;
static_assert(kChunk % Simd<float>::tile == 0, "a chunk is whole tiles");

// A weight below e^-kUnseen / M of their sum is taken for zero: M of them are less than the rounding
// of the result (the epsilon of T is e^-15.9 and e^-36).
template <class T> constexpr double kUnseen = sizeof(T) == sizeof(float) ? 16 : 36.1;

// How a squared distance becomes a weight.
struct Law {
  bool gaussian;    // D = ∞
  double exponent;  // (N + D)/2, D finite
  double unseen;    // log of the smallest share of the sum of weights that counts

  // log of the weight at squared distance nearest + excess, relative to that at nearest.
  double relative(double excess, double nearest, double radius) const {
    if (excess == 0) return 0;
    if (gaussian) return -excess / radius / radius / 2;
    return -exponent * std::log1p(excess / (nearest + radius * radius));
  }

  Doubles relative(Doubles excess, double nearest, double radius) const {
    const Doubles fall = gaussian ? excess / radius / radius / 2.0
                                  : exponent * log_one_plus(excess / (nearest + radius * radius));
    return excess == 0.0 ? Doubles{} : -fall;
  }

  double absolute(double squared, double radius) const {
    if (gaussian) return squared == 0 ? 0 : -squared / radius / radius / 2;
    return -exponent * std::log(squared + radius * radius);
  }

  // The excess at which a weight is e^-fall of that of the nearest reference; grows with nearest.
  double excess(double fall, double nearest, double radius) const {
    if (gaussian) return 2 * fall * radius * radius;
    return std::expm1(fall / exponent) * (nearest + radius * radius);
  }

  // How many times a relative error of the nearest squared distance is one of its log weight.
  double sensitivity(double nearest, double radius) const {
    if (gaussian) return nearest / radius / radius / 2;
    return exponent * nearest / (nearest + radius * radius);
  }
};

template <class T>
Law law_of(const Problem& problem, double more_digits = 0) {
  return {std::isinf(problem.dimensions), (problem.features + problem.dimensions) / 2,
          kUnseen<T> + std::log(static_cast<double>(problem.references)) + more_digits};
}

constexpr double kLeast = std::numeric_limits<double>::min();

// The merge state of one query: everything is relative to the nearest reference so far.
struct Row {
  double nearest = kInfinity, total = 0;
  double scale = 1;  // what sums made before this chunk must be multiplied by
  Index live = 0;    // references of this chunk that count
};

// Doubles in a row of weights and squared distances: whole vectors, the last padded.
inline Index padded_count(Index count) { return round_up(count, kDoubles); }

inline double sum_of(Doubles v) {
  double total = 0;
  for (Index lane = 0; lane < kDoubles; ++lane) total += v[lane];
  return total;
}

// weights[j] = weight of squared[j] relative to that of nearest, 0 where it is below e^-fall; returns
// their sum. Both may be the same array, and both are padded (with distances that do not count).
inline double weigh(const Law& law, double nearest, double radius, double fall,
                    const double* squared, double* weights, Index count) {
  const double visible = law.excess(fall, nearest, radius);
  Doubles total = {};
  for (Index j = 0; j < padded_count(count); j += kDoubles) {
    // Rounding may leave the nearest a little nearer than it was in the forward pass.
    const Doubles difference = vector_at(squared + j) - nearest;
    const Doubles excess = difference > 0.0 ? difference : Doubles{};
    const Longs seen = excess <= visible;
    std::int64_t any = 0;
    for (Index lane = 0; lane < kDoubles; ++lane) any |= seen[lane];
    Doubles weight = {};
    if (any) weight = seen ? exponential(law.relative(excess, nearest, radius)) : Doubles{};
    vector_at(weights + j) = weight;
    total += weight;
  }
  return sum_of(total);
}

// Sets weights below `least` to zero; counts the others and returns their sum.
inline double keep_visible(double* weights, Index count, double least, Index* live) {
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
  *live = 0;
  for (Index lane = 0; lane < kDoubles; ++lane) *live += number[lane];
  return sum_of(total);
}

// Takes a chunk into the row: its distances become weights.
inline void merge(const Law& law, Row& row, double radius, double chunk_nearest, double* squared,
                  Index count) {
  row.scale = 1;
  row.live = 0;
  if (chunk_nearest < row.nearest) {
    const double fall = row.nearest - chunk_nearest;
    row.scale = row.total == 0 ? 0 : std::exp(law.relative(fall, chunk_nearest, radius));
    row.total *= row.scale;
    row.nearest = chunk_nearest;
  }
  const double before = row.total > 1 ? row.total : 1, fall = law.unseen - std::log(before);
  if (chunk_nearest - row.nearest > law.excess(fall, row.nearest, radius)) return;
  const double sum = weigh(law, row.nearest, radius, fall, squared, squared, count);
  const double least = std::exp(-law.unseen) * (row.total + sum);
  row.total += keep_visible(squared, count, least > kLeast ? least : kLeast, &row.live);
}

inline double logsumexp(const Law& law, const Row& row, double radius) {
  if (!law.gaussian && row.nearest + radius * radius == 0) return kInfinity;
  return law.absolute(row.nearest, radius) + std::log(row.total);
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
