// Weighted sums of many queries with the asynchronous products of warpgroups (sm_90a). Blocks share
// out the work of all lists (cuda/list_shares.h).
#pragma once
#include "cuda/list_shares.h"
#include "cuda/warp_sums.h"

namespace pfgm {
namespace {

constexpr int kOfSumProduct = 64;  // queries that one instruction multiplies

// A warp has 32 features, and all queries of a group. Lanes with the same g have features 2g,
// 2g + 1, 16 + 2g and 17 + 2g of their warp.
static_assert(sizeof(ShareMemory<float, kLargestSumRows>) <= 227 << 10, "it fits on sm_90");

// The weight of a query and a reference of such a panel.
template <int ROWS>
__device__ inline float weight_of_operands(const float* weights, int query, int reference) {
  const int i = reference / 4 % 4;
  const auto of = [&](int part) {
    const int at = operand_place<ROWS>(query, reference / 16, part) + i / 2 * kOperandStep<ROWS>;
    return half_of_word(bits_of(weights[at + reference % 4]), i % 2);
  };
  return of(1) + of(0);
}

// ---- products of a panel -----------------------------------------------------------------------

template <class R>
__device__ inline void load2(const R* from, float (&v)[2]) {
  static_assert(sizeof(R) == sizeof(float));
  const float2 two = *reinterpret_cast<const float2*>(from);
  v[0] = two.x, v[1] = two.y;
}

// Values of one half of a lane's features, as operands for all references of a panel.
struct ValueOperands {
  std::uint32_t high[kPanel / 16][4], low[kPanel / 16][4];
};

// Finds the operands of features 2g and 2g + 1 from `values` on, as add_weighted_halves does.
template <int PITCH, class R>
__device__ inline void load_operands(ValueOperands& to, const R* values, float factor,
                                     float (&largest)[2], const Lane& lane) {
#pragma unroll
  for (int step = 0; step < kPanel / 16; ++step)
    for (int pair = 0; pair < 2; ++pair) {
      const int first = 16 * step + 8 * pair + lane.t;
      float v[2][2];
      for (int e = 0; e < 2; ++e) {
        load2(values + (first + 4 * e) * PITCH + 2 * lane.g, v[e]);
        for (int f = 0; f < 2; ++f)
          largest[f] = fmaxf(largest[f], fabsf(v[e][f])), v[e][f] *= factor;
      }
      for (int f = 0; f < 2; ++f) {
        const TwoHalves parts = split_halves(v[0][f], v[1][f]);
        to.high[step][2 * pair + f] = parts.high, to.low[step][2 * pair + f] = parts.low;
      }
    }
}

// Begins the products of a panel with 64 queries, those of number `group`, small ones first.
template <int ROWS, bool ROUNDED>
__device__ inline void begin_weighted(float (&sums)[8][4], const ValueOperands& values,
                                      const float* weights, int group, bool adds) {
  constexpr int kApart = kOperandStep<ROWS> * sizeof(float), kSteps = kPanel / 16;
  const auto operand = [&](int step, int part) {
    return weights + operand_place<ROWS>(kOfSumProduct * group, step, part);
  };
  keep_in_place(sums);
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    begin_product(sums, values.low[step], operand(step, 1), kApart, step > 0 || adds);
  if constexpr (!ROUNDED)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      begin_product(sums, values.high[step], operand(step, 0), kApart);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    begin_product(sums, values.high[step], operand(step, 1), kApart);
  commit_products();
}

// As add_weighted_floats.
template <int ROWS, int PITCH, class R>
__device__ inline void add_floats(float (&sum)[2][ROWS / 8][4], const R* values,
                                  const float* weights, float factor, const Lane& lane) {
#pragma unroll 1
  for (int reference = 0; reference < kPanel; ++reference) {
    float v[2][2];
    for (int i = 0; i < 2; ++i) load2(values + reference * PITCH + 16 * i + 2 * lane.g, v[i]);
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
      for (int odd = 0; odd < 2; ++odd) {
        const int query = 8 * n + 2 * lane.t + odd;
        const float weight = weight_of_operands<ROWS>(weights, query, reference) * factor;
        for (int i = 0; i < 2; ++i)
          for (int f = 0; f < 2; ++f) sum[i][n][2 * f + odd] += weight * v[i][f];
      }
  }
}

// ---- the kernel --------------------------------------------------------------------------------

// Stores the sums of a segment, in two factors: the product of the units may be too small for
// float32.
template <int ROWS, class Memory>
__device__ inline void store_segment(const Memory& shared, const float (&sum)[2][ROWS / 8][4],
                                     const Segment& segment, float unit, float per_value,
                                     int features, const Parts& parts, const Lane& lane) {
  const int known = parts.queries - ROWS * segment.group;
  const int feature0 = Memory::kFeatures * segment.slice + 32 * lane.warp + 2 * lane.g;
  const Index rows = parts.queries, row0 = segment.part * rows;
  char* const of_part = reinterpret_cast<char*>(parts.sums + row0 * features + feature0);
  const auto bytes = static_cast<std::uint32_t>(features) * 4;  // 32 bits: see ListedCopy
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= known) continue;
      const auto query = static_cast<std::uint32_t>(shared.queries[q]);
      float* const out = reinterpret_cast<float*>(of_part + std::uint64_t{query} * bytes);
      for (int i = 0; i < 2; ++i) {
        const int left = features - feature0 - 16 * i;
        float v[2];
        for (int f = 0; f < 2; ++f) v[f] = unit * sum[i][n][2 * f + odd] * per_value;
        if (features % 2 == 0) {
          if (left > 0) *reinterpret_cast<float2*>(out + 16 * i) = {v[0], v[1]};
        } else {
          for (int f = 0; f < 2; ++f)
            if (left > f) out[16 * i + f] = v[f];
        }
      }
    }
}

