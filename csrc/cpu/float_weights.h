// Weights of rows of float32 distances, computed in float32.
#pragma once
#include "cpu/weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr float kLargestFloat = std::numeric_limits<float>::max();

// A limit for finite float32 distances.
inline float float_limit(double limit) {
  return limit < kLargestFloat ? static_cast<float>(limit) : kLargestFloat;
}

// Adds the lanes in float64.
inline void add_lanes(const Floats& values, Doubles& total) {
  Doubles wide[2];
  widen(values, wide);
  total += wide[0] + wide[1];
}

// The law of one row in float32, relative to its nearest reference at squared distance d². That is
// held as the sum of two float32, so the small difference e_j = d_j² − d² is rounded only to its
// own 6e-8. The ratio u_j = e_j/s has no larger error.
class FloatWeights {
 public:
  FloatWeights(const WeightLaw& law, double nearest, double radius, double fall) : law_(law) {
    const double visible = law.excess_at(fall, nearest, radius);
    const double inverse = law.per_scale(1.0, nearest, radius);
    // Ratios that make a difference to a weight do not underflow, visible ones do not overflow.
    slope_ = inverse * law.exponent;
    fits_ = inverse > 1e-37 && slope_ < 1e30 && law.exponent < 1e30 && visible * inverse < 1e30;
    high_ = static_cast<float>(nearest);
    low_ = static_cast<float>(nearest - static_cast<double>(high_));
    inverse_ = static_cast<float>(inverse);
    visible_ = float_limit(visible);
  }

  // Whether float32 holds the ratios.
  bool fits() const { return fits_; }

  // Calls use(j, u, w) for the vectors of a row in which any weight counts, and skip(j) for
  // the others. Where a weight does not count, u and w are 0. A squared distance is the sum of
  // squared[j] and low[j], if `low` is not null.
  template <class Use, class Skip>
  void weigh(const float* squared, const float* low, Index padded, const Use& use,
             const Skip& skip) const {
    law_.with_weight([&](const auto& weight) {
      for (Index j = 0; j < padded; j += kFloats) {
        // Rounding may make the nearest a little nearer than in the forward pass.
        Floats difference = vector_at(squared + j) - high_ - low_;
        if (low) difference += vector_at(low + j);
        const Floats excess = difference > 0.0f ? difference : Floats{};
        const Ints seen = excess <= visible_;
        if (!any(seen)) {
          skip(j);
          continue;
        }
        const Floats u = seen ? excess * inverse_ : Floats{};
        use(j, u, seen ? weight(u) : Floats{});
      }
    });
  }

  const WeightLaw& law() const { return law_; }

  // By how much the score falls with the excess, at the nearest reference.
  double slope() const { return slope_; }

 private:
  const WeightLaw law_;
  bool fits_;
  double slope_;
  float high_, low_, inverse_, visible_;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
