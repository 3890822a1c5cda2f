// The law of weights. Whatever depends on whether D is infinite stands here.
//
// The score of a reference, the log of its weight, is relative to that of the nearest reference, at
// squared distance d². A reference at d² + e has
//     l − l_nearest = −P/2 log(1 + u),  u = e/s,  s = d² + r²,  P = N + D      D finite
//     l − l_nearest = −P/2 u,           u = e/s,  s = σ²,       P = 1          D = ∞
#pragma once
#include "cpu/rows.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of the result (epsilon is e^-15.9 and e^-36).
template <class T> constexpr double kWeightCutoff = sizeof(T) == sizeof(float) ? 16 : 36.1;

// What the gradients of a query need besides the sums over references: C and ∂L/∂r
// (cpu/gradients.h).
struct Totals {
  double c, grad_radius;
};

struct WeightLaw {
  bool gaussian;    // D = ∞
  double exponent;  // P/2
  double cutoff;    // −log of the smallest fraction of the sum of weights that counts

  // value/s, where s is that of a reference at the squared distance `squared`. σ² may underflow.
  template <class V, class Squared>
  V per_scale(const V& value, const Squared& squared, double radius) const {
    return gaussian ? value / radius / radius : value / (squared + radius * radius);
  }

  // Score at the squared distance nearest + excess, minus the score at nearest.
  double relative_score(double excess, double nearest, double radius) const {
    if (excess == 0) return 0;
    const double u = per_scale(excess, nearest, radius);
    return -exponent * (gaussian ? u : std::log1p(u));
  }

  Doubles relative_score(const Doubles& excess, double nearest, double radius) const {
    const Doubles u = per_scale(excess, nearest, radius);
    return excess == 0.0 ? Doubles{} : -exponent * (gaussian ? u : log_one_plus(u));
  }

  // Calls f with the weight as a function of u. The function is chosen once, outside of loops.
  // log(1 + u) has an error of 3e-7 (log2_one_plus). At a score of −f the weight e^−f has an error
  // of about 4e-7 f relative to itself, so at most 2e-7 relative to the largest weight.
  template <class F>
  void with_weight(const F& f) const {
    if (gaussian) return f([](const Floats& u) { return exponential2(u * (-kLog2e / 2)); });
    const float power = static_cast<float>(exponent);
    f([power](const Floats& u) { return exponential2(-power * log2_one_plus(u)); });
  }

  // The value times the derivative of log(1 + u), or of u: by how much the score falls with u.
  Floats times_slope(const Floats& value, const Floats& u) const {
    return gaussian ? value : value / (1.0f + u);
  }

  double score(double squared, double radius) const {
    if (gaussian) return squared == 0 ? 0 : -exponent * (squared / radius / radius);
    if (squared == 0) return -exponent * 2 * std::log(radius);  // r² may underflow
    return -exponent * std::log(squared + radius * radius);
  }

  // The excess over the nearest squared distance at which the score is `fall` lower. It grows with
  // nearest, but not to kSkipped (cpu/distances.h).
  double excess_at(double fall, double nearest, double radius) const {
    const double lower = fall / exponent;
    if (gaussian) return lower * radius * radius;
    return std::fmin(std::expm1(std::fmin(lower, 700)) * (nearest + radius * radius), 1e300);
  }

  // By how much the score multiplies a relative error of the nearest squared distance.
  double sensitivity(double nearest, double radius) const {
    return per_scale(exponent * nearest, nearest, radius);
  }

  // The σ with which, at D = ∞, the score would fall as fast with the distance at the nearest
  // reference.
  double sigma(double nearest, double radius) const {
    return gaussian ? radius : std::sqrt((nearest + radius * radius) / exponent / 2);
  }

  // Whether the row is at a limit, where the mean is locally constant: r = 0 on a reference, or σ
  // so small that scores overflow.
  bool at_limit(double nearest, double radius) const {
    if (gaussian) return radius == 0 || std::isinf(nearest / radius / radius);
    return nearest + radius * radius == 0;
  }

  // Whether the result does not change with x and r, as far as float64 tells: at a limit, or on a
  // reference with an r so small that P/r² overflows. The gradient of logsumexp would be 0 · ∞.
  bool is_constant(double nearest, double radius) const {
    constexpr double most = std::numeric_limits<double>::max() / 1e4;
    return at_limit(nearest, radius) || (nearest == 0 && radius * radius * most < 2 * exponent);
  }

  Totals totals(double nearest, double radius, double g, double moment) const {
    if (is_constant(nearest, radius)) return {0, 0};
    if (gaussian)
      return {-g / radius / radius, (g * (nearest / radius / radius) + moment) / radius};
    const double c = -2 * exponent * (g - moment) / (nearest + radius * radius);
    return {c, radius * c};
  }
};

template <class T>
WeightLaw weight_law(const Problem& problem, double extra_cutoff = 0) {
  const bool gaussian = std::isinf(problem.dimensions);
  const double power = gaussian ? 1 : problem.features + problem.dimensions;
  const Index all = larger(problem.references, problem.all_references);
  double cutoff = kWeightCutoff<T> + std::log(static_cast<double>(all)) + extra_cutoff;
  // In Σ w (y − x) a weight s^−P/2 counts times √s, relative to the nearest. Up to P = 2 weights
  // fall so slowly that this shows in Σ w y too.
  if (!gaussian && (problem.difference || power <= 2)) cutoff *= power / (power - 1);
  return {gaussian, power / 2, cutoff};
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
