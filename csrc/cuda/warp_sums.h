// Sums over listed rows with the products of warps: what a block stages of the rows and their
// weights, and the products of a panel with the accuracy of float32.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kSumThreads = kSumFeatures;

// Weights in halves are multiplied by it. The largest weight is then far from overflow, and others
// are off by at most 2^-39 of it.
constexpr float kWeightUnit = 0x1p14f;

// Whether halves hold a feature to about 2^-20 of its largest value, in units of `unit`. float16
// ends at 65504 and at steps of 2^-24.
__device__ inline bool halves_hold(float largest, float unit) {
  return largest == 0 || (largest >= 0x1p-5f * unit && largest <= 65504 * unit);
}

// Between staged rows: 32 bytes more than a multiple of the 32 banks, so that the accesses of a
// warp lie in different banks.
template <class T> constexpr int kSumPitch = kSumFeatures + 32 / sizeof(T);

// Copies kSumFeatures values of listed rows, from `feature` on. A thread copies the same piece of
// each of its rows. Values after the last feature become zero.
template <class Memory>
class ListedCopy {
 public:
  using T = typename Memory::Value;
  using Place = typename Memory::Place;

  __device__ ListedCopy(Memory& shared, const Rows<T>& rows, Index first, int feature, int features)
      : rows_(rows), whole_(rows.aligned && features % kCount == 0) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, piece_ = thread % kPieces;
    const int known = features - feature - piece_ * kCount;
    known_ = known < 0 ? 0 : known < kCount ? known : kCount;
    from_ = rows.row(first) + feature + piece_ * kCount;
    if (known_ > 0) return;
#pragma unroll 1
    for (int slot = 0; slot < Memory::kStages; ++slot)
#pragma unroll 1
      for (int row = row_; row < kPanel; row += kStep)
        *reinterpret_cast<uint4*>(&shared.rows[slot][row][piece_ * kCount]) = {};
  }

  // Starts the copies of the panel whose indices are at `listed`.
  __device__ void panel(Memory& shared, int slot, const Place* listed) const {
    if (known_ == 0) return;
    T* const to = &shared.rows[slot][row_][piece_ * kCount];
    if (whole_) {
      // The product of two 32-bit numbers is one instruction, that of 64-bit numbers several.
      const auto bytes = static_cast<std::uint32_t>(rows_.stride * sizeof(T));
      const auto* const from = reinterpret_cast<const char*>(from_);
      std::uint32_t places[kPanel / kStep];  // all are read before the first copy begins
      for (int i = 0; i < kPanel / kStep; ++i)
        places[i] = static_cast<std::uint32_t>(listed[row_ + i * kStep]);
#pragma unroll
      for (int i = 0; i < kPanel / kStep; ++i)
        copy_async<16>(to + i * kStep * kSumPitch<T>,
                       from + static_cast<std::uint64_t>(places[i]) * bytes);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kPanel; i += kStep)
      for (int k = 0; k < kCount; ++k)
        to[i * kSumPitch<T> + k] = k < known_ ? from_[listed[row_ + i] * rows_.stride + k] : T{};
  }

 private:
  static constexpr int kCount = 16 / sizeof(T), kPieces = kSumFeatures / kCount;
  static constexpr int kStep = kSumThreads / kPieces;
  static_assert(kPanel % kStep == 0, "every thread copies as many rows");
  const T* from_;
  const Rows<T>& rows_;
  const bool whole_;
  int row_, piece_, known_;
};

// ---- products --------------------------------------------------------------------------------

// v as the sum of two TF32 numbers: the nearest one and the rest. The matrix unit cuts off the last
// bit of the rest. If v is not finite, the rest is not finite either.
struct Split {
  std::uint32_t big, small;
};

__device__ inline Split split(float v) {
  const std::uint32_t big = (bits_of(v) + 0x1000u) & 0xffffe000u;
  return {big, bits_of(v - float_of(big))};
}

// Operands of multiply_add, in two parts. If SHORT, values of A are TF32 numbers themselves.
template <bool SHORT>
struct OperandA {
  std::uint32_t big[4], small[4];

  __device__ void set(int i, float v) {
    if constexpr (SHORT) {
      big[i] = bits_of(v);
    } else {
      const Split parts = split(v);
      big[i] = parts.big, small[i] = parts.small;
    }
  }
};

struct OperandB {
  std::uint32_t big[2], small[2];

  __device__ void set(int i, float v) {
    const Split parts = split(v);
    big[i] = parts.big, small[i] = parts.small;
  }
};

template <bool SHORT>
__device__ inline void add_product(float (&d)[4], const OperandA<SHORT>& a, const OperandB& b) {
  if constexpr (!SHORT) multiply_add(d, a.small, b.big);
  multiply_add(d, a.big, b.small);
  multiply_add(d, a.big, b.big);
}

