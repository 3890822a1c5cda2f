// Weighted sums of many queries with products in tensor memory (sm_100f). Blocks share out the work
// of all lists (cuda/list_shares.h).
#pragma once
#include "cuda/list_shares.h"

namespace pfgm {
namespace {

// A block has two halves of 128 features, which are rows of tensor memory. Two threads have the
// same feature. One of them converts its values in the first 16 references of a panel, and adds up
// the first half of the queries. The other one does the same for the other references and queries.
// Warp w has features 32(w mod 4) to 32(w mod 4) + 31 of half w / 8.
template <class R, int ROWS>
struct TensorMemorySumMemory : ShareMemory<R, ROWS, 512> {
  static constexpr int kHalves = 2, kRows = 128, kQueries = ROWS / 2;  // queries of a thread
  static constexpr int kSteps = kPanel / 16;  // of 16 references, which a product adds up
  // Columns of tensor memory: for each half the sums of a panel, and the values of two panels.
  static constexpr int kStepColumns = 16, kValueColumns = kSteps * kStepColumns;
  static constexpr int kTensorColumns = ROWS > 64 ? 512 : 256;
  static_assert(kHalves * (ROWS + 2 * kValueColumns) <= kTensorColumns);
  static_assert(kQueries % 32 == 0, "a load has so many columns");
  std::uint64_t done[kHalves];  // the products of a panel
  std::uint32_t tensor_memory;  // its address
};
static_assert(sizeof(TensorMemorySumMemory<float, kLargestSumRows>) <= 227 << 10,
              "it fits on sm_100");

// Converts a feature of the 16 references of a step for products: eight words of high parts, and
// eight of low ones, in the order of operand_place.
template <class Memory>
__device__ inline void convert_step(std::uint32_t to, const float* values, float factor,
                                    float& largest) {
  std::uint32_t words[Memory::kStepColumns];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int first = 8 * (i / 4) + i % 4;
    const float a = values[first * Memory::kPitch], b = values[(first + 4) * Memory::kPitch];
    largest = fmaxf(largest, fmaxf(fabsf(a), fabsf(b)));
    const TwoHalves parts = split_halves(a * factor, b * factor);
    words[i] = parts.high, words[8 + i] = parts.low;
  }
  store_tensor_memory(to, words);
}

// Begins the products of a panel with a half of the features, in the order of begin_weighted.
template <int ROWS, bool ROUNDED, class Memory>
__device__ inline void begin_weighted_in_memory(std::uint32_t sums, std::uint32_t values,
                                                const float* weights) {
  constexpr int kApart = kOperandStep<ROWS> * sizeof(float);
  const auto begin = [&](int part_of_values, int part_of_weights, bool adds) {
#pragma unroll
    for (int step = 0; step < Memory::kSteps; ++step)
      begin_product_in_memory<ROWS>(sums, values + Memory::kStepColumns * step + 8 * part_of_values,
                                    weights + operand_place<ROWS>(0, step, part_of_weights), kApart,
                                    step > 0 || adds);
  };
  constexpr int kHighValues = 0, kLowValues = 1, kLowWeights = 0, kHighWeights = 1;
  begin(kLowValues, kHighWeights, false);
  if constexpr (!ROUNDED) begin(kHighValues, kLowWeights, true);
  begin(kHighValues, kHighWeights, true);
}

// As add_weighted_floats, for the feature of a thread and its queries, from number `query0` on.
template <int ROWS, class Memory>
__device__ inline void add_floats_of_thread(float2 (&sum)[ROWS / 4], const float* values,
                                            const float* weights, int query0, float factor) {
#pragma unroll 1
  for (int reference = 0; reference < kPanel; ++reference) {
    const float v = values[reference * Memory::kPitch] * factor;
#pragma unroll
    for (int q = 0; q < ROWS / 4; ++q) {
      const int query = query0 + 2 * q;
      sum[q].x += v * weight_of_operands<ROWS>(weights, query, reference);
      sum[q].y += v * weight_of_operands<ROWS>(weights, query + 1, reference);
    }
  }
}

// Stores the sums of a segment, in two factors as store_segment does.
template <int ROWS, class Memory>
__device__ inline void store_sums_of_thread(const Memory& shared, const float2 (&sum)[ROWS / 4],
                                            const Segment& segment, int feature_of_slice,
                                            int query0, float unit, float per_value, int features,
                                            const Parts& parts) {
  const int feature = Memory::kFeatures * segment.slice + feature_of_slice;
  const int known = parts.queries - ROWS * segment.group - query0;
  if (feature >= features) return;
  const Index rows = parts.queries, row0 = segment.part * rows;
  char* const of_part = reinterpret_cast<char*>(parts.sums + row0 * features + feature);
  const auto bytes = static_cast<std::uint32_t>(features) * 4;  // 32 bits: see ListedCopy
#pragma unroll
  for (int q = 0; q < ROWS / 2; ++q) {
    const auto query = static_cast<std::uint32_t>(shared.queries[query0 + q]);
    const float value = unit * (q % 2 == 0 ? sum[q / 2].x : sum[q / 2].y) * per_value;
    float* const out = reinterpret_cast<float*>(of_part + std::uint64_t{query} * bytes);
    if (q < known) *out = value;
  }
}

// As warpgroup_sum. While products of a panel are under way, threads convert the values of the next
// one. While those of the second half are, threads of the first half add up theirs.
template <class R, int ROWS>
__global__ void __launch_bounds__((TensorMemorySumMemory<R, ROWS>::kThreads), 1)
    tensor_memory_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                      const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
#ifdef PFGM_MULTIPLIES_IN_TENSOR_MEMORY
  using Memory = TensorMemorySumMemory<R, ROWS>;
  using Copies = TurnsOfCopies<R, ROWS, Memory::kThreads>;
  constexpr int kStages = Memory::kStages, kQueries = Memory::kQueries;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int half = lane.warp / 8, side = lane.warp / 4 % 2;
  const int feature_of_slice = Memory::kRows * half + 32 * (lane.warp % 4) + lane.lane;
  if (lane.warp == 0) take_tensor_memory<Memory::kTensorColumns>(&shared.tensor_memory);
  if (threadIdx.x == 0)
    for (std::uint64_t& signal : shared.done) start_signal(&signal);
  const GroupLists group_lists(lists, parts, divide_up32(parts.queries, ROWS), lane);
  const Share share = group_lists.share(parts.panels);
  const float factor = scale[0], per_factor = scale[1];
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  const std::uint32_t memory = shared.tensor_memory;
  const std::uint32_t own_rows = 32u * (lane.warp % 4) << 16;
  const auto sums_of = [&](int of_half) { return memory + ROWS * of_half; };
  const auto values_of = [&](int p, int of_half) {
    return memory + Memory::kHalves * ROWS + Memory::kValueColumns * (2 * (p % 2) + of_half);
  };
  int turn = 0;  // of the signals

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
      for (int part = 0; part < Copies::kTurns; ++part) copies.start(p, part);
    };
    const auto values_at = [&](int p) {
      return reinterpret_cast<const float*>(shared.rows[p % kStages][0]) + feature_of_slice;
    };
    float2 sum[kQueries / 2] = {};
    float largest = 0;
    const auto convert = [&](int p) {
      convert_step<Memory>(values_of(p, half) + own_rows + Memory::kStepColumns * side,
                           values_at(p) + 16 * side * Memory::kPitch, factor, largest);
      wait_stores();
    };
    const auto add_products = [&] {
#pragma unroll
      for (int q = 0; q < kQueries; q += 32) {
        float loaded[32];
        load_tensor_memory(loaded, sums_of(half) + own_rows + kQueries * side + q);
        wait_loads();
        keep_in_place(loaded);
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
          float2& two = sum[(q + i) / 2];
          two = add_pairs(two, float2{loaded[i], loaded[i + 1]});
        }
      }
    };

