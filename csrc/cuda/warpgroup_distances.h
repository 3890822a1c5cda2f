// Tiles of 128 references × 128 queries with the asynchronous products of warpgroups (sm_90a),
// which reach the rate of Hopper's matrix units, and tiles of 256 queries for Rounded references.
// Products of a panel and their sums are those of `distances`, but for the order of the features in
// a panel.
#pragma once
#include "cuda/distances.h"

namespace pfgm {
namespace {

// A block has two warpgroups. A warp has 16 references and all queries. It copies its references
// itself, and converts them one panel ahead. Queries are operands in shared memory.
template <class R, int QUERIES>
struct WarpgroupMemory {
  static constexpr int kQueries = QUERIES, kReferences = 128, kStages = 4;
  static constexpr int kSlabs = 1, kSides = 1, kParts = 1, kColumns = kQueries / 8;
  static constexpr int kGroups = kReferences / 16, kFeatures = kPanel;
  static constexpr int kPieces = kPanel / 8;  // of 8 features
  static constexpr int kQueryParts = kRounded<R> ? 1 : 2;
  struct Stage {
    std::uint16_t x[kQueryParts][kPieces][kQueries][8];  // part, piece, query
    // The 16-byte pieces of a row trade places, so that the accesses of a warp, which are 8 bytes
    // of four rows at a time, reach different banks.
    R y[kReferences][kPanel];
    float center[kPanel];
  };
  struct Sums {
    double squares[1][kReferences];
    LeastOfRows<kQueries, 8 * kGroups> least;
    double farthest[kReferences / 16];
  };
  union {
    Stage stages[kStages];
    Sums sums;
  };
  double units[kQueries], norms[kQueries];
};
constexpr std::size_t kSharedLimitOfWarpgroups = 227 << 10;  // of sm_90
static_assert(sizeof(WarpgroupMemory<float, 128>) <= kSharedLimitOfWarpgroups &&
                  sizeof(WarpgroupMemory<Rounded, 256>) <= kSharedLimitOfWarpgroups,
              "a block fits on sm_90");

__device__ inline int place_of_piece(int row, int piece) { return piece ^ 2 * (row % 4); }

// Copies panel after panel of aligned rows. In place of rows after the last a thread copies another
// one; their distances are not stored.
template <class R, int QUERIES>
class WarpgroupCopy {
 public:
  using Memory = WarpgroupMemory<R, QUERIES>;

  // Starts at the feature `first`.
  __device__ WarpgroupCopy(const Halves& x, int query0, const Rows<R>& y, int reference0,
                           const Center& center, int first)
      : center_(center),
        to_low_(x.low - x.high),
        apart_(kStep * y.stride),
        left_(center.features - first) {
    const Lane lane = this_lane();
    row_ = 16 * lane.warp + lane.lane / 8, piece_ = lane.lane % 8;
    // Eight lanes write the same piece of eight queries, which lie in different banks.
    query_ = 8 * lane.warp + lane.lane % 8, query_piece_ = lane.lane / 8;
    rows_ = static_cast<int>(y.count) - reference0 - row_, queries_ = x.rows - query0 - query_;
    from_ = y.row(rows_ > 0 ? reference0 + row_ : 0) + first + 4 * piece_;
    high_ = x.high + static_cast<Index>(queries_ > 0 ? query0 + query_ : 0) * center.width + first +
            8 * query_piece_;
  }

  __device__ void next(typename Memory::Stage& stage) {
    const int known = left_ - 4 * piece_, count = known < 0 ? 0 : known < 4 ? known : 4;
    R* const to = stage.y[row_] + 4 * place_of_piece(row_, piece_);
#pragma unroll
    for (int i = 0; i < 16 / kStep; ++i)
      copy_async<16>(to + i * kStep * kPanel, i * kStep < rows_ ? from_ + i * apart_ : from_,
                     count * static_cast<int>(sizeof(R)));
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kPanel / 4)
      copy_async<16>(&stage.center[4 * thread],
                     center_.scaled + (center_.features - left_) + 4 * thread);
    auto& x = stage.x;
#pragma unroll
    for (int i = 0; i < QUERIES; i += kQueryStep) {
      const std::uint16_t* const high = i < queries_ ? high_ + i * center_.width : high_;
      copy_async<16>(x[0][query_piece_][query_ + i], high);
      if constexpr (!kRounded<R>) copy_async<16>(x[1][query_piece_][query_ + i], high + to_low_);
    }
    from_ += kPanel, high_ += kPanel, left_ -= kPanel;
  }

