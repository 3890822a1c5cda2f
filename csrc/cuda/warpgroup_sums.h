// Weighted sums of many queries with the asynchronous products of warpgroups (sm_90a). A block has
// more queries and features than one of weighted_sum, so it reads references and weights less
// often. Its products are the same.
//
// A multiprocessor has room for one block. Blocks share out the work of all lists evenly, so a
// block may add up the end of one list and the beginning of another.
#pragma once
#include "cuda/weighted_sums.h"

namespace pfgm {
namespace {

constexpr int kSharePanels = 256;  // of a share, at most
constexpr int kOfList = 6;         // panels that take as long as what a list takes once
constexpr int kMostGroups = 32;    // of a block of queries, at most: a lane has one
constexpr int kOfSumProduct = 64;  // queries that one instruction multiplies

// A block has 256 features, a warp 32 of them, and all queries of a group. Lanes with the same g
// have features 2g, 2g + 1, 16 + 2g and 17 + 2g of their warp.
template <class R, int ROWS>
struct WarpgroupSumMemory {
  static constexpr int kFeatures = kWarpgroupSumFeatures, kThreads = kFeatures, kStages = 4;
  static constexpr int kPitch = kFeatures + 8;  // so that a warp reads rows from other banks
  R rows[kStages][kPanel][kPitch];
  float weights[kStages][kPanel * ROWS];
  std::uint16_t listed[kPanel * kSharePanels];
  int scratch[kThreads / 32];
  int queries[ROWS];
};
static_assert(sizeof(WarpgroupSumMemory<float, kLargestSumRows>) <= 227 << 10, "it fits on sm_90");

// ---- shares of the lists -----------------------------------------------------------------------

// Each group has a list for each slice of the features, with the same references. The work of a
// list is counted in panels: kOfList unless it is empty, and then its own. Lists follow each other,
// by groups.
struct Share {
  int first, end;  // of this block, in the work of all lists
  int each;        // of a block
};

// What a block adds up at a time: panels of its share that belong to one list.
struct Segment {
  int work;           // of the share
  int group, slice;   // of the list
  int first, panels;  // at most 0 panels if the share ends before them
  int part;           // of the sums of the list
  bool is_last;
};

// What a lane knows of the lists of its group.
struct GroupLists {
  int of_list;  // work of one list
  int end;      // of the work of all its lists, counted as in Share

  __device__ GroupLists(const Lists& lists, const Parts& parts, int groups, const Lane& lane) {
    const int listed = lane.lane < groups ? lists.counts[lane.lane] : 0;
    of_list = listed > 0 ? kOfList + divide_up32(listed, kPanel) : 0;
    end = of_list * parts.slices;
    for (int apart = 1; apart < 32; apart *= 2) {
      const int lower = __shfl_sync(kAll, end, lane.lane - apart);
      if (lane.lane >= apart) end += lower;
    }
  }

  __device__ Share share(int least) const {
    const int all = __shfl_sync(kAll, end, 31);
    const int even = divide_up32(all, static_cast<int>(gridDim.x));
    const int each = even < least ? least : even;
    const int first = each * static_cast<int>(blockIdx.x), last = first + each;
    return {first, last < all ? last : all, each};
  }

  // The segment that begins where `at` counts to.
  __device__ Segment segment(const Share& share, int at, int slices) const {
    Segment found;
    found.group = __popc(__ballot_sync(kAll, end <= at));
    const int whole = __shfl_sync(kAll, of_list, found.group);
    const int first_list = __shfl_sync(kAll, end, found.group) - whole * slices;
    found.slice = (at - first_list) / whole;
    const int list = first_list + found.slice * whole, done = at - list;
    const int left = whole - done, of_share = share.end - at;
    found.is_last = left <= of_share;
    found.work = found.is_last ? left : of_share;
    found.first = done < kOfList ? 0 : done - kOfList;
    found.panels = done + found.work - kOfList - found.first;
    found.part = static_cast<int>(blockIdx.x) - (list + kOfList) / share.each;
    return found;
  }
};

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

// Copies listed rows, which are aligned, and weights. A thread has the same piece of each of its
// rows. A panel is copied in kTurns turns without branches, because the compiler runs products one
// after the other if there are branches while they are under way.
template <class R, int ROWS>
class TurnsOfCopies {
 public:
  using Memory = WarpgroupSumMemory<R, ROWS>;
  static constexpr int kTurns = 2 * ROWS / kOfSumProduct;

  // `weights` are those of the first panel.
  __device__ TurnsOfCopies(Memory& shared, const Rows<R>& rows, int feature0, int features,
                           int panels, const float* weights)
      : shared_(shared), panels_(panels) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, column_ = thread % kPieces * 4;
    const int left = features - feature0 - column_, known = left < 0 ? 0 : left < 4 ? left : 4;
    valid_ = known * static_cast<int>(sizeof(R));
    rows_ = reinterpret_cast<const char*>(rows.row(0) + (known > 0 ? feature0 + column_ : 0));
    bytes_ = static_cast<std::uint32_t>(rows.stride * sizeof(R));
    weights_ = weights + 4 * thread;
  }

