// Weighted sums over references, on CUDA devices.
//
// A block stages only references that are listed (cuda/lists.h).
#pragma once
#include "cuda/warp_sums.h"

namespace pfgm {
namespace {

constexpr int kSumBlocks = 2;  // whose registers a multiprocessor must hold

// Of a block of weighted_sum with a group of ROWS queries.
template <class T, int ROWS>
struct SumMemory {
  using Value = T;
  using Place = std::uint16_t;  // of a reference in a chunk
  static constexpr int kStages = 2;
  T rows[kStages][kPanel][kSumPitch<T>];
  float weights[kStages][kPanel * ROWS];
  Place listed[kPanel * kPartPanels];
  int scratch[kSumThreads / 32];
  int queries[ROWS];
};
// The driver takes 1 KiB more for each block. So GeForce cards hold two blocks in 100 KiB.
static_assert(sizeof(SumMemory<float, kSumRows>) <= 49 << 10, "GeForce cards hold two blocks");

// sums[part][query][feature] = Σ_j w_j y_j / divisor over one part of the list of the query's
// group. `divisor` is a power of two with which no sum of M weighted values overflows; weights have
// been divided by it. If HALVES, they are halves instead, times kWeightUnit, and 1 over kWeightUnit
// · divisor is `weight_unit`.
template <class R, int ROWS, bool HALVES>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    weighted_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                 const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
  using Memory = SumMemory<R, ROWS>;
  constexpr int kTiles = ROWS / 8, kPanelWeights = kPanel * ROWS;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x);
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  // The last queries of the order have most weights. Their blocks start first.
  const int group = static_cast<int>(gridDim.y - 1 - blockIdx.y), query0 = ROWS * group;
  const int first = static_cast<int>(blockIdx.z) * parts.panels * kPanel;
  const int left = lists.counts[group] - first;
  if (left <= 0) return;  // the same for all threads
  const int count = static_cast<int>(smaller(left, parts.panels * kPanel));
  const int panels = static_cast<int>(divide_up(count, kPanel));
  if (thread < ROWS) {
    const int place = query0 + (query0 + thread < parts.queries ? thread : 0);
    shared.queries[thread] = order ? order[place] : place;
  }
  const Index list = group * lists.stride + first;
  const int* const listed = lists.listed + list;
  for (int i = thread; i < panels * kPanel; i += kSumThreads)
    shared.listed[i] = static_cast<typename Memory::Place>(listed[i]);
  __syncthreads();

  const ListedCopy<Memory> copy(shared, y, 0, feature0, features);
  const float* const weights_at = lists.weights + (ROWS * list + 4 * thread);
  const auto stage = [&](int p, int slot) {
    copy.panel(shared, slot, shared.listed + p * kPanel);
#pragma unroll
    for (int i = 0; i < kPanelWeights; i += 4 * kSumThreads)
      copy_async<16>(&shared.weights[slot][i + 4 * thread], weights_at + (p * kPanelWeights + i));
  };

  float sum[2][kTiles][4] = {};
  const int own = 32 * lane.warp;
  const auto values = [&](int slot) { return shared.rows[slot][0] + own; };
  constexpr bool kScaled = HALVES && !kExactHalf<R>;
  const float factor = kScaled ? scale[0] : 1;
  float largest[4] = {}, unit = HALVES ? weight_unit : 1, per_factor = kScaled ? scale[1] : 1;
  pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
    if constexpr (HALVES)
      add_weighted_halves<kExactHalf<R>, kTiles, kSumPitch<R>>(
          sum, values(slot), shared.weights[slot], factor, largest, lane);
    else
      add_weighted<kPanel, kTiles, kSumPitch<R>>(
          sum, values(slot),
          [&](int n, int s) {
            return *reinterpret_cast<const float2*>(
                &shared.weights[slot][pair_place(n, s, lane.lane)]);
          },
          lane);
  });
  if constexpr (kScaled) {
    bool hold = true;
    for (float value : largest) hold = hold && halves_hold(value, per_factor);
    if (over_block<kSumThreads>(hold ? 0 : 1, shared.scratch, Most()) != 0) {
      for (auto& features : sum)
        for (auto& tile : features)
          for (float& value : tile) value = 0;
      pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
        add_weighted_floats<kTiles, kSumPitch<R>>(sum, values(slot), shared.weights[slot],
                                                  weight_unit, lane);
      });
      unit = per_factor = 1;
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (query0 + q >= parts.queries) continue;
      const Index row = static_cast<Index>(blockIdx.z) * parts.queries + shared.queries[q];
      float* out = parts.sums + row * features;
      // In two steps: the product of the units may be too small for float32.
      float v[4];
      for (int f = 0; f < 4; ++f)
        v[f] = kUnit<R> * unit * sum[f / 2][n][f % 2 * 2 + odd] * per_factor;
      const int feature = feature0 + own + 4 * lane.g;
      if (features % 4 == 0) {
        if (feature < features) store_values(out + feature, v);
      } else {
        for (int f = 0; f < 4; ++f)
          if (feature + f < features) out[feature + f] = v[f];
      }
    }
}

}  // namespace
}  // namespace pfgm
