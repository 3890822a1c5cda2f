// Weighted sums over references, on CUDA devices.
//
// A block stages only references that are listed (cuda/lists.h). The main loop (cuda/warp_sums.h)
// adds up their products with the weights of a group of queries, panel after panel.
#pragma once
#include "cuda/warp_sums.h"

namespace pfgm {
namespace {

// sums[part][query][feature] = Σ_j w_j y_j / divisor over one part of the list of the query's
// group, whose number is blockIdx.z. `divisor` is a power of two with which no sum of M weighted
// values overflows. Float32 weights have been divided by it. Halves have been multiplied by
// kWeightUnit; then `weight_unit` is 1/(kWeightUnit · divisor).
template <class R, bool HALVES>
__global__ void __launch_bounds__(kSumThreads, 2)
    weighted_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                 const int* order, const Lists lists, const Parts parts) {
  using Loop = WarpSums<R, HALVES>;
  auto& shared = *reinterpret_cast<typename Loop::Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x);
  // The last queries of the order have most weights. Their blocks start first.
  const int group = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  const int part = static_cast<int>(blockIdx.z), first_panel = part * parts.panels;
  const int listed = divide_up32(lists.counts[group], kPanel) - first_panel;
  const int panels = listed < parts.panels ? listed : parts.panels;
  if (panels <= 0) return;
  const int query0 = kSumRows * group, queries_left = parts.queries - query0;
  const Index first = group * lists.stride + first_panel * kPanel;
  if (thread < kSumRows) {
    const int rank = query0 + (thread < queries_left ? thread : 0);
    shared.queries[thread] = order ? order[rank] : rank;
  }
  for (int i = thread; i < panels * kPanel; i += kSumThreads)
    shared.listed[i] = static_cast<std::uint16_t>(lists.listed[first + i]);
  __syncthreads();

  Loop loop(shared, y, features, panels, lists.weights + kSumRows * first, scale);
  loop.run();
  float unit = HALVES ? weight_unit : 1, per_value = Loop::kScaled ? scale[1] : 1;
  if constexpr (Loop::kScaled) {
    const int lost = loop.holds(per_value) ? 0 : 1;
    if (over_block<kSumThreads>(lost, shared.scratch, Most()) != 0) {
      loop.run_in_floats(weight_unit);
      unit = per_value = 1;
    }
  }

  const int feature = kSumFeatures * static_cast<int>(blockIdx.x) + 32 * lane.warp + 4 * lane.g;
  const int left = features - feature;
  char* const to = reinterpret_cast<char*>(
      parts.sums + static_cast<Index>(part) * parts.queries * features + feature);
  const auto bytes = static_cast<std::uint32_t>(features) * 4;  // 32 bits: see ListedCopy
#pragma unroll
  for (int n = 0; n < kSumTiles; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= queries_left) continue;
      const auto query = static_cast<std::uint32_t>(shared.queries[q]);
      float* const out = reinterpret_cast<float*>(to + std::uint64_t{query} * bytes);
      float v[4];  // in two factors: the product of the units may be too small for float32
      for (int f = 0; f < 4; ++f) v[f] = kUnit<R> * unit * loop.sum(f, n, odd) * per_value;
      if (features % 4 == 0) {
        if (left > 0) store_values(out, v);
      } else {
        for (int f = 0; f < 4; ++f)
          if (left > f) out[f] = v[f];
      }
    }
}

}  // namespace
}  // namespace pfgm
