// Tiles of 128 × 128 distances with the asynchronous products of warpgroups (sm_90a), which reach
// the rate of Hopper's matrix units. Products of a panel and their sums are those of `distances`,
// but for the order of the features in a panel.
#pragma once
#include "cuda/distances.h"

namespace pfgm {
namespace {

// A block has two warpgroups. A warp has 16 references and all queries. It copies its references
// itself, and converts them one panel ahead, in their place. Queries are operands in shared memory.
struct WarpgroupMemory {
  static constexpr int kQueries = 128, kReferences = 128, kStages = 4;
  static constexpr int kSlabs = 1, kSides = 1, kParts = 1, kColumns = kQueries / 8;
  static constexpr int kGroups = kReferences / 16, kFeatures = kPanel;
  static constexpr int kPieces = kPanel / 8;  // of 8 features
  struct Stage {
    std::uint16_t x[2][kPieces][kQueries][8];  // part, piece, query
    // The 16-byte pieces of a row trade places, so that the accesses of a warp, which are 8 bytes
    // of four rows at a time, reach different banks.
    float y[kReferences][kPanel];
    float center[kPanel];
  };
  struct Sums {
    double squares[1][kReferences];
    double low[kReferences / 16][kQueries];
    double farthest[kReferences / 16];
  };
  union {
    Stage stages[kStages];
    Sums sums;
  };
  double units[kQueries], norms[kQueries];
};
constexpr std::size_t kSharedLimitOfWarpgroups = 227 << 10;  // of sm_90
static_assert(sizeof(WarpgroupMemory) <= kSharedLimitOfWarpgroups, "a block fits on sm_90");

__device__ inline int place_of_piece(int row, int piece) { return piece ^ 2 * (row % 4); }

// Copies panel after panel of aligned rows. In place of rows after the last a thread copies another
// one; their distances are not stored.
class WarpgroupCopy {
 public:
  // Starts at the feature `first`.
  __device__ WarpgroupCopy(const Halves& x, int query0, const Rows<float>& y, int reference0,
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

  __device__ void next(WarpgroupMemory::Stage& stage) {
    const int known = left_ - 4 * piece_, count = known < 0 ? 0 : known < 4 ? known : 4;
    float* const to = stage.y[row_] + 4 * place_of_piece(row_, piece_);
#pragma unroll
    for (int i = 0; i < 16 / kStep; ++i)
      copy_async<16>(to + i * kStep * kPanel, i * kStep < rows_ ? from_ + i * apart_ : from_,
                     count * static_cast<int>(sizeof(float)));
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kPanel / 4)
      copy_async<16>(&stage.center[4 * thread],
                     center_.scaled + (center_.features - left_) + 4 * thread);
    auto& x = stage.x;
#pragma unroll
    for (int i = 0; i < WarpgroupMemory::kQueries; i += kQueryStep) {
      const std::uint16_t* const high = i < queries_ ? high_ + i * center_.width : high_;
      copy_async<16>(x[0][query_piece_][query_ + i], high);
      copy_async<16>(x[1][query_piece_][query_ + i], high + to_low_);
    }
    from_ += kPanel, high_ += kPanel, left_ -= kPanel;
  }

 private:
  static constexpr int kStep = 4;  // rows of references, from one copy of a thread to the next
  static constexpr int kQueryStep = kDistanceThreads / WarpgroupMemory::kPieces;
  static_assert(WarpgroupMemory::kPieces == 4, "a warp copies all pieces of eight queries");

  const Center& center_;
  const Index to_low_, apart_;  // from a high part to the low part; between rows of y
  int left_, row_, piece_, query_, query_piece_;
  int rows_, queries_;  // rows that there are from the first one of this thread on
  const float* from_;
  const std::uint16_t* high_;
};

// A panel of 16 references as operands: references g and g + 8, features 2t, 2t + 1, 2t + 8 and
// 2t + 9 of each 16. squares[e] is the sum of the squares of reference g + 8e.
__device__ inline ReferencePanel convert_for_warpgroup(const WarpgroupMemory::Stage& stage,
                                                       float scale, const Lane& lane,
                                                       float (&squares)[2]) {
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
      squares[e] += first * first + second * second;
      const TwoHalves parts = split_halves(first, second);
      panel.high[i / 2][i % 2 * 2 + e] = parts.high;
      panel.low[i / 2][i % 2 * 2 + e] = parts.low;
    }
  }
  return panel;
}

