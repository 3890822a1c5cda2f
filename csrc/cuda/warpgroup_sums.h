// Weighted sums of many queries with the asynchronous products of warpgroups (sm_90a): the main
// loop of `weighted_sum` (cuda/weighted_sums.h) where lists of references are shared out evenly. A
// block has more queries and features than one of WarpSums, so it reads references and weights less
// often. Its products are the same.
//
// A multiprocessor has room for one block. A block may add up the end of one list and the beginning
// of another.
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kSumQueries = 64;  // that one instruction multiplies

// Each group has a list for each slice of the features, with the same references. The work of a
// list is counted in panels: the panels that it lists, and kListPanels more unless it is empty.
// Lists follow each other, by groups.
struct Share {
  int first, end;  // of this block, in the work of all lists
  int each;        // of a block
};

// What a lane knows of the lists of its group.
struct GroupLists {
  int list_work;  // work of one list
  int end;        // of the work of all its lists, counted as in Share

  __device__ GroupLists(const Lists& lists, const Parts& parts, int groups, const Lane& lane) {
    const int listed = lane.lane < groups ? lists.counts[lane.lane] : 0;
    list_work = listed > 0 ? kListPanels + divide_up32(listed, kPanel) : 0;
    end = list_work * parts.slices;
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
    Segment result;
    result.group = __popc(__ballot_sync(kAll, end <= at));
    const int whole = __shfl_sync(kAll, list_work, result.group);
    const int first_list = __shfl_sync(kAll, end, result.group) - whole * slices;
    result.slice = (at - first_list) / whole;
    const int list = first_list + result.slice * whole, done = at - list;
    const int left = whole - done, share_left = share.end - at;
    result.is_last = left <= share_left;
    result.work = result.is_last ? left : share_left;
    result.first = done < kListPanels ? 0 : done - kListPanels;
    result.panels = done + result.work - kListPanels - result.first;
    result.part = static_cast<int>(blockIdx.x) - (list + kListPanels) / share.each;
    return result;
  }
};

// ---- what a block stages ------------------------------------------------------------------------

// A block has 256 features and all queries of a group.
template <class R, int ROWS>
struct ShareMemory {
  static constexpr int kFeatures = kShareFeatures, kThreads = kShareFeatures, kStages = 4;
  static constexpr int kPitch = kFeatures + 8;  // so that a warp reads rows from other banks
  R rows[kStages][kPanel][kPitch];
  float weights[kStages][kPanel * ROWS];
  std::uint16_t listed[kPanel * kSharePanels];
  int scratch[kThreads / 32];
  int queries[ROWS];
};

