// Arithmetic of a thread: bits of numbers, approximate functions, float16 parts, sums in two
// floats.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pfgm {
namespace {

__device__ inline float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
__device__ inline std::uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ inline double double_of(std::int64_t bits) { return __longlong_as_double(bits); }
__device__ inline std::int64_t bits_of(double v) { return __double_as_longlong(v); }

// 1/v for normal v whose reciprocal is normal, to the last bit or nearly so. Unlike a division it
// has no branches.
__device__ inline float reciprocal(float v) {
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(v));
  return fmaf(near, fmaf(-v, near, 1), near);
}

// e^v, with a relative error of about 2^-22 + |v| 2^-24. Subnormal results are zero.
__device__ inline float exponential(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * 1.44269504f));
  return power;
}

// √v of normal v, to about 2^-22.
__device__ inline float square_root(float v) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
  return root;
}

// log v of 1 ≤ v ≤ 4, with an error of about 2^-21.
__device__ inline float logarithm(float v) {
  float power;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power * 0.693147181f;
}

// a b, rounded. The compiler does not fuse it with an addition.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }

struct Sum {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Least {
  template <class T> __device__ T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Most {
  template <class T> __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};

// The bits of infinity. Numbers ≥ 0 are ordered like their bits, infinity and NaN last. Comparing
// bits takes no float64 instructions.
constexpr std::uint64_t kInfiniteBits = 0x7ffull << 52;

// √v of finite v ≥ 0, to about 2^-22. Takes no float64, which is slow on GeForce cards. The root of
// 0 is a very small number.
__device__ inline double square_root64(double v) {
  const std::int64_t bits = bits_of(v);
  const int power = static_cast<int>(bits >> 52) - 1023, half = power >> 1;
  const auto digits = static_cast<std::uint32_t>(bits >> 29) & 0x7fffffu;
  const float root =
      square_root(float_of(digits | static_cast<std::uint32_t>(127 + (power & 1)) << 23));
  // The bits of the root, widened to float64, plus half of v's exponent.
  return double_of((static_cast<std::int64_t>(bits_of(root)) << 29) +
                   (static_cast<std::int64_t>(1023 - 127 + half) << 52));
}

// n/by, rounded up, of numbers ≥ 0. Dividing 64-bit numbers takes much longer.
__device__ inline int divide_up32(int n, int by) {
  return static_cast<int>(static_cast<unsigned>(n + by - 1) / static_cast<unsigned>(by));
}

// ---- float16 -----------------------------------------------------------------------------------

// Two values rounded to float16 in a word, `first` in its lower half. Larger ones become infinite.
__device__ inline std::uint32_t halves_of(float first, float second) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
  return halves;
}

__device__ inline float half_to_float(std::uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

// The first or the second float16 value of a word.
__device__ inline float half_of_word(std::uint32_t word, int second) {
  return half_to_float(static_cast<std::uint16_t>(word >> 16 * second));
}

// Two values in float16 as high + low, the first in the lower half of each word.
struct TwoHalves {
  std::uint32_t high, low;
};
__device__ inline TwoHalves split_halves(float first, float second) {
  const std::uint32_t high = halves_of(first, second);
  const float first_high = half_of_word(high, 0), second_high = half_of_word(high, 1);
  return {high, halves_of(first - first_high, second - second_high)};
}

// One value as high + low in a word, high in its lower half.
__device__ inline std::uint32_t both_halves(float v) {
  const std::uint32_t high = halves_of(v, 0);
  return halves_of(v, v - half_of_word(high, 0));
}

// The high parts, and the low parts, of two such words.
__device__ inline TwoHalves separate_halves(std::uint32_t first, std::uint32_t second) {
  return {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
}

// ---- sums in two floats ------------------------------------------------------------------------

// high + low, with about twice the digits of float32.
struct TwoFloats {
  float high, low;

  __device__ double sum() const { return static_cast<double>(high) + low; }
  // Nothing that `high` loses is rounded away, whichever is larger (Knuth's TwoSum). Kahan's sum is
  // an addition shorter, but rounds each value.
  __device__ void add(float value) {
    const float larger = high + value, part = larger - high;
    low += (high - (larger - part)) + (value - part);
    high = larger;
  }
  // Adds a b, with the rounding error of the product.
  __device__ void add_product(float a, float b) {
    const float product = rounded_product(a, b);
    add(product);
    low += fmaf(a, b, -product);
  }
};

__device__ inline TwoFloats sum_of(TwoFloats a, const TwoFloats& b) {
  a.add(b.high);
  return {a.high, a.low + b.low};
}

// v ≥ 0 divided by a power of two, in two floats: its first 24 bits, and the rest. `power` is the
// biased exponent of that power of two in float64, less 127, in the upper half of float64.
// Quotients beyond float32 become about its largest or smallest normal number.
__device__ inline TwoFloats two_floats(double v, std::uint32_t power) {
  constexpr int least = 1 << 20, most = (255 << 20) - 1;
  const std::int64_t bits = bits_of(v);
  const auto back = static_cast<std::uint32_t>(bits);
  int front = static_cast<int>(static_cast<std::uint32_t>(bits >> 32) - power);
  front = front < least ? least : front > most ? most : front;
  const std::uint32_t first = static_cast<std::uint32_t>(front) << 3 | back >> 29;
  const float ulp = float_of(first & 0x7f800000u) * 0x1p-52f;
  return {float_of(first), static_cast<float>(static_cast<int>(back & 0x1fffffffu)) * ulp};
}

// The sum of two sums of two floats each.
__device__ inline float2 add_sums(const float2& a, const float2& b) {
  const TwoFloats sum = sum_of({a.x, a.y}, {b.x, b.y});
  return {sum.high, sum.low};
}

}  // namespace
}  // namespace pfgm
