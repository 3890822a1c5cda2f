// The centre of the references, and queries relative to it in two float16 parts, on CUDA devices.
//
// Products of centred data lose fewer digits. Two float16 numbers hold 22 bits of a value, and
// matrix units multiply them at twice the rate of TF32.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kSamples = 16;  // references whose mean is the centre
constexpr int kSplitThreads = 256;
constexpr int kHeld = 8;  // pairs of values in the registers of a thread of split_rows
// The largest centred values are scaled to between 2^power and twice that. float16 ends below 2^16,
// so references outside of the sample may be 2^11 times as large.
constexpr int kQueryPower = 5, kReferencePower = 4;
// The same for weighted sums, which do not centre values. Others may be 2^4 times as large.
constexpr int kValuePower = 11;

// Products use 1/255 rounded to float32 as the unit of bytes. So references are too large by the
// factor 1 + excess, and centred at c/(1 + excess). Queries are centred there too and divided by
// this factor, which makes products right. Norms are corrected (true_square). So distances from
// products have no bias relative to those of `refine`.
template <class R> constexpr float kExcess = 0;
template <>
constexpr float kExcess<std::uint8_t> =
    static_cast<float>(255 * static_cast<double>(kUnit<std::uint8_t>) - 1);

// The power of two that brings `largest` > 0 to at least 2^power, below twice that. For 0 and
// values that are not finite it is some power of two.
__device__ inline float scale_to(float largest, int power) {
  const int biased = 254 + power - static_cast<int>(bits_of(largest) >> 23 & 255u);
  return float_of(static_cast<std::uint32_t>(biased < 1 ? 1 : biased > 254 ? 254 : biased) << 23);
}

// 1 over a normal power of two, exactly. That of 2^127 is subnormal.
__device__ inline float inverse_power(float power) {
  const std::uint32_t biased = bits_of(power) >> 23;
  return float_of(biased < 254 ? (254 - biased) << 23 : 1u << 22);
}

// 1/(a b) for normal powers of two, exactly.
__device__ inline double inverse_powers(float a, float b) {
  const std::int64_t biased = 1023 + 2 * 127 - static_cast<std::int64_t>(bits_of(a) >> 23) -
                              static_cast<std::int64_t>(bits_of(b) >> 23);
  return double_of(biased << 52);
}

// Finds the mean of evenly spaced references, and their largest distance from it. So that an
// outlier does not move the mean, the smallest and the largest value are replaced by the next ones.
// If they make the largest distance more than kFar times as large, they are left out of it too.
constexpr float kFar = 1 << 12;

template <class R>
__global__ void __launch_bounds__(kCenterThreads, 2)
    find_center(const Rows<R> y, const Center out) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int feature = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float mean = 0, spread = 0, near = 0, largest = 0;
  if (feature < out.features) {
    const int count = static_cast<int>(smaller(y.count, kSamples));
    float values[kSamples];
    float least = INFINITY, most = -INFINITY, second_least = INFINITY, second_most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      if (i >= count) continue;
      const float v = values[i] =
          load_float(y.row(static_cast<Index>(i) * y.count / count) + feature);
      second_least = fminf(second_least, fmaxf(least, v)), least = fminf(least, v);
      second_most = fmaxf(second_most, fminf(most, v)), most = fmaxf(most, v);
      largest = fmaxf(largest, fabsf(v));
    }
    if (count < 3) second_least = least, second_most = most;
    const float share = reciprocal(static_cast<float>(count));
#pragma unroll
    for (int i = 0; i < kSamples; ++i)
      if (i < count) mean += fminf(fmaxf(values[i], second_least), second_most) * share;
    // Equal samples do not tell how far the others spread. A fraction of their size is a guess.
    const float guess = fabsf(mean) * 0x1p-10f;
    near = fmaxf(guess, fmaxf(second_most - mean, mean - second_least));
    spread = fmaxf(guess, fmaxf(most - mean, mean - least));
  }
  spread = over_block<kCenterThreads>(spread, scratch, Most());
  near = over_block<kCenterThreads>(near, scratch, Most());
  if (near > 0 && spread > kFar * near) spread = near;
  if (feature < out.width) out.at[feature] = mean;
  largest = over_block<kCenterThreads>(largest, scratch, Most());
  if (threadIdx.x == 0) out.spread[blockIdx.x] = spread, out.largest[blockIdx.x] = largest;
}

struct SplitMemory {
  float most[kSplitThreads / 32];
  TwoFloats squares[kSplitThreads / 32];
};

// The largest value of all groups, found by a warp. `lane_value` is that of the group with the
// lane's number, or 0.
__device__ inline float largest_of(const float* group_values, int groups, float lane_value,
                                   const Lane& lane) {
  float largest = fmaxf(lane_value, 0);
#pragma unroll 1
  for (int i = lane.lane + 32; i < groups; i += 32) largest = fmaxf(largest, group_values[i]);
  return largest_of_warp(largest);
}