// Half of the queries, of a warp.
using HalfOfSums = float[WarpgroupMemory::kColumns / 2][4];

// Begins the products of a panel with half of the queries, in the order of add_products.
__device__ inline void begin_panel(HalfOfSums& rest, const ReferencePanel& y,
                                   const WarpgroupMemory::Stage& stage, int half) {
  constexpr int kHalf = WarpgroupMemory::kQueries / 2, kApart = sizeof stage.x[0][0];
  const auto x = [&](int part, int i) { return stage.x[part][2 * i][half * kHalf]; };
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
__device__ inline void add_panel(HalfOfSums& total, HalfOfSums& rest) {
  keep_in_place(rest);
#pragma unroll
  for (int n = 0; n < WarpgroupMemory::kColumns / 2; ++n)
    for (int e = 0; e < 4; ++e) {
      float &sum = total[n][e], &value = rest[n][e];
      const float larger = sum + value;
      value -= larger - sum;
      sum = larger;
    }
}

// Slices as in distances.
template <bool PROJECT, bool SLICED>
__global__ void __launch_bounds__(kDistanceThreads, 1)
    warpgroup_distances(const Halves x, const Rows<float> y, const Center center, const Pairs out,
                        const Slices slices) {
  wait_for_earlier_launches();
#if defined(PFGM_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = WarpgroupMemory;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int reference0 = static_cast<int>(blockIdx.x) * Memory::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * Memory::kQueries;
  if constexpr (!PROJECT && !SLICED) clear_list(out);
  if (const int q = static_cast<int>(threadIdx.x); q < Memory::kQueries) {
    const int query = query0 + q < x.rows ? query0 + q : 0;
    shared.units[q] = x.units[query];
    if constexpr (!PROJECT && !SLICED) shared.norms[q] = out.norms[query];
  }
  const float factor = *center.scale;
  float total[2][Memory::kColumns / 2][4] = {}, rest[2][Memory::kColumns / 2][4] = {};
  float square[2] = {}, square_lost[2] = {}, squares[2];
  const int first = SLICED ? static_cast<int>(blockIdx.z) * slices.trips : 0;  // panel
  const int left = static_cast<int>(divide_up(center.features, kPanel)) - first;
  const int panels = SLICED && slices.trips < left ? slices.trips : left;
  WarpgroupCopy copy(x, query0, y, reference0, center, first * kPanel);
  const auto stage_of = [&](int p) -> Memory::Stage& { return shared.stages[p % Memory::kStages]; };
  const auto stage = [&](int p) {
    if (p < panels) copy.next(stage_of(p));
    commit_copies();
  };
  // Panel p has arrived, for all threads and their products.
  const auto arrive = [&](auto pending) {
    wait_copies<decltype(pending)::value>();
    publish_shared();
    __syncthreads();
  };
  const auto slab_of = [&](int p) { return stage_of(p).y[16 * lane.warp]; };
  // After the last panel this converts what nothing reads.
  const auto convert_ahead = [&](int p) {
    const ReferencePanel panel = convert_for_warpgroup(stage_of(p), factor, lane, squares);
    __syncwarp();  // all values are read
    store_panel(slab_of(p), panel, lane);
    __syncwarp();
  };

  for (int p = 0; p < Memory::kStages - 1; ++p) stage(p);
  arrive(std::integral_constant<int, Memory::kStages - 2>());
  convert_ahead(0);
#pragma unroll 1
  for (int p = 0; p < panels; ++p) {
    const ReferencePanel y = load_panel(slab_of(p), lane);
    begin_panel(rest[0], y, stage_of(p), 0);
    for (int e = 0; e < 2; ++e) add_compensated(square[e], square_lost[e], squares[e]);
    arrive(std::integral_constant<int, Memory::kStages - 3>());
    stage(p + Memory::kStages - 1);  // in place of panel p − 1, whose products are done
    begin_panel(rest[1], y, stage_of(p), 1);
    convert_ahead(p + 1);
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
#endif
}

}  // namespace
}  // namespace pfgm