  // Starts a turn of the copies of panel p. After the last panel nothing is read.
  __device__ void start(int p, int turn) const {
    const bool there = p < panels_;
    const int slot = p % Memory::kStages, panel = there ? p : panels_ - 1;
    const std::uint16_t* const listed = shared_.listed + panel * kPanel + row_;
    const int row0 = turn * kRowsOfTurn;
    std::uint32_t places[kRowsOfTurn];
#pragma unroll
    for (int i = 0; i < kRowsOfTurn; ++i) places[i] = listed[(row0 + i) * kStep];
#pragma unroll
    for (int i = 0; i < kRowsOfTurn; ++i)
      copy_async<16>(&shared_.rows[slot][row_ + (row0 + i) * kStep][column_],
                     rows_ + static_cast<std::uint64_t>(places[i]) * bytes_, there ? valid_ : 0);
    const int weight = 4 * turn * Memory::kThreads;
    copy_async<16>(&shared_.weights[slot][weight + 4 * static_cast<int>(threadIdx.x)],
                   weights_ + (panel * kPanel * ROWS + weight), there ? 16 : 0);
  }

 private:
  static constexpr int kPieces = Memory::kFeatures / 4, kStep = Memory::kThreads / kPieces;
  static constexpr int kRowsOfTurn = kPanel / kStep / kTurns;
  static_assert(kPanel * ROWS == kTurns * 4 * Memory::kThreads && kRowsOfTurn > 0);

  Memory& shared_;
  const int panels_;
  int row_, column_, valid_;
  const char* rows_;
  std::uint32_t bytes_;
  const float* weights_;
};

// ---- the kernel --------------------------------------------------------------------------------

// Finds the queries of a segment's group, and the references that its panels list.
template <int ROWS, class Memory>
__device__ inline void find_listed(Memory& shared, const Segment& segment, const int* order,
                                   const int* listed, int queries) {
  const int thread = static_cast<int>(threadIdx.x), query0 = ROWS * segment.group;
  if (thread < ROWS) {
    const int place = query0 + (query0 + thread < queries ? thread : 0);
    shared.queries[thread] = order ? order[place] : place;
  }
  for (int i = thread; i < segment.panels * kPanel; i += Memory::kThreads)
    shared.listed[i] = static_cast<std::uint16_t>(listed[i]);
  __syncthreads();
}

// Stores the sums of a segment, in two factors: the product of the units may be too small for
// float32. The last segment of a list also stores the number of its parts.
template <int ROWS, class Memory>
__device__ inline void store_segment(const Memory& shared, const float (&sum)[2][ROWS / 8][4],
                                     const Segment& segment, float unit, float per_value,
                                     int features, const Parts& parts, const Lane& lane) {
  const int thread = static_cast<int>(threadIdx.x), known = parts.queries - ROWS * segment.group;
  const int feature0 = Memory::kFeatures * segment.slice + 32 * lane.warp + 2 * lane.g;
  const Index rows = parts.queries, row0 = segment.part * rows;
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= known) continue;
      float* const out = parts.sums + (row0 + shared.queries[q]) * features;
      for (int i = 0; i < 2; ++i) {
        const int feature = feature0 + 16 * i;
        float v[2];
        for (int f = 0; f < 2; ++f) v[f] = unit * sum[i][n][2 * f + odd] * per_value;
        if (features % 2 == 0) {
          if (feature < features) *reinterpret_cast<float2*>(out + feature) = {v[0], v[1]};
        } else {
          for (int f = 0; f < 2; ++f)
            if (feature + f < features) out[feature + f] = v[f];
        }
      }
    }
  if (segment.is_last && thread < ROWS && thread < known)
    parts.counts[segment.slice * rows + shared.queries[thread]] = segment.part + 1;
}

// As weighted_sum. The parts of a list are those of the blocks that share it.
template <class R, int ROWS>
__global__ void __launch_bounds__((WarpgroupSumMemory<R, ROWS>::kThreads), 1)
    warpgroup_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                  const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
#if defined(PFGM_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = WarpgroupSumMemory<R, ROWS>;
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
    const TurnsOfCopies<R, ROWS> copies(shared, y, Memory::kFeatures * segment.slice, features,
                                        panels, lists.weights + ROWS * first);
    const auto stage = [&](int p) {
      for (int turn = 0; turn < TurnsOfCopies<R, ROWS>::kTurns; ++turn) copies.start(p, turn);
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
    __syncthreads();  // before the queries of the next segment
  }
#else
  __trap();  // has_warpgroups in cuda/runtime.h
#endif
}

}  // namespace
}  // namespace pfgm