#pragma unroll 1
    for (int p = 0; p < kStages - 1; ++p) stage(p), commit_copies();
    wait_copies<kStages - 2>();
    __syncthreads();
    convert(0);
#pragma unroll 1
    for (int p = 0; p < panels; ++p, ++turn) {
      // The next panel has arrived, too. No thread uses the slot of the last one any more.
      wait_copies<kStages - 3>();
      publish_shared();
      order_before_barrier();
      __syncthreads();
      if (lane.warp == 0 && is_elected()) {
        order_after_barrier();
#pragma unroll
        for (int i = 0; i < Memory::kHalves; ++i) {
          begin_weighted_in_memory<ROWS, kRounded<R>, Memory>(sums_of(i), values_of(p, i),
                                                              shared.weights[p % kStages]);
          signal_products(&shared.done[i]);
        }
      }
      stage(p + kStages - 1);
      commit_copies();
      convert(p + 1);  // zeros after the last panel
      wait_for_signal(&shared.done[half], turn);
      order_after_barrier();
      add_products();
    }
    wait_copies<0>();
    __syncthreads();

    const bool holds = halves_hold(largest, per_factor);
    const bool again = over_block<Memory::kThreads>(holds ? 0 : 1, shared.scratch, Most()) != 0;
    if (again) {
      for (float2& two : sum) two = {0, 0};
      pipeline<kStages>(
          panels, [&](int p, int) { stage(p); },
          [&](int p, int slot) {
            add_floats_of_thread<ROWS, Memory>(sum, values_at(p), shared.weights[slot],
                                               kQueries * side, weight_unit);
          });
    }
    store_sums_of_thread<ROWS>(shared, sum, segment, feature_of_slice, kQueries * side,
                               again ? 1 : weight_unit, again ? 1 : per_factor, features, parts);
    count_parts<ROWS>(shared, segment, parts);
    __syncthreads();  // before the queries of the next segment
  }
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  if (lane.warp == 0) return_tensor_memory<Memory::kTensorColumns>(memory);
#else
  __trap();  // has_tensor_memory in cuda/runtime.h
#endif
}

}  // namespace
}  // namespace pfgm
