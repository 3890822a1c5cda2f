// Lanes of a warp, and sums over warps and blocks.
#pragma once
#include "cuda/arithmetic.h"

namespace pfgm {
namespace {

constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

// g and t are those of the operands of products (cuda/intrinsics.h).
struct Lane {
  int warp, lane, g, t;
};

__device__ inline Lane this_lane() {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  return {thread / 32, lane, lane / 4, lane % 4};
}

template <class T, class Combine>
__device__ inline T over_warp(T value, Combine combine) {
  for (int apart = 16; apart > 0; apart /= 2)
    value = combine(value, __shfl_xor_sync(kAll, value, apart));
  return value;
}

// Combines values of all THREADS threads of the block in a fixed order. All threads get the result.
// `scratch` holds one value per warp.
template <int THREADS, class T, class Combine>
__device__ inline T over_block(T value, T* scratch, Combine combine) {
  const Lane lane = this_lane();
  value = over_warp(value, combine);
  if (lane.lane == 0) scratch[lane.warp] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; ++w) value = combine(value, scratch[w]);
  __syncthreads();
  return value;
}

// Σ over the lanes of a warp, in two floats. All lanes get the same bits.
__device__ inline TwoFloats over_warp(TwoFloats sum) {
  for (int apart = 16; apart > 0; apart /= 2)
    sum = sum_of(sum,
                 {__shfl_xor_sync(kAll, sum.high, apart), __shfl_xor_sync(kAll, sum.low, apart)});
  return sum;
}

// Σ over the block's threads of each of COUNT values, for its first thread. All threads call this.
// `scratch` has COUNT places for each warp.
template <int THREADS, int COUNT>
__device__ inline void sum_over_block(TwoFloats (&sums)[COUNT], TwoFloats* scratch) {
  const Lane lane = this_lane();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sums[i] = over_warp(sums[i]);
    if (lane.lane == 0) scratch[COUNT * lane.warp + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int w = 1; w < THREADS / 32; ++w)
    for (int i = 0; i < COUNT; ++i) sums[i] = sum_of(sums[i], scratch[COUNT * w + i]);
}

// The smallest of 64-bit integers over a warp.
__device__ inline std::int64_t least_of_warp(std::int64_t value) {
  const int front = static_cast<int>(value >> 32);
  const int least = __reduce_min_sync(kAll, front);
  const auto rest = static_cast<std::uint32_t>(value);
  const std::uint32_t least_rest = __reduce_min_sync(kAll, front == least ? rest : ~0u);
  return static_cast<std::int64_t>(least) * (std::int64_t{1} << 32) + least_rest;
}

// The largest of a warp's values, none of which is negative. Their bits have the order of the
// values.
__device__ inline float largest_of_warp(float value) {
  return float_of(
      static_cast<std::uint32_t>(-__reduce_min_sync(kAll, -static_cast<int>(bits_of(value)))));
}

// Σ over the lanes t of a group of four.
template <class T>
__device__ inline T over_quad(T value) {
  value += __shfl_xor_sync(kAll, value, 1);
  return value + __shfl_xor_sync(kAll, value, 2);
}

// All threads of a warp call this. Returns how many weights of the warp are not zero. One lane
// stores their bits.
__device__ inline int mark_live(std::uint32_t* word, bool stores, bool counts) {
  const unsigned bits = __ballot_sync(kAll, counts);
  if (stores) *word = bits;
  return __popc(bits);
}

}  // namespace
}  // namespace pfgm