 private:
  static constexpr int kStep = 4;  // rows of references, from one copy of a thread to the next
  static constexpr int kQueryStep = kDistanceThreads / Memory::kPieces;
  static_assert(Memory::kPieces == 4, "a warp copies all pieces of eight queries");

  const Center& center_;
  const Index to_low_, apart_;  // from a high part to the low part; between rows of y
  int left_, row_, piece_, query_, query_piece_;
  int rows_, queries_;  // rows that there are from the first one of this thread on
  const R* from_;
  const std::uint16_t* high_;
};

// A panel of 16 references as operands: references g and g + 8, features 2t, 2t + 1, 2t + 8 and
// 2t + 9 of each 16. squares[e] is the sum of the squares of reference g + 8e, of their high parts
// if ROUNDED.
template <bool ROUNDED, class Stage>
__device__ inline ReferencePanel convert_for_warpgroup(const Stage& stage, float scale,
                                                       const Lane& lane, float (&squares)[2]) {
  ReferencePanel panel;
  squares[0] = squares[1] = 0;
#pragma unroll
  for (int i = 0; i < kPanel / 8; ++i) {
    const int feature = 8 * i + 2 * lane.t;
    const float2 c = *reinterpret_cast<const float2*>(stage.center + feature);
    for (int e = 0; e < 2; ++e) {
      const int row = 16 * lane.warp + lane.g + 8 * e;
      const float2 y = *reinterpret_cast<const float2*>(
          stage.y[row] + 4 * place_of_piece(lane.g, feature / 4) + feature % 4);
      const float first = y.x * scale - c.x, second = y.y * scale - c.y;
      const TwoHalves parts = split_halves(first, second);
      squares[e] += ROUNDED ? sum_of_squares(parts.high) : first * first + second * second;
      panel.high[i / 2][i % 2 * 2 + e] = parts.high;
      panel.low[i / 2][i % 2 * 2 + e] = parts.low;
    }
  }
  return panel;
}

// Panels of the features that a block takes.
struct BlockPanels {
  int first, count;
};

template <bool SLICED>
__device__ inline BlockPanels panels_of_block(int features, const Slices& slices) {
  const int first = SLICED ? static_cast<int>(blockIdx.z) * slices.trips : 0;
  const int left = static_cast<int>(divide_up(features, kPanel)) - first;
  return {first, SLICED && slices.trips < left ? slices.trips : left};
}

// What a block copies and computes with, panel after panel of its slice of the features.
template <class R, int QUERIES>
class WarpgroupStages {
 public:
  using Memory = WarpgroupMemory<R, QUERIES>;
  static constexpr int kAhead = Memory::kStages - 1;  // panels

  __device__ WarpgroupStages(Memory& shared, const Halves& x, int query0, const Rows<R>& y,
                             int reference0, const Center& center, const BlockPanels& panels)
      : shared_(shared),
        copy_(x, query0, y, reference0, center, panels.first * kPanel),
        panels_(panels.count) {}

  __device__ typename Memory::Stage& at(int p) { return shared_.stages[p % Memory::kStages]; }
  // Starts the copies of a panel.
  __device__ void begin(int p) {
    if (p < panels_) copy_.next(at(p));
    commit_copies();
  }
  // All but the newest PENDING panels have arrived, for all threads and their products.
  template <int PENDING>
  __device__ void arrive() {
    wait_copies<PENDING>();
    publish_shared();
    __syncthreads();
  }
  // The references of this warp in a panel.
  __device__ R* slab(int p, const Lane& lane) { return at(p).y[16 * lane.warp]; }
  // Converts them in their place. After the last panel this converts what nothing reads.
  __device__ void convert(int p, float scale, const Lane& lane, float (&squares)[2]) {
    const ReferencePanel panel = convert_for_warpgroup<kRounded<R>>(at(p), scale, lane, squares);
    __syncwarp();  // all values are read
    store_panel(slab(p, lane), panel, lane);
    __syncwarp();
  }

