// Squared distances |x|² + |y|² − 2 x·y from norms and products, on CUDA devices.
//
// They are computed in two floats, to about 2^-45 of the norms, and become float64 by their bits:
// float64 runs at 1/64 of the rate of float32 on GeForce cards.
#pragma once
#include "cuda/arithmetic.h"

namespace pfgm {
namespace {

// The exponent of v ≥ 0 in the bits of float64. Those of squares of float32 are larger than 512;
// that of 0 counts as 512.
__device__ inline int exponent_of(double v) {
  return Most()(static_cast<int>(bits_of(v) >> 52), 512);
}

// 2^power, or the nearest power of two that float32 holds.
__device__ inline float power_of_two(int power) {
  const int biased = 127 + power;
  return float_of(static_cast<std::uint32_t>(biased < 1 ? 1 : biased > 254 ? 254 : biased) << 23);
}

// v ≥ 0 in two floats, divided by the power of two that has this exponent in float64.
__device__ inline TwoFloats two_floats_over(double v, int exponent) {
  return two_floats(v, static_cast<std::uint32_t>(exponent - 127) << 20);
}

__device__ inline TwoFloats times(const TwoFloats& v, float power) {
  return {v.high * power, v.low * power};
}

// The bits of v times the power of two that has this exponent in float64. Negative numbers, and
// those below 2^-64, give 0.
__device__ inline std::uint64_t bits_of_sum(const TwoFloats& v, int exponent) {
  const float high = v.high + v.low, low_part = high - v.high;
  const float low = (v.high - (high - low_part)) + (v.low - low_part);
  if (!(high < INFINITY)) return kInfiniteBits + 1;
  if (!(high > 0x1p-64f)) return 0;
  const std::uint32_t bits = bits_of(high);
  // 1 over the ulp of `high` in float64. Below a power of two an ulp is half as large.
  const float per_ulp = float_of((2 * 127 + 52u) * 0x800000u - (bits & 0x7f800000u));
  auto ulps = static_cast<std::int64_t>(__float2int_rn(low * per_ulp));
  if ((bits & 0x7fffffu) == 0 && ulps < 0) ulps *= 2;
  const auto power = static_cast<std::uint64_t>(exponent - 127) << 52;
  return (static_cast<std::uint64_t>(bits) << 29) + power + static_cast<std::uint64_t>(ulps);
}

// |y|² of two references.
struct ReferenceNorms {
  TwoFloats squared[2];  // over powers of two
  int exponents[2];      // of these

  __device__ explicit ReferenceNorms(const double (&norms)[2]) {
    for (int e = 0; e < 2; ++e) {
      exponents[e] = exponent_of(norms[e]);
      squared[e] = two_floats_over(norms[e], exponents[e]);
    }
  }
};

// The distances of a query to two references, as bits of float64. Products are sums of two floats,
// in the query's unit.
class DistanceOfQuery {
 public:
  __device__ DistanceOfQuery(double norm, double unit, const ReferenceNorms& y)
      : y_(y), norm_exponent_(exponent_of(norm)), twice_unit_exponent_(exponent_of(unit) + 1) {
    norm_ = two_floats_over(norm, norm_exponent_);
  }

  // Sums are in units of the larger norm. Twice a product is at most the sum of both, so float32
  // holds them.
  __device__ std::uint64_t operator()(int reference, float2 product) const {
    const int y_exponent = y_.exponents[reference], exponent = Most()(norm_exponent_, y_exponent);
    const TwoFloats norms =
        sum_of(times(y_.squared[reference], power_of_two(y_exponent - exponent)),
               times(norm_, power_of_two(norm_exponent_ - exponent)));
    const float product_factor = -power_of_two(twice_unit_exponent_ - exponent);
    return bits_of_sum(sum_of(norms, times({product.x, product.y}, product_factor)), exponent);
  }

 private:
  const ReferenceNorms& y_;
  const int norm_exponent_, twice_unit_exponent_;
  TwoFloats norm_;
};

}  // namespace
}  // namespace pfgm
