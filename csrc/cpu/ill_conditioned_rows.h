// Ill-conditioned rows: their gradients magnify the rounding of the mean until it is visible.
//
// The gradients are sums of t_j = G·(y_j − mean) + g times p_j (N + D)/s_j |x − y_j|. The mean from
// the forward pass and the sums over features are rounded to about ε of their values. A small σ
// multiplies that error by d/σ². If several references are equally near, no other term hides it.
// Ill-conditioned rows are computed in float64, and t_j is taken relative to the average of G·(y_j
// − mean) over the same weights. Then Σ p_j t_j = g however the mean was rounded. So are rows in
// which products of G with differences would leave the range of float32.
#pragma once
#include "cpu/distances.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// Tolerated error of t_j, relative to |G|, times (N + D) d/s.
template <class T> constexpr double kToleratedError = sizeof(T) == sizeof(float) ? 3e-5 : 1e-10;
constexpr double kMaxSpread = 16;  // references that count are at most this many (d² + σ²)^½ apart
// Float32 holds products of the largest |G_k| and the distance from this to its inverse.
constexpr double kSmallestProduct = 1e-25;
constexpr Index kIllConditionedBlock = 64;  // rows that add_pulls takes at a time

constexpr Index kWideLanes = 4 * kDoubles;

template <class T>
T largest_of(const T* values, Index n) {
  T most[kWideLanes] = {};
  const auto take = [](T& largest, T value) {
    const T size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
  };
  Index k = 0;
  for (; k + kWideLanes <= n; k += kWideLanes)
    for (Index lane = 0; lane < kWideLanes; ++lane) take(most[lane], values[k + lane]);
  for (; k < n; ++k) take(most[0], values[k]);
  for (Index lane = 1; lane < kWideLanes; ++lane) take(most[0], most[lane]);
  return most[0];
}

// Whether products of T of G and y_j − mean, or their sums over features, may overflow or lose
// digits to underflow. y_j − mean is about as long as the distance of the nearest, or as σ.
template <class T>
bool leaves_range(const Problem& problem, const WeightLaw& law, double nearest, double radius,
                  const T* grad) {
  if (sizeof(T) == sizeof(double)) return false;
  const double distance = std::hypot(std::sqrt(nearest), law.sigma(nearest, radius));
  const double product = static_cast<double>(largest_of(grad, problem.features)) * distance;
  return product != 0 && !(product > kSmallestProduct && product < 1 / kSmallestProduct);
}

// Whether the rounding of the mean would change t_j by more than kToleratedError.
template <class T>
bool is_ill_conditioned(const Problem& problem, const WeightLaw& law, double nearest, double total,
                        double radius, const T* mean) {
  // The mean is the nearest reference itself and has no error.
  const bool exact = holds_exactly<T>(problem);
  if (total == 1 && exact) return false;
  const double sigma = law.sigma(nearest, radius);
  const double distance = std::sqrt(nearest + sigma * sigma);
  const double slope = distance / sigma / sigma, rounding = std::numeric_limits<T>::epsilon() / 2;
  // Where total − 1 is below the rounding, the mean is rounded to the nearest reference: it is off
  // by at most the weight of the others times their spread.
  double error = (total - 1) * kMaxSpread * distance;
  if (total - 1 > rounding / 2 || !exact) {
    // A feature of y_j − mean is about 1/√N of the distance. Over many features rounding averages
    // out.
    const double root = std::sqrt(static_cast<double>(problem.features));
    error = rounding * (largest_of(mean, problem.features) * (1 + 3 / root) + distance / root);
  }
  return error * slope > kToleratedError<T>;
}

// One row of a chunk: t[j] = G·(y_j − mean) where p[j] is not zero. Adds Σ p and Σ p t to sums.
template <class T>
void project_row(const Distances<T>& distances, const T* g, const T* mean, Index features,
                 const double* p, double* t, double* sums) {
  for (Index j = 0; j < distances.count(); ++j) {
    if (p[j] == 0) continue;
    const double projection = project(g, mean, distances.reference(j), features);
    if (t) t[j] = projection;
    sums[0] += p[j];
    sums[1] += p[j] * projection;
  }
}

// The average of t from sums of p and p t.
inline double average(const double* sums) { return sums[0] > 0 ? sums[1] / sums[0] : 0; }

// One row of a chunk: adds Σ_j c_j (y_j − mean) to sum, in float64.
template <class T>
void add_row(const Distances<T>& distances, const T* mean, Index features, const double* p,
             const double* c, double* sum) {
  for (Index j = 0; j < distances.count(); ++j) {
    if (p[j] == 0) continue;
    with_values(distances.reference(j), [&](const auto* y) {
      for (Index k = 0; k < features; ++k)
        sum[k] += c[j] * (load<double>(y[k]) - static_cast<double>(mean[k]));
    });
  }
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
