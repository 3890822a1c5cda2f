// The law of weights on CUDA devices: how a squared distance becomes a weight, and which errors of
// distances matter. Whatever depends on whether D is infinite stands here.
//
// The score of a reference, the log of its weight, is relative to that of the nearest reference, at
// squared distance d². At d² + e it is lower by
//     exponent · log(1 + e/s),  s = d² + r²,  exponent = (N + D)/2      D finite
//     exponent · e/s,           s = σ²,       exponent = 1/2            D = ∞
// The second is the limit of the first for a large exponent and the same exponent/s. So both have
// one form: exponent · log(1 + u), u = linear · per_power, linear = exponent · e/s.
#pragma once
#include <cmath>

#include "api/posterior_mean.h"
#include "cuda/arithmetic.h"
#include "cuda/arrays.h"

namespace pfgm {
namespace {

// nats: a weight so much smaller than the largest needs no more digits
constexpr double kNear = 20;
// nats: M weights, each log M + kOthers below another, sum to at most e^-kOthers of it.
constexpr double kOthers = 2;
// How much larger distances |x|² + |y|² − 2 x·y are through the cuts of matrix units, relative to
// 2|x||y| + |y|², where x is close to y. In the executor (tests/ptx) x·y over 256 and 3072 features
// is too small by 2^-24 of it, and by up to 1.9·2^-24 if most of it is in one panel. Units before
// sm_90 add up half as many terms at a time and keep a digit less: 2.2·2^-24 and 4.4·2^-24. Two
// thirds of that are the bias here, because 2 x·y is two thirds of 2|x||y| + |y|².
constexpr double kBias = 0x1.4p-24, kEarlierBias = 0x1.8p-23;
// Relative error of a weight that needs no refinement. That of the smallest distance and of scores
// is kDigits of it.
constexpr double kTolerance = 2e-5, kDigits = 0x1p-2;

// How much a squared distance exceeds that of the nearest reference, times a rate. On GeForce cards
// float64 runs at 1/64 of the rate of float32. So the difference is taken of two floats, which the
// bits of a float64 number give: they hold 48 of its digits. Equal distances have the difference 0.
struct Fall {
  std::uint32_t power;  // the unit of distances, a power of two, as two_floats takes it
  TwoFloats nearest;
  float rate;

  // The unit is about 1/rate. It is larger if the nearest distance would overflow float32: there
  // any difference is so large that the weight is 0. `rate` is at most 1e300, or NaN.
  __device__ Fall(double nearest_distance, double rate_of_distance) {
    const int rate_exponent = static_cast<int>(bits_of(rate_of_distance) >> 52 & 2047);
    const int nearest_exponent = static_cast<int>(bits_of(nearest_distance) >> 52 & 2047);
    int unit = 2046 - rate_exponent;
    if (unit < nearest_exponent - 60) unit = nearest_exponent - 60;
    if (unit < 127) unit = 127;
    power = static_cast<std::uint32_t>(unit - 127) << 20;
    const double scaled = rate_of_distance * double_of(static_cast<std::int64_t>(unit) << 52);
    rate = scaled > 0x1p120 ? 0x1p120f : static_cast<float>(scaled);
    if (nearest_exponent == 2047) rate = NAN;  // the parts of infinity and NaN are numbers
    nearest = two_floats(nearest_distance, power);
  }

  __device__ float operator()(double squared) const {
    const TwoFloats parts = two_floats(squared, power);
    return ((parts.high - nearest.high) + (parts.low - nearest.low)) * rate;
  }
};

// With s₀ that of the nearest reference: s₀/s and exponent·(d² − d₀²)/s. At D = ∞ they are 1 and
// (d² − d₀²)/(2σ²). float32 may hold this where it does not hold (d² − d₀²)/s.
struct Ratios {
  float nearest, excess;
};

// F, C and ∂L/∂r of a query (cuda/coefficients.h).
struct Totals {
  double unit, sum, grad_radius;
};

// How the score of a reference, the log of its weight, depends on its squared distance
// (api/posterior_mean.h). `nearest` is the squared distance of the nearest reference, r the radius.
struct WeightLaw {
  bool gaussian;           // D = ∞
  double exponent;         // (N + D)/2; 1/2 at D = ∞
  double per_exponent;     // 1 over it
  float power, per_power;  // both in float32; at D = ∞ per_power is 0, and power is not used
  double near_spread;      // the e/s that lowers a weight by kNear nats
  float others;            // nats: weights so much below the largest sum to less than
                           // e^-kOthers of it. Infinite if the gradient needs their digits
  double margin;           // largest error of a distance, relative to |x|² + |y|²
  double noise;       // typical error, relative to 2|x||y| + |y|² of products or d² of differences
  double byte_noise;  // the same of differences to bytes, relative to |x|² + d²

  // s of the nearest reference.
  __device__ double scale(double nearest, double r) const {
    return gaussian ? r * r : nearest + r * r;
  }

  // value/s. σ² may underflow.
  __device__ double per_scale(double value, double nearest, double r) const {
    return gaussian ? value / r / r : value / (nearest + r * r);
  }

