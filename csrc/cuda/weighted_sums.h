// Weighted sums over references, on CUDA devices.
//
// A block stages only references that are listed (cuda/lists.h). A main loop adds up their products
// with the weights of a group of queries, panel after panel: WarpSums or, on sm_90a and for many
// queries, WarpgroupSums.
#pragma once
#include "cuda/warp_sums.h"
#include "cuda/warpgroup_sums.h"

namespace pfgm {
namespace {

// Loads the queries of a segment's group, and the references that its panels list.
template <class Loop>
__device__ inline void load_listed(typename Loop::Memory& shared, const Segment& segment,
                                   const int* order, const int* listed, int queries) {
  const int thread = static_cast<int>(threadIdx.x), query0 = Loop::kRows * segment.group;
  if (thread < Loop::kRows) {
    const int place = query0 + (query0 + thread < queries ? thread : 0);
    shared.queries[thread] = order ? order[place] : place;
  }
  for (int i = thread; i < segment.panels * kPanel; i += Loop::kThreads)
    shared.listed[i] = static_cast<std::uint16_t>(listed[i]);
  __syncthreads();
}

// Stores the sums of a segment, in two factors: the product of the units may be too small for
// float32.
template <class Loop>
__device__ inline void store_segment(const typename Loop::Memory& shared, const Loop& loop,
                                     const Segment& segment, float unit, float per_value,
                                     int features, const Parts& parts) {
  constexpr int kRun = Loop::kRun;
  const Lane lane = this_lane();
  const int known = parts.queries - Loop::kRows * segment.group;
  const int feature0 = Loop::kFeatures * segment.slice + 32 * lane.warp + kRun * lane.g;
  const Index rows = parts.queries, row0 = segment.part * rows;
  char* const part = reinterpret_cast<char*>(parts.sums + row0 * features + feature0);
  const auto bytes = static_cast<std::uint32_t>(features) * 4;  // 32 bits: see ListedCopy
#pragma unroll
  for (int n = 0; n < Loop::kRows / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= known) continue;
      const auto query = static_cast<std::uint32_t>(shared.queries[q]);
      float* const out = reinterpret_cast<float*>(part + std::uint64_t{query} * bytes);
      for (int i = 0; i < Loop::kRuns; ++i) {
        const int left = features - feature0 - 16 * i;
        float v[kRun];
        for (int f = 0; f < kRun; ++f)
          v[f] = kUnit<typename Loop::Reference> * unit * loop.sum(i, f, n, odd) * per_value;
        if (features % kRun == 0) {
          if (left > 0) store_values(out + 16 * i, v);
        } else {
          for (int f = 0; f < kRun; ++f)
            if (left > f) out[16 * i + f] = v[f];
        }
      }
    }
}

// sums[part][query][feature] = Σ_j w_j y_j / divisor over one part of the list of the query's
// group. `divisor` is a power of two with which no sum of M weighted values overflows. Float32
// weights have been divided by it. Halves have been multiplied by kWeightUnit; then `weight_unit`
// is 1/(kWeightUnit · divisor).
template <class Loop>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kBlocks)
    weighted_sum(const Rows<typename Loop::Reference> y, int features, const float* scale,
                 float weight_unit, const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
  if constexpr (Loop::is_unused()) {
    __trap();
  } else {
    auto& shared = *reinterpret_cast<typename Loop::Memory*>(shared_memory());
    const typename Loop::Work work(lists, parts, this_lane());
#pragma unroll 1
    for (int at = work.begin(); at < work.end();) {
      const Segment segment = work.segment(at);
      at += segment.work;
      if (segment.panels <= 0) continue;  // the same for all threads
      const Index first = segment.group * lists.stride + segment.first * kPanel;
      load_listed<Loop>(shared, segment, order, lists.listed + first, parts.queries);
      Loop loop(shared, y, features, segment, lists.weights + Loop::kRows * first, scale);
      loop.run();
      float unit = Loop::kHalves ? weight_unit : 1, per_value = Loop::kScaled ? scale[1] : 1;
      if constexpr (Loop::kScaled) {
        const int lost = loop.holds(per_value) ? 0 : 1;
        if (over_block<Loop::kThreads>(lost, shared.scratch, Most()) != 0) {
          loop.run_in_floats(weight_unit);
          unit = per_value = 1;
        }
      }
      store_segment(shared, loop, segment, unit, per_value, features, parts);
      work.finish(shared, segment, parts);
    }
  }
}

}  // namespace
}  // namespace pfgm