// Copies listed rows, which are aligned, and weights. A thread has the same piece of each of its
// rows. A panel is copied in kTurns turns, in which there are no branches.
template <class R, int ROWS>
class TurnsOfCopies {
 public:
  using Memory = ShareMemory<R, ROWS>;
  static constexpr int kTurns = 8 * ROWS / Memory::kThreads;

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

// The last segment of a list stores the number of its parts.
template <int ROWS, class Memory>
__device__ inline void count_parts(const Memory& shared, const Segment& segment,
                                   const Parts& parts) {
  const int thread = static_cast<int>(threadIdx.x), known = parts.queries - ROWS * segment.group;
  if (segment.is_last && thread < ROWS && thread < known) {
    const Index slice0 = segment.slice * static_cast<Index>(parts.queries);
    parts.counts[slice0 + shared.queries[thread]] = segment.part + 1;
  }
}

static_assert(sizeof(ShareMemory<float, kLargestSumRows>) <= 227 << 10, "it fits on sm_90");

// The weight of a query and a reference of such a panel.
template <int ROWS>
__device__ inline float weight_of_operands(const float* weights, int query, int reference) {
  const int i = reference / 4 % 4;
  const auto half = [&](int part) {
    const int at = operand_place<ROWS>(query, reference / 16, part) + i / 2 * kOperandStep<ROWS>;
    return half_of_word(bits_of(weights[at + reference % 4]), i % 2);
  };
  return half(1) + half(0);
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

// Begins the products of a panel with band `band` of 64 queries, small ones first.
template <int ROWS, bool ROUNDED>
__device__ inline void begin_weighted(float (&sums)[8][4], const ValueOperands& values,
                                      const float* weights, int band, bool adds) {
  constexpr int kApart = kOperandStep<ROWS> * sizeof(float), kSteps = kPanel / 16;
  const auto operand = [&](int step, int part) {
    return weights + operand_place<ROWS>(kSumQueries * band, step, part);
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

// ---- the main loop -----------------------------------------------------------------------------

// Σ w y over the segments of a share, for kShareFeatures features and ROWS queries. A warp has 32
// features, and all queries.
template <class R, int ROWS>
class WarpgroupSums {
 public:
  using Reference = R;
  using Memory = ShareMemory<R, ROWS>;
  static constexpr int kRows = ROWS, kFeatures = Memory::kFeatures, kThreads = Memory::kThreads;
  static constexpr int kBlocks = 1;
  static constexpr bool kHalves = true, kScaled = true;
  // Lanes with the same g have features 2g, 2g + 1, 16 + 2g and 17 + 2g of their warp.
  static constexpr int kRuns = 2, kRun = 2;

  // The segments of a block.
  class Work {
   public:
    __device__ Work(const Lists& lists, const Parts& parts, const Lane& lane)
        : slices_(parts.slices),
          lists_(lists, parts, divide_up32(parts.queries, ROWS), lane),
          share_(lists_.share(parts.panels)) {}
    __device__ int begin() const { return share_.first; }
    __device__ int end() const { return share_.end; }
    __device__ Segment segment(int at) const { return lists_.segment(share_, at, slices_); }
    __device__ void finish(const Memory& shared, const Segment& segment, const Parts& parts) const {
      count_parts<ROWS>(shared, segment, parts);
      __syncthreads();  // before the queries of the next segment
    }

   private:
    const int slices_;
    const GroupLists lists_;
    const Share share_;
  };

  // See has_warpgroups in cuda/runtime.h.
  __device__ static constexpr bool is_unused() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return false;
#else
    return true;
#endif
  }

  // `weights` are those of the segment, `scale` the factor of references.
  __device__ WarpgroupSums(Memory& shared, const Rows<R>& y, int features, const Segment& segment,
                           const float* weights, const float* scale)
      : shared_(shared),
        copies_(shared, y, kFeatures * segment.slice, features, segment.panels, weights),
        panels_(segment.panels),
        factor_(scale[0]),
        adds_(features < 0) {}

  __device__ void run() {
#pragma unroll 1
    for (int p = 0; p < kStages - 1; ++p) stage(p), commit_copies();
    wait_copies<kStages - 2>();
    publish_shared();
    __syncthreads();
    load(0, 0);
#pragma unroll 1
    for (int p = 0; p < panels_; ++p) {
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
  }

  // Whether halves hold the thread's features.
  __device__ bool holds(float per_factor) const {
    bool hold = true;
    for (const auto& half : largest_)
      for (float value : half) hold = hold && halves_hold(value, per_factor);
    return hold;
  }

  // The same sums without halves of the references. Weights are multiplied by `unit`.
  __device__ void run_in_floats(float unit) {
    for (auto& half : sum_)
      for (auto& tile : half)
        for (float& value : tile) value = 0;
    pipeline<kStages>(
        panels_, [&](int p, int) { stage(p); },
        [&](int, int slot) {
          add_floats<ROWS, Memory::kPitch>(sum_, values(slot), shared_.weights[slot], unit, lane_);
        });
  }

  // Of the thread's feature f of run i and query 8n + 2t + odd.
  __device__ float sum(int i, int f, int n, int odd) const { return sum_[i][n][2 * f + odd]; }

 private:
  static constexpr int kStages = Memory::kStages, kGroups = ROWS / kSumQueries;

  __device__ const R* values(int slot) const { return shared_.rows[slot][0] + 32 * lane_.warp; }

  __device__ void stage(int p) const {
    for (int turn = 0; turn < TurnsOfCopies<R, ROWS>::kTurns; ++turn) copies_.start(p, turn);
  }

  __device__ void load(int p, int i) {
    load_operands<Memory::kPitch>(operands_[i], values(p % kStages) + 16 * i, factor_, largest_[i],
                                  lane_);
  }

  // The next operands are loaded while products of others are under way, and prepared as far as
  // the compiler has registers for it.
  __device__ void take_turn(int p, int i, int group) {
    begin_weighted<ROWS, kRounded<R>>(panel_, operands_[i], shared_.weights[p % kStages], group,
                                      adds_);
    copies_.start(p + kStages - 1, kGroups * i + group);
    if (i == 1 && group == kGroups - 1) commit_copies();
    if (i == 0 && group == 0) load(p, 1);
    if (i == 1 && group == 0) load(p + 1 < panels_ ? p + 1 : p, 0);
    wait_products<0>();
    keep_in_place(panel_);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      for (int e = 0; e < 4; ++e) sum_[i][8 * group + n][e] += panel_[n][e];
  }

  Memory& shared_;
  const TurnsOfCopies<R, ROWS> copies_;
  const int panels_;
  const float factor_;
  const bool adds_;  // always false, see WarpgroupProducts
  const Lane lane_ = this_lane();
  float sum_[2][ROWS / 8][4] = {}, panel_[8][4] = {}, largest_[2][2] = {};
  ValueOperands operands_[2];
};

}  // namespace
}  // namespace pfgm