 private:
  Memory& shared_;
  WarpgroupCopy<R, QUERIES> copy_;
  const int panels_;
};

// Sums of a warp with 64 queries, which one instruction computes.
constexpr int kOfProduct = 64;
using SumsOfProduct = float[kOfProduct / 8][4];

// Begins the products of a panel with 64 queries, those of number `group`, in the order of
// add_products.
template <class Stage>
__device__ inline void begin_panel(SumsOfProduct& rest, const ReferencePanel& y, const Stage& stage,
                                   int group) {
  constexpr int kApart = sizeof stage.x[0][0];
  const auto x = [&](int part, int i) { return stage.x[part][2 * i][group * kOfProduct]; };
  keep_in_place(rest);
  begin_products();
#pragma unroll
  for (int i = 0; i < 2; ++i) begin_product(rest, y.low[i], x(0, i), kApart);
#pragma unroll
  for (int i = 0; i < 2; ++i) begin_product(rest, y.high[i], x(1, i), kApart);
#pragma unroll
  for (int i = 0; i < 2; ++i) begin_product(rest, y.high[i], x(0, i), kApart);
  commit_products();
}

// Adds the products of a panel to the total, as add_products does.
__device__ inline void add_panel(SumsOfProduct& total, SumsOfProduct& rest) {
  keep_in_place(rest);
#pragma unroll
  for (int n = 0; n < kOfProduct / 8; ++n)
    for (int e = 0; e < 4; ++e) {
      float &sum = total[n][e], &value = rest[n][e];
      const float larger = sum + value;
      value -= larger - sum;
      sum = larger;
    }
}

// The same for the high parts alone, as in add_rounded_products.
template <class Stage>
__device__ inline void begin_rounded_panel(SumsOfProduct& panel, const ReferencePanel& y,
                                           const Stage& stage, int group, bool adds) {
  constexpr int kApart = sizeof stage.x[0][0];
  const auto x = [&](int i) { return stage.x[0][2 * i][group * kOfProduct]; };
  keep_in_place(panel);
  begin_products();
  begin_product(panel, y.high[0], x(0), kApart, adds);
  begin_product(panel, y.high[1], x(1), kApart);
  commit_products();
}

__device__ inline void add_rounded_panel(SumsOfProduct& total, SumsOfProduct& panel) {
  keep_in_place(panel);
#pragma unroll
  for (int n = 0; n < kOfProduct / 8; ++n)
    for (int e = 0; e < 4; ++e) total[n][e] += panel[n][e];
}

// What finish_tile needs of the queries of a block.
template <bool NORMS, class Memory>
__device__ inline void load_queries(Memory& shared, const Halves& x, int query0, const Pairs& out) {
  const int q = static_cast<int>(threadIdx.x);
  if (q >= Memory::kQueries) return;
  const int query = query0 + q < x.rows ? query0 + q : 0;
  shared.units[q] = x.units[query];
  if constexpr (NORMS) shared.norms[q] = out.norms[query];
}

// Slices as in distances.
template <bool PROJECT, bool SLICED>
__global__ void __launch_bounds__(kDistanceThreads, 1)
    warpgroup_distances(const Halves x, const Rows<float> y, const Center center, const Pairs out,
                        const Slices slices) {
  wait_for_earlier_launches();
#if defined(PFGM_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = WarpgroupMemory<float, 128>;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int reference0 = static_cast<int>(blockIdx.x) * Memory::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * Memory::kQueries;
  if constexpr (!PROJECT && !SLICED) clear_list(out);
  load_queries<!PROJECT && !SLICED>(shared, x, query0, out);
  const float factor = *center.scale;
  float total[2][kOfProduct / 8][4] = {}, rest[2][kOfProduct / 8][4] = {};
  float square[2] = {}, square_lost[2] = {}, squares[2];
  const BlockPanels panels = panels_of_block<SLICED>(center.features, slices);
  WarpgroupStages<float, 128> stages(shared, x, query0, y, reference0, center, panels);
  constexpr int kAhead = stages.kAhead;

  for (int p = 0; p < kAhead; ++p) stages.begin(p);
  stages.template arrive<kAhead - 1>();
  stages.convert(0, factor, lane, squares);
#pragma unroll 1
  for (int p = 0; p < panels.count; ++p) {
    const ReferencePanel y = load_panel(stages.slab(p, lane), lane);
    begin_panel(rest[0], y, stages.at(p), 0);
    for (int e = 0; e < 2; ++e) add_compensated(square[e], square_lost[e], squares[e]);
    stages.template arrive<kAhead - 2>();
    stages.begin(p + kAhead);  // in place of panel p − 1, whose products are done
    begin_panel(rest[1], y, stages.at(p), 1);
    stages.convert(p + 1, factor, lane, squares);
    wait_products<1>();
    add_panel(total[0], rest[0]);
    wait_products<0>();
    add_panel(total[1], rest[1]);
  }
  wait_copies<0>();
  __syncthreads();

  using Sums = float[1][Memory::kColumns][4];
  finish_tile<false, PROJECT, SLICED>(shared, reinterpret_cast<Sums&>(total),
                                      reinterpret_cast<Sums&>(rest), square, square_lost, x, y,
                                      center, out, slices);
#else
  __trap();  // has_warpgroups in cuda/runtime.h
#endif
}

// The same for Rounded references. A panel has new sums, which are added to the total. Products of
// two groups of 64 queries are under way at a time.
template <int QUERIES, bool PROJECT, bool SLICED>
__global__ void __launch_bounds__(kDistanceThreads, 1)
    rounded_warpgroup_distances(const Halves x, const Rows<Rounded> y, const Center center,
                                const Pairs out, const Slices slices) {
  wait_for_earlier_launches();
#if defined(PFGM_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = WarpgroupMemory<Rounded, QUERIES>;
  constexpr int kGroups = QUERIES / kOfProduct;  // of queries
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int reference0 = static_cast<int>(blockIdx.x) * Memory::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * QUERIES;
  if constexpr (!PROJECT && !SLICED) clear_list(out);
  load_queries<!PROJECT && !SLICED>(shared, x, query0, out);
  const float factor = *center.scale;
  float total[kGroups][kOfProduct / 8][4] = {};
  float sums[2][kOfProduct / 8][4] = {};  // of a panel: of two groups, whose products are under way
  // Never. If the compiler knew, it would take more registers for sums and spill.
  const bool adds = center.features < 0;
  float square[2] = {}, square_lost[2] = {}, squares[2];
  const BlockPanels panels = panels_of_block<SLICED>(center.features, slices);
  WarpgroupStages<Rounded, QUERIES> stages(shared, x, query0, y, reference0, center, panels);
  constexpr int kAhead = stages.kAhead;

  for (int p = 0; p < kAhead; ++p) stages.begin(p);
  stages.template arrive<kAhead - 1>();
  stages.convert(0, factor, lane, squares);
#pragma unroll 1
  for (int p = 0; p < panels.count; ++p) {
    const ReferencePanel panel = load_panel(stages.slab(p, lane), lane);
    const auto begin = [&](int n) {
      begin_rounded_panel(sums[n % 2], panel, stages.at(p), n, adds);
    };
    begin(0);
    for (int e = 0; e < 2; ++e) add_compensated(square[e], square_lost[e], squares[e]);
    stages.template arrive<kAhead - 2>();
    stages.begin(p + kAhead);  // in place of panel p − 1, whose products are done
    begin(1);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (n + 1 < kGroups)
        wait_products<1>();
      else
        wait_products<0>();
      add_rounded_panel(total[n], sums[n % 2]);
      if (n + 2 < kGroups) begin(n + 2);
      if (n + 2 == kGroups) stages.convert(p + 1, factor, lane, squares);
    }
  }
  wait_copies<0>();
  __syncthreads();

  using Sums = float[1][Memory::kColumns][4];
  float none[1][Memory::kColumns][4] = {};
  finish_tile<false, PROJECT, SLICED>(shared, reinterpret_cast<Sums&>(total), none, square,
                                      square_lost, x, y, center, out, slices);
#else
  __trap();
#endif
}

}  // namespace
}  // namespace pfgm