  // How fast the score falls at the squared distance `nearest`: infinitely fast where r = 0 on a
  // reference. Capped at 1e300, so that an equal distance (0 times the rate) keeps the weight 1.
  __device__ double rate(double nearest, double r) const {
    const double result = per_scale(exponent, nearest, r);
    return result < 1e300 ? result : result == result ? 1e300 : NAN;
  }

  // The weight at a squared distance, over that at the nearest. `linear` is what Fall says of it.
  // Scores count up to some tens of nats, for which float32 has enough digits.
  //
  // With 1 + u = 2^k (1 + m), −1/4 ≤ m < 1/2, log1p(u) = k log 2 + log1p(m). For k = 0, exponent ·
  // u is `linear` itself, so the exponent may be larger than float32 holds, or infinite: at D = ∞ u
  // and m are 0, and `fall` is `linear` to the bit.
  __device__ float weight(float linear) const {
    const float u = linear * per_power;
    const int k_shifted = (static_cast<int>(bits_of(1 + u)) - 0x3f400000) & -0x800000;  // 2^23 k
    const float scale = float_of(0x3f800000u - static_cast<std::uint32_t>(k_shifted));
    const float m = u * scale + (scale - 1);
    // log1p(m)/m = 1 − m/2 + m² q(m), to 9e-9.
    float q = -0.0450747833f * m + 0.104630210f;
    q = q * m - 0.131611943f;
    q = q * m + 0.144783959f;
    q = q * m - 0.166473120f;
    q = q * m + 0.199908614f;
    q = q * m - 0.250000954f;
    q = q * m + 0.333334506f;
    const float ratio = (q * m - 0.5f) * m + 1;
    const float k_log2 = static_cast<float>(k_shifted) * (0.693147181f * 0x1p-23f);
    const float fall = k_shifted == 0 ? linear * ratio : power * (k_log2 + m * ratio);
    return exponential(linear > 0x1p100f ? -INFINITY : -fall);  // u may be infinite or NaN
  }

  // The ratios that the gradient needs. float32 suffices: distances have larger errors.
  __device__ Ratios ratios(float linear) const {
    const float nearest = reciprocal(1 + linear * per_power);
    return {nearest, linear * nearest};
  }

  // Whether the row is at a limit, where the mean is locally constant: r = 0 on a reference, or σ
  // so small that scores overflow.
  __device__ bool at_limit(double nearest, double r) const {
    if (gaussian) return r == 0 || nearest / r / r == INFINITY;
    return nearest + r * r == 0;
  }

  // F: 2 exponent/s. It is not finite where the row is at a limit.
  __device__ double unit(double nearest, double r) const {
    return per_scale(2 * exponent, nearest, r);
  }

  // `g` and `moment` are as in cuda/coefficients.h.
  __device__ Totals totals(double nearest, double r, double g, double moment) const {
    const double sum = gaussian ? -g : moment - g;
    if (at_limit(nearest, r)) return {0, sum, 0};
    return {unit(nearest, r), sum,
            gaussian ? (g * (nearest / r / r) + moment) / r : r * unit(nearest, r) * sum};
  }

  // The size of the score of the nearest reference, whose s is given.
  __device__ float score_size(double nearest, double s) const {
    if (gaussian) return nearest == 0 ? 0 : static_cast<float>(nearest / (s * per_exponent));
    return static_cast<float>(exponent) * fabsf(logf(static_cast<float>(s)));
  }

  // The log-sum-exp of weights whose sum relative to the nearest is `total`.
  __device__ double logsumexp(double nearest, double total, double r) const {
    if (gaussian) return (nearest == 0 ? 0 : -nearest / r / r / 2) + log(total);
    const bool on_reference = nearest == 0;  // r² may underflow there
    return -exponent * (on_reference ? 2 : 1) * log(on_reference ? r : nearest + r * r) +
           log(total);
  }
};

// `products` says whether distances are computed from products instead of differences, `gradient`
// whether a gradient may take them. `bias` is that of the matrix units.
WeightLaw weight_law(const Problem& problem, bool products, bool gradient, double bias) {
  const bool gaussian = std::isinf(problem.dimensions);
  const double features = static_cast<double>(problem.features);
  const double exponent = gaussian ? 0.5 : (features + problem.dimensions) / 2;
  const double length = features > 8192 ? features / 8192 : 1;
  // Sums over panels of 32 features are rounded, which mostly averages out. Matrix units cut each
  // addend of an instruction toward zero, which is a bias that does not.
  const double panels = std::fmax(1.0, features / kPanel);
  const double panel_noise = 0x1p-22 / std::sqrt(panels) + bias;
  // Differences and their squares are rounded, and sums of eight. These errors average out.
  const double difference_noise = 0x1p-21 / std::sqrt(features);
  const float power = static_cast<float>(exponent);
  const double others = std::log(static_cast<double>(problem.references)) + kOthers;
  return {gaussian,
          exponent,
          1 / exponent,
          power,
          gaussian ? 0 : 1 / power,
          gaussian ? kNear / exponent : std::expm1(kNear / exponent),
          gradient ? INFINITY : static_cast<float>(others),
          length * (products ? 0x1p-18 : 0x1p-21),
          products ? panel_noise : difference_noise,
          problem.reference_type == Type::uint8 ? 0x1p-22 : 0};
}

}  // namespace
}  // namespace pfgm