// Splits a row into float16 parts: a query minus the centre, or an upstream gradient, which is not
// CENTERED. norms[row] = |x − centre|², summed from scaled values, whose squares float32 holds.
// Threads keep the first values of an aligned row, and load all others twice. Each block also
// writes a part of the scaled centre.
template <bool CENTERED>
__global__ void __launch_bounds__(kSplitThreads, 1)
    split_rows(const Rows<float> rows, const Center center, double* norms, const Halves out) {
  SplitMemory& shared = *reinterpret_cast<SplitMemory*>(shared_memory());
  const Lane lane = this_lane();
  const Index row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), pairs = center.width / 2,
            groups = (center.width - 1) / kCenterThreads + 1;
  const float* x = rows.row(row);
  const int held =
      rows.aligned ? static_cast<int>(smaller(center.features / 2, kHeld * kSplitThreads)) : 0;
  const float lane_spread = lane.lane < groups ? center.spread[lane.lane] : 0;
  const float lane_largest = CENTERED && lane.lane < groups ? center.largest[lane.lane] : 0;
  const auto centered = [&](float v, float origin) {
    return (v - origin) + center.excess * (2 * origin - v);
  };
  float2 first[kHeld] = {};  // of the pairs
  if (held > 0) {
    float2 origin[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      // A thread without a pair takes the last one again, which does not change the maximum.
      const int pair = thread + i * kSplitThreads, loaded = pair < held ? pair : held - 1;
      first[i] = reinterpret_cast<const float2*>(x)[loaded];
      if (CENTERED) origin[i] = reinterpret_cast<const float2*>(center.at)[loaded];
    }
    if (CENTERED)
      for (int i = 0; i < kHeld; ++i)
        first[i].x = centered(first[i].x, origin[i].x),
        first[i].y = centered(first[i].y, origin[i].y);
  }
  const auto value = [&](int feature) {
    if (feature >= center.features) return 0.0f;
    return CENTERED ? centered(x[feature], center.at[feature]) : x[feature];
  };
  const auto values = [&](int pair) { return float2{value(2 * pair), value(2 * pair + 1)}; };
  float largest = 0;
  const auto compare = [&](float2 v) { largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y))); };
  for (const float2 v : first) compare(v);
#pragma unroll 4
  for (int pair = held + thread; pair < pairs; pair += kSplitThreads) compare(values(pair));
  largest = largest_of_warp(largest);
  const float spread = largest_of(center.spread, groups, lane_spread, lane);
  const float largest_value = CENTERED ? largest_of(center.largest, groups, lane_largest, lane) : 0;
  if (lane.lane == 0) shared.most[lane.warp] = largest;
  __syncthreads();
  for (const float most : shared.most) largest = fmaxf(largest, most);
  const float y_scale = scale_to(spread, kReferencePower), x_scale = scale_to(largest, kQueryPower);
  const float value_scale = scale_to(largest_value, kValuePower);

  auto* high = reinterpret_cast<std::uint32_t*>(out.high + row * center.width);
  auto* low = reinterpret_cast<std::uint32_t*>(out.low + row * center.width);
  TwoFloats squares = {};
  const auto store = [&](int pair, float2 v) {
    v.x *= x_scale, v.y *= x_scale;
    const TwoHalves parts = split_halves(v.x, v.y);
    high[pair] = parts.high, low[pair] = parts.low;
    if (CENTERED) squares.add_product(v.x, v.x), squares.add_product(v.y, v.y);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int pair = thread + i * kSplitThreads;
    if (pair < held) store(pair, first[i]);
  }
#pragma unroll 4
  for (int pair = held + thread; pair < pairs; pair += kSplitThreads) store(pair, values(pair));
  if (thread == 0) {
    out.units[row] = inverse_powers(x_scale, y_scale);
    if (CENTERED && row == 0) {
      center.scale[0] = y_scale, center.scale[1] = inverse_power(y_scale);
      center.value_scale[0] = value_scale, center.value_scale[1] = inverse_power(value_scale);
    }
  }
  if (!CENTERED) return;
  const int step = rows.count * kSplitThreads;
#pragma unroll 1
  for (int i = static_cast<int>(row) * kSplitThreads + thread; i < center.width; i += step)
    center.scaled[i] = center.at[i] * y_scale;
  TwoFloats norm[1] = {squares};
  sum_over_block<kSplitThreads>(norm, shared.squares);
  if (thread == 0)
    norms[row] = (1 + 2.0 * center.excess) * norm[0].sum() * inverse_powers(x_scale, x_scale);
}

}  // namespace
}  // namespace pfgm