// As weighted_sum. The parts of a list are those of the blocks that share it.
template <class R, int ROWS>
__global__ void __launch_bounds__((ShareMemory<R, ROWS>::kThreads), 1)
    warpgroup_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                  const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = ShareMemory<R, ROWS>;
  using Copies = TurnsOfCopies<R, ROWS>;
  constexpr int kStages = Memory::kStages, kPitch = Memory::kPitch;
  constexpr int kGroups = ROWS / kOfSumProduct;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int own = 32 * lane.warp;
  const GroupLists group_lists(lists, parts, divide_up32(parts.queries, ROWS), lane);
  const Share share = group_lists.share(parts.panels);
  const float factor = scale[0], per_factor = scale[1];
  const bool adds = features < 0;  // never, see warpgroup_distances

#pragma unroll 1
  for (int at = share.first; at < share.end;) {
    const Segment segment = group_lists.segment(share, at, parts.slices);
    const int panels = segment.panels;
    at += segment.work;
    if (panels <= 0) continue;  // the same for all threads
    const Index first = segment.group * lists.stride + segment.first * kPanel;
    find_listed<ROWS>(shared, segment, order, lists.listed + first, parts.queries);
    const Copies copies(shared, y, Memory::kFeatures * segment.slice, features, panels,
                        lists.weights + ROWS * first);
    const auto stage = [&](int p) {
      for (int turn = 0; turn < Copies::kTurns; ++turn) copies.start(p, turn);
    };
    float sum[2][ROWS / 8][4] = {}, of_panel[8][4] = {}, largest[2][2] = {};
    ValueOperands values[2];
    const auto load = [&](int p, int i) {
      load_operands<kPitch>(values[i], shared.rows[p % kStages][0] + own + 16 * i, factor,
                            largest[i], lane);
    };
    // The next operands are loaded while products of others are under way, and prepared as far as
    // the compiler has registers for it.
    const auto take_turn = [&](int p, int i, int group) {
      begin_weighted<ROWS, kRounded<R>>(of_panel, values[i], shared.weights[p % kStages], group,
                                        adds);
      copies.start(p + kStages - 1, kGroups * i + group);
      if (i == 1 && group == kGroups - 1) commit_copies();
      if (i == 0 && group == 0) load(p, 1);
      if (i == 1 && group == 0) load(p + 1 < panels ? p + 1 : p, 0);
      wait_products<0>();
      keep_in_place(of_panel);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) sum[i][8 * group + n][e] += of_panel[n][e];
    };

#pragma unroll 1
    for (int p = 0; p < kStages - 1; ++p) stage(p), commit_copies();
    wait_copies<kStages - 2>();
    publish_shared();
    __syncthreads();
    load(0, 0);
#pragma unroll 1
    for (int p = 0; p < panels; ++p) {
      // The next panel has arrived, too. No thread uses the slot of the last one any more.
      wait_copies<kStages - 3>();
      publish_shared();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int group = 0; group < kGroups; ++group) take_turn(p, i, group);
    }
    wait_copies<0>();
    __syncthreads();

    bool hold = true;
    for (const auto& of_half : largest)
      for (float value : of_half) hold = hold && halves_hold(value, per_factor);
    const bool again = over_block<Memory::kThreads>(hold ? 0 : 1, shared.scratch, Most()) != 0;
    if (again) {
      for (auto& half : sum)
        for (auto& tile : half)
          for (float& value : tile) value = 0;
      pipeline<kStages>(
          panels, [&](int p, int) { stage(p); },
          [&](int, int slot) {
            add_floats<ROWS, kPitch>(sum, shared.rows[slot][0] + own, shared.weights[slot],
                                     weight_unit, lane);
          });
    }
    store_segment<ROWS>(shared, sum, segment, again ? 1 : weight_unit, again ? 1 : per_factor,
                        features, parts, lane);
    count_parts<ROWS>(shared, segment, parts);
    __syncthreads();  // before the queries of the next segment
  }
#else
  __trap();  // has_warpgroups in cuda/runtime.h
#endif
}

}  // namespace
}  // namespace pfgm
