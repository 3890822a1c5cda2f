// Weighted sums over listed rows with the products of warps, to the accuracy of float32: the main
// loop of `weighted_sum` (cuda/weighted_sums.h) and of `reference_gradient`.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kSumThreads = kSumFeatures, kSumTiles = kSumRows / 8;

// Between staged rows: 32 bytes more than a multiple of the 32 banks, so that the accesses of a
// warp lie in different banks.
template <class T> constexpr int kSumPitch = kSumFeatures + 32 / sizeof(T);

// Copies kSumFeatures values of listed rows, from `feature` on. A thread copies the same vector of
// all its rows. Values after the last feature become zero.
template <class Memory>
class ListedCopy {
 public:
  using T = typename Memory::Value;

  __device__ ListedCopy(Memory& shared, const Rows<T>& rows, int feature, int features)
      : rows_(rows), whole_(rows.aligned && features % kCount == 0) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kVectors, vector_ = thread % kVectors;
    const int left = features - feature - vector_ * kCount;
    count_ = left < 0 ? 0 : left < kCount ? left : kCount;
    from_ = rows.row(0) + feature + vector_ * kCount;
    if (count_ > 0) return;
#pragma unroll 1
    for (int slot = 0; slot < Memory::kStages; ++slot)
#pragma unroll 1
      for (int row = row_; row < kPanel; row += kStep)
        *reinterpret_cast<uint4*>(&shared.rows[slot][row][vector_ * kCount]) = {};
  }

  // Starts the copies of the panel whose indices are at `listed`.
  __device__ void panel(Memory& shared, int slot, const std::uint16_t* listed) const {
    if (count_ == 0) return;
    T* const to = &shared.rows[slot][row_][vector_ * kCount];
    if (whole_) {
      // The product of two 32-bit numbers is one instruction, that of 64-bit numbers several.
      const auto bytes = static_cast<std::uint32_t>(rows_.stride * sizeof(T));
      const auto* const from = reinterpret_cast<const char*>(from_);
      std::uint32_t indices[kPanel / kStep];  // all are read before the first copy begins
      for (int i = 0; i < kPanel / kStep; ++i)
        indices[i] = static_cast<std::uint32_t>(listed[row_ + i * kStep]);
#pragma unroll
      for (int i = 0; i < kPanel / kStep; ++i)
        copy_async<16>(to + i * kStep * kSumPitch<T>,
                       from + static_cast<std::uint64_t>(indices[i]) * bytes);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kPanel; i += kStep)
      for (int k = 0; k < kCount; ++k)
        to[i * kSumPitch<T> + k] = k < count_ ? from_[listed[row_ + i] * rows_.stride + k] : T{};
  }

 private:
  static constexpr int kCount = 16 / sizeof(T), kVectors = kSumFeatures / kCount;
  static constexpr int kStep = kSumThreads / kVectors;
  static_assert(kPanel % kStep == 0, "every thread copies as many rows");
  const T* from_;
  const Rows<T>& rows_;
  const bool whole_;
  int row_, vector_, count_;
};

// ---- products --------------------------------------------------------------------------------

// v as the sum of two TF32 numbers: the nearest one and the rest. The matrix unit cuts off the last
// bit of the rest. If v is not finite, the rest is not finite either.
struct Split {
  std::uint32_t high, low;
};

__device__ inline Split split(float v) {
  const std::uint32_t high = (bits_of(v) + 0x1000u) & 0xffffe000u;
  return {high, bits_of(v - float_of(high))};
}

// Operands of multiply_add, in two parts. If SHORT, values of A are TF32 numbers themselves.
template <bool SHORT>
struct OperandA {
  std::uint32_t high[4], low[4];

  __device__ void set(int i, float v) {
    if constexpr (SHORT) {
      high[i] = bits_of(v);
    } else {
      const Split parts = split(v);
      high[i] = parts.high, low[i] = parts.low;
    }
  }
};

struct OperandB {
  std::uint32_t high[2], low[2];

  __device__ void set(int i, float v) {
    const Split parts = split(v);
    high[i] = parts.high, low[i] = parts.low;
  }
};

template <bool SHORT>
__device__ inline void add_product(float (&d)[4], const OperandA<SHORT>& a, const OperandB& b) {
  if constexpr (!SHORT) multiply_add(d, a.low, b.high);
  multiply_add(d, a.high, b.low);
  multiply_add(d, a.high, b.high);
}

// Adds Σ reference[feature] · weight[query] over a panel of staged references. The result has 32
// features, lane g has features 4g to 4g + 3, by 8 queries a tile: sum[i][n][e] is feature 4g + 2i
// + e/2, query 8n + 2t + e % 2. Weights lie in pairs (weight_offset).
template <int TILES, int PITCH, class R>
__device__ inline void add_weighted(float (&sum)[2][TILES][4], const R* references,
                                    const float* weights, const Lane& lane) {
  float panel[2][TILES][4] = {};
#pragma unroll
  for (int step = 0; step < kPanel; step += 8) {
    OperandB weight[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float2 v =
          *reinterpret_cast<const float2*>(weights + weight_offset(n, step / 8, lane.lane));
      weight[n].set(0, v.x), weight[n].set(1, v.y);
    }
    float values[2][4];
    for (int e = 0; e < 2; ++e)
      load4(references + (step + 4 * e + lane.t) * PITCH + 4 * lane.g, values[e]);
    OperandA<kShort<R>> feature[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 4; ++e) feature[i].set(e, values[e / 2][2 * i + e % 2]);
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
  const auto half = [&](int s) {
    const float word = weights[weight_offset(n, 2 * step + s, lane) + i / 2];
    return half_of_word(bits_of(word), i % 2);
  };
  return half(1) + half(0);
}

// Adds Σ reference[feature] · weight[query] over a panel of staged references, as add_weighted
// does. References are multiplied by `factor` before they are cut into halves; weights are pairs of
// halves. `largest` keeps the largest reference of each of the lane's features. If EXACT,
// float16 holds references as they are.
template <bool EXACT, int TILES, int PITCH, class R>
__device__ inline void add_weighted_halves(float (&sum)[2][TILES][4], const R* references,
                                           const float* weights, float factor, float (&largest)[4],
                                           const Lane& lane) {
  constexpr int kSteps = kPanel / 16;
  std::uint32_t high_values[kSteps][2][4], low_values[kSteps][2][4];
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
        high_values[step][f / 2][2 * pair + f % 2] = parts.high;
        low_values[step][f / 2][2 * pair + f % 2] = parts.low;
      }
    }
  // Products of four sums take turns, so that none waits for another.
