// How a squared distance becomes a weight on CUDA devices, and which distances need float64 for it.
#pragma once
#include <cmath>

#include "api/posterior_mean.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// Differences of scores, in nats.
constexpr double kNear = 20;             // a weight e^-20 times the largest needs no more digits
constexpr double kFloatUnderflow = 104;  // e^-104 is 0 in float32

constexpr double kSmallestFloat = 0x1p-126;  // the smallest normal float32

// How the score of a reference, the log of its weight, depends on its squared distance
// (api/posterior_mean.h). `nearest` is the squared distance of the nearest reference, r the radius.
// At a score f nats below that of the nearest, d² + r² is (1 + spread) (nearest + r²) with
// spread = e^(f/exponent) − 1. At D = ∞, d² is nearest + spread r² with spread = 2 f.
struct WeightLaw {
  bool gaussian;            // D = ∞
  double exponent;          // (N + D)/2; 1/2 at D = ∞
  double near_spread;       // spread for f = kNear; D finite only
  double error_bound;       // bound of the error of a distance, relative to |x|² + |y|²
  double error_size;        // typical error of a distance d², relative to |x|² + d²
  double underflow_spread;  // spread for f = kFloatUnderflow

  // Score at the squared distance nearest + excess, minus the score at nearest.
  __device__ double relative_score(double excess, double nearest, double r) const {
    if (excess == 0) return 0;
    if (gaussian) return -excess / r / r / 2;
    return -exponent * log1p(excess / (nearest + r * r));
  }

  // Weight relative to that of the nearest. Most references are too far away to need a logarithm.
  __device__ float weight(double excess, double nearest, double r) const {
    if (excess > underflow_spread * (gaussian ? r * r : nearest + r * r)) return 0;
    return expf(static_cast<float>(relative_score(excess, nearest, r)));
  }

  // Whether the row is at a limit, where the mean is locally constant: r = 0 on a reference, or σ
  // so small that scores overflow.
  __device__ bool at_limit(double nearest, double r) const {
    if (gaussian) return r == 0 || nearest / r / r == INFINITY;
    return nearest + r * r == 0;
  }

  // Typical error of distances near `nearest`, for norm = |x|². The rounding errors of single
  // differences mostly average out.
  __device__ double typical_error(double nearest, double norm) const {
    return error_size * (norm + nearest) + 0x1p-26 * nearest + 1e6 * kSmallestFloat;
  }

  // Whether this error of a distance changes a weight by more than the fraction `share`.
  __device__ bool changes_weight(double error, double nearest, double r, double share) const {
    if (gaussian) return error > 2 * share * r * r;
    return exponent * error > share * (nearest + r * r);
  }

  // The largest computed distance d² at which a weight needs all digits. The bound of its error
  // uses |y|² ≤ 2 (d² + |x|²). It counts twice, because the smallest distance has an error too.
  __device__ double near_limit(double nearest, double norm, double r) const {
    const double uncertain = nearest + 2 * error_bound * (3 * norm + 2 * nearest);
    const double far = uncertain + (gaussian ? 2 * kNear * r * r : near_spread * (nearest + r * r));
    return far == far ? far : INFINITY;
  }
};

// `products` says whether distances are computed from products instead of differences.
WeightLaw weight_law(const Problem& problem, bool products) {
  const bool gaussian = std::isinf(problem.dimensions),
             bytes = problem.reference_type == Type::uint8;
  const double exponent = gaussian ? 0.5 : (problem.features + problem.dimensions) / 2;
  const double length = problem.features > 8192 ? problem.features / 8192.0 : 1;
  return {gaussian,
          exponent,
          gaussian ? 0 : std::expm1(kNear / exponent),
          length * (products ? 0x1p-18 : 0x1p-21),
          products || bytes ? 0x1p-22 : 0,
          gaussian ? 2 * kFloatUnderflow : std::expm1(kFloatUnderflow / exponent)};
}

}  // namespace
}  // namespace pfgm