// Adds Σ reference[feature] · weight[query] over the staged references. The result has 32 features,
// lane g has features 4g to 4g + 3, by 8 queries a tile: sum[i][n][e] is feature 4g + 2i + e/2,
// query 8n + 2t + e % 2. weights(n, s) returns the weights of query 8n + g for references 8s + t
// and 8s + t + 4.
template <int REFERENCES, int TILES, int PITCH, class R, class Weights>
__device__ inline void add_weighted(float (&sum)[2][TILES][4], const R* references,
                                    const Weights& weights, const Lane& lane) {
  float panel[2][TILES][4] = {};
#pragma unroll
  for (int step = 0; step < REFERENCES; step += 8) {
    OperandB weight[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float2 v = weights(n, step / 8);
      weight[n].set(0, v.x), weight[n].set(1, v.y);
    }
    float of[2][4];
    for (int e = 0; e < 2; ++e)
      load4(references + (step + 4 * e + lane.t) * PITCH + 4 * lane.g, of[e]);
    OperandA<kShort<R>> feature[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 4; ++e) feature[i].set(e, of[e / 2][2 * i + e % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < TILES; ++n) add_product(panel[i][n], feature[i], weight[n]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int n = 0; n < TILES; ++n)
      for (int e = 0; e < 4; ++e) sum[i][n][e] += panel[i][n][e];
}

// ---- products of float16 parts ---------------------------------------------------------------

// The weight of a query and a reference of a panel in halves.
__device__ inline float weight_of_halves(const float* weights, int query, int reference) {
  const int n = query / 8, lane = 4 * (query % 8) + reference % 4;
  const int step = reference / 16, i = reference / 4 % 4;
  const auto of = [&](int s) {
    const float word = weights[pair_place(n, 2 * step + s, lane) + i / 2];
    return half_of_word(bits_of(word), i % 2);
  };
  return of(1) + of(0);
}

// Adds Σ reference[feature] · weight[query] over a panel of staged references, as add_weighted
// does. References are multiplied by `factor` before they are cut into halves; weights are pairs of
// halves. `largest` keeps the largest reference of each of the lane's features. If EXACT,
// float16 holds references as they are. Weights of Rounded references have no low part.
template <bool EXACT, int TILES, int PITCH, class R>
__device__ inline void add_weighted_halves(float (&sum)[2][TILES][4], const R* references,
                                           const float* weights, float factor, float (&largest)[4],
                                           const Lane& lane) {
  constexpr int kSteps = kPanel / 16;
  std::uint32_t big[kSteps][2][4], small[kSteps][2][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    for (int pair = 0; pair < 2; ++pair) {
      // This lane's terms of the instruction are those of references first + 4i.
      const int first = 16 * step + lane.t;
      float v[2][4];
      for (int e = 0; e < 2; ++e) {
        load4(references + (first + 8 * pair + 4 * e) * PITCH + 4 * lane.g, v[e]);
        if constexpr (!EXACT)
          for (int f = 0; f < 4; ++f)
            largest[f] = fmaxf(largest[f], fabsf(v[e][f])), v[e][f] *= factor;
      }
      for (int f = 0; f < 4; ++f) {
        const TwoHalves parts = split_halves(v[0][f], v[1][f]);
        big[step][f / 2][2 * pair + f % 2] = parts.high;
        small[step][f / 2][2 * pair + f % 2] = parts.low;
      }
    }
  constexpr bool kLowWeights = !kRounded<R>, kLowValues = !EXACT;
  // Products of four sums take turns, so that none waits for another.
#pragma unroll
  for (int n0 = 0; n0 < TILES; n0 += 2) {
    float panel[2][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t high[2][2], low[2][2];
      const auto load = [&](std::uint32_t (&words)[2], int n, int s) {
        const uint2 pair =
            *reinterpret_cast<const uint2*>(weights + pair_place(n0 + n, s, lane.lane));
        words[0] = pair.x, words[1] = pair.y;
      };
      for (int n = 0; n < 2; ++n) load(low[n], n, 2 * step);
      for (int n = 0; n < 2; ++n) load(high[n], n, 2 * step + 1);
      const auto each = [&](auto multiply) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < 2; ++i) multiply(panel[i][n], i, n);
      };
      bool first = step == 0;  // of the panel
      const auto add = [&](float (&d)[4], const std::uint32_t (&a)[4],
                           const std::uint32_t (&b)[2]) {
        if (first)
          multiply_halves(d, a, b);
        else
          multiply_add_halves(d, a, b);
      };
      if constexpr (kLowWeights) {
        each([&](float (&d)[4], int i, int n) { add(d, big[step][i], low[n]); });
        first = false;
      }
      if constexpr (kLowValues) {
        each([&](float (&d)[4], int i, int n) { add(d, small[step][i], high[n]); });
        first = false;
      }
      each([&](float (&d)[4], int i, int n) { add(d, big[step][i], high[n]); });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < 2; ++n)
        for (int e = 0; e < 4; ++e) sum[i][n0 + n][e] += panel[i][n][e];
  }
}

// The same for references that float16 cannot hold, in float32. Weights are multiplied by `factor`.
template <int TILES, int PITCH, class R>
__device__ inline void add_weighted_floats(float (&sum)[2][TILES][4], const R* references,
                                           const float* weights, float factor, const Lane& lane) {
#pragma unroll 1
  for (int reference = 0; reference < kPanel; ++reference) {
    float v[4];
    load4(references + reference * PITCH + 4 * lane.g, v);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      for (int odd = 0; odd < 2; ++odd) {
        const int query = 8 * n + 2 * lane.t + odd;
        const float weight = weight_of_halves(weights, query, reference) * factor;
        for (int f = 0; f < 4; ++f) sum[f / 2][n][f % 2 * 2 + odd] += weight * v[f];
      }
  }
}

}  // namespace
}  // namespace pfgm