#pragma unroll
  for (int n0 = 0; n0 < TILES; n0 += 2) {
    float panel[2][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t high[2][2], low[2][2];
      const auto load = [&](std::uint32_t (&words)[2], int n, int s) {
        const uint2 pair =
            *reinterpret_cast<const uint2*>(weights + weight_offset(n0 + n, s, lane.lane));
        words[0] = pair.x, words[1] = pair.y;
      };
      for (int n = 0; n < 2; ++n) load(low[n], n, 2 * step);
      for (int n = 0; n < 2; ++n) load(high[n], n, 2 * step + 1);
      const auto each = [&](auto multiply) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < 2; ++i) multiply(panel[i][n], i, n);
      };
      each([&](float (&d)[4], int i, int n) {
        if (step == 0)
          multiply_halves(d, high_values[step][i], low[n]);
        else
          multiply_add_halves(d, high_values[step][i], low[n]);
      });
      if constexpr (!EXACT)
        each([&](float (&d)[4], int i, int n) {
          multiply_add_halves(d, low_values[step][i], high[n]);
        });
      each([&](float (&d)[4], int i, int n) {
        multiply_add_halves(d, high_values[step][i], high[n]);
      });
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

// ---- the main loop -----------------------------------------------------------------------------

// Σ w y over one part of the list of a group, for kSumFeatures features. A warp has 32 features and
// all queries. Weights are float32 numbers, or halves if HALVES.
template <class R, bool HALVES>
class WarpSums {
 public:
  static constexpr bool kScaled = HALVES && !kExactHalf<R>;  // references are scaled, then split

  struct Memory {
    using Value = R;
    static constexpr int kStages = 2;
    R rows[kStages][kPanel][kSumPitch<R>];
    float weights[kStages][kPanel * kSumRows];
    std::uint16_t listed[kPanel * kPartPanels];
    int scratch[kSumThreads / 32];
    int queries[kSumRows];
  };

  // `weights` are those of the part, which has so many panels; `scale` is the factor of references.
  __device__ WarpSums(Memory& shared, const Rows<R>& y, int features, int panels,
                      const float* weights, const float* scale)
      : shared_(shared),
        copy_(shared, y, kSumFeatures * static_cast<int>(blockIdx.x), features),
        weights_(weights + 4 * static_cast<int>(threadIdx.x)),
        panels_(panels),
        factor_(kScaled ? scale[0] : 1) {}

  __device__ void run() {
    each_panel([&](int slot) {
      if constexpr (HALVES)
        add_weighted_halves<kExactHalf<R>, kSumTiles, kSumPitch<R>>(
            sum_, values(slot), shared_.weights[slot], factor_, largest_, lane_);
      else
        add_weighted<kSumTiles, kSumPitch<R>>(sum_, values(slot), shared_.weights[slot], lane_);
    });
  }

  // Whether halves hold the thread's features.
  __device__ bool holds(float per_factor) const {
    bool hold = true;
    for (float value : largest_) hold = hold && halves_hold(value, per_factor);
    return hold;
  }

  // The same sums without halves of the references. Weights are multiplied by `unit`.
  __device__ void run_in_floats(float unit) {
    for (auto& features : sum_)
      for (auto& tile : features)
        for (float& value : tile) value = 0;
    each_panel([&](int slot) {
      add_weighted_floats<kSumTiles, kSumPitch<R>>(sum_, values(slot), shared_.weights[slot], unit,
                                                   lane_);
    });
  }

  // The sum of feature 32 warp + 4g + f of the block and query 8n + 2t + odd.
  __device__ float sum(int f, int n, int odd) const { return sum_[f / 2][n][f % 2 * 2 + odd]; }

 private:
  __device__ const R* values(int slot) const { return shared_.rows[slot][0] + 32 * lane_.warp; }

  template <class Body>
  __device__ void each_panel(const Body& body) {
    constexpr int kPanelWeights = kPanel * kSumRows;
    pipeline<Memory::kStages>(
        panels_,
        [&](int p, int slot) {
          copy_.panel(shared_, slot, shared_.listed + p * kPanel);
#pragma unroll
          for (int i = 0; i < kPanelWeights; i += 4 * kSumThreads)
            copy_async<16>(&shared_.weights[slot][i + 4 * static_cast<int>(threadIdx.x)],
                           weights_ + (p * kPanelWeights + i));
        },
        [&](int, int slot) { body(slot); });
  }

  Memory& shared_;
  const ListedCopy<Memory> copy_;
  const float* const weights_;
  const int panels_;
  const float factor_;
  const Lane lane_ = this_lane();
  float sum_[2][kSumTiles][4] = {}, largest_[4] = {};
};
// The driver takes 1 KiB more for each block. So cards with 100 KiB hold two blocks.
static_assert(sizeof(WarpSums<float, true>::Memory) <= 49 << 10, "every card holds two blocks");

}  // namespace
}  // namespace pfgm
