// Tiles of many pairs with products in tensor memory (sm_100f), which reach the rate of Blackwell's
// matrix units. Products of a panel are those of `distances`, but for the order of the features in
// a panel. The panels are added up as in warpgroup_distances.
#pragma once
#include "cuda/warpgroup_distances.h"

namespace pfgm {
namespace {

// A block has 128 references and 128 queries. Warp w copies references 16w to 16w + 15. It converts
// half of the features of references 32(w mod 4) to 32(w mod 4) + 31, and adds up their products
// with half of the queries. Both factors of products are operands in shared memory.
template <class R>
struct TensorMemoryTile {
  static constexpr int kQueries = 128, kReferences = 128, kThreads = 256;
  static constexpr int kStages = 2;
  static constexpr int kSlabs = 2, kSides = 2, kParts = 1, kSquareParts = kSides;
  static constexpr int kGroups = kReferences / 16 / kSlabs, kFeatures = kPanel;
  static constexpr int kColumns = kQueries / kSides / 8, kTurns = 2;
  static constexpr int kPieces = kPanel / 8;  // of 8 features
  static constexpr int kQueryParts = kRounded<R> ? 1 : 2;
  // Columns of tensor memory: the sums of a panel, and the totals if one float does not add up all
  // panels.
  static constexpr int kTensorColumns = kRounded<R> ? kQueries : 2 * kQueries;
  struct Stage {
    std::uint16_t x[kQueryParts][kPieces][kQueries][8];  // part, piece, query
    R y[kReferences][kPanel];                            // place_of_piece
    float center[kPanel];
  };
  struct Operands {
    std::uint16_t y[kQueryParts][kPieces][kReferences][8];  // part, piece, reference
  };
  struct Loop {
    Stage stages[kStages];
    Operands operands;
  };
  struct Sums {
    float totals[kRounded<R> ? 1 : kColumns][kSlabs][4][kThreads];  // unused if Rounded
    double squares[kSquareParts][kReferences];
    LeastOfRows<kQueries, 8 * kGroups, kThreads> least;
    double farthest[kReferences / 16];
  };
  union {
    Loop loop;
    Sums sums;
  };
  double units[kQueries], norms[kQueries];
  std::uint64_t done;           // the products of a panel
  std::uint32_t tensor_memory;  // its address
};
static_assert(2 * (sizeof(TensorMemoryTile<float>) + 1024) <= 228 << 10 &&
                  2 * TensorMemoryTile<float>::kTensorColumns <= 512,
              "two blocks fit on sm_100");

// Converts eight features of a lane's reference for products. Returns the sum of their squares, of
// those of their high parts if R is Rounded.
template <class R, class Memory>
__device__ inline float convert_piece(typename Memory::Operands& to,
                                      const typename Memory::Stage& stage, int piece, float scale,
                                      const Lane& lane) {
  const int row = 32 * (lane.warp % Memory::kGroups) + lane.lane;
  const int odd = lane.lane / 4 % 2;  // so that eight lanes read from different banks
  float v[2][4], c[2][4], squares = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int four = 2 * piece + (i ^ odd);
    load4(stage.y[row] + 4 * place_of_piece(row, four), v[i]);
    load4(stage.center + 4 * four, c[i]);
  }
  std::uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float *const values = &v[i / 2][i % 2 * 2], *const centers = &c[i / 2][i % 2 * 2];
    const float a = values[0] * scale - centers[0], b = values[1] * scale - centers[1];
    const TwoHalves parts = split_halves(a, b);
    squares += kRounded<R> ? sum_of_squares(parts.high) : a * a + b * b;
    high[i] = parts.high, low[i] = parts.low;
  }
  const auto store = [&](int part, const std::uint32_t (&words)[4]) {
    uint4& all = *reinterpret_cast<uint4*>(to.y[part][piece][row]);
    all = odd ? uint4{words[2], words[3], words[0], words[1]}
              : uint4{words[0], words[1], words[2], words[3]};
  };
  store(0, high);
  if constexpr (!kRounded<R>) store(1, low);
  return squares;
}

// Begins the products of a panel, in the order of add_products or add_rounded_products.
template <bool ROUNDED, class Memory>
__device__ inline void begin_panel_in_memory(std::uint32_t sums,
                                             const typename Memory::Operands& operands,
                                             const typename Memory::Stage& stage) {
  constexpr int kApart = sizeof operands.y[0][0], kQueriesApart = sizeof stage.x[0][0];
  const auto begin = [&](int part_of_y, int part_of_x, int half, bool adds) {
    begin_product_in_memory<Memory::kQueries>(sums, operands.y[part_of_y][2 * half], kApart,
                                              stage.x[part_of_x][2 * half], kQueriesApart, adds);
  };
  if constexpr (!ROUNDED) {
    for (int half = 0; half < 2; ++half) begin(1, 0, half, half > 0);
    for (int half = 0; half < 2; ++half) begin(0, 1, half, true);
  }
  for (int half = 0; half < 2; ++half) begin(0, 0, half, !ROUNDED || half > 0);
}

// Sums of a warp's 16 references with 32 queries, which one instruction loads.
constexpr int kLoaded = 4;  // columns of 8 queries
using LoadedSums = float[kLoaded][4];

// Where tensor memory has these, from the first ones of a warp on.
__device__ inline std::uint32_t place_of_sums(std::uint32_t first, int slab, int column) {
  return first + (16u * slab << 16) + 8u * column;
}

// Calls each(slab, column, sums) for all sums of a warp, COLUMNS columns in each slab.
template <int COLUMNS, class Each>
__device__ inline void for_sums_in_memory(std::uint32_t first, const Each& each) {
#pragma unroll
  for (int slab = 0; slab < 2; ++slab)
#pragma unroll
    for (int column = 0; column < COLUMNS; column += kLoaded) {
      LoadedSums loaded;
      load_tensor_memory(loaded, place_of_sums(first, slab, column));
      wait_loads();
      keep_in_place(loaded);
      each(slab, column, loaded);
    }
}

// Slices as in distances. Products of a panel, their addition and the conversion of the next panel
// follow each other. Meanwhile the other block of the multiprocessor is at another of these steps.
// For Rounded references one float adds up all panels. Totals of others are in tensor memory.
template <class R, bool PROJECT, bool SLICED>
__global__ void __launch_bounds__(TensorMemoryTile<R>::kThreads, 2)
    tensor_memory_distances(const Halves x, const Rows<R> y, const Center center, const Pairs out,
                            const Slices slices) {
  wait_for_earlier_launches();
#ifdef PFGM_MULTIPLIES_IN_TENSOR_MEMORY
  using Memory = TensorMemoryTile<R>;
  constexpr int kSlabs = Memory::kSlabs, kColumns = Memory::kColumns;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int group = lane.warp % Memory::kGroups, side = lane.warp / Memory::kGroups;
  const int reference0 = static_cast<int>(blockIdx.x) * Memory::kReferences;
  const int query0 = static_cast<int>(blockIdx.y) * Memory::kQueries;
  if constexpr (!PROJECT && !SLICED) clear_list(out);
  if (lane.warp == 0) take_tensor_memory<Memory::kTensorColumns>(&shared.tensor_memory);
  if (threadIdx.x == 0) start_signal(&shared.done);
  const float factor = *center.scale;
  float sums[kSlabs][kColumns][4] = {};
  float square = 0, square_lost = 0;
  const BlockPanels panels = panels_of_block<SLICED>(center.features, slices);
  WarpgroupStages<R, Memory, false> stages(shared, x, query0, y, reference0, center, panels);
  // After the last panel this converts what nothing reads.
  const auto convert = [&](int p) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < Memory::kPieces / Memory::kSides; ++i) {
      squares += convert_piece<R, Memory>(shared.loop.operands, stages.at(p),
                                          side + Memory::kSides * i, factor, lane);
    }
    add_compensated(square, square_lost, p < panels.count ? squares : 0);
  };

  stages.start();
  order_before_barrier();
  stages.arrive_first();
  order_after_barrier();
  // The sums and totals of this warp: rows of its references, columns of its queries.
  const std::uint32_t of_panel = shared.tensor_memory + (32u * group << 16) + 8 * kColumns * side;
  const std::uint32_t totals = of_panel + Memory::kQueries;
  if constexpr (!kRounded<R>) {
    const LoadedSums none = {};
    for (int slab = 0; slab < kSlabs; ++slab)
      for (int column = 0; column < kColumns; column += kLoaded)
        store_tensor_memory(place_of_sums(totals, slab, column), none);
    wait_stores();
  }
  convert(0);
  const auto take_panel = [&](int p) {
    order_before_barrier();  // the sums of the panel before are in registers
    stages.arrive_panel();
    if (lane.warp == 0 && is_elected()) {
      order_after_barrier();
      begin_panel_in_memory<kRounded<R>, Memory>(shared.tensor_memory, shared.loop.operands,
                                                 stages.at(p));
      signal_products(&shared.done);
    }
    stages.replace_references(p);
    stages.replace_queries(p);
    wait_for_signal(&shared.done, p);
    order_after_barrier();
    for_sums_in_memory<kColumns>(of_panel, [&](int slab, int column, const LoadedSums& more) {
#pragma unroll
      for (int n = 0; n < kLoaded; ++n)
        for (int e = 0; e < 4; ++e) sums[slab][column + n][e] += more[n][e];
    });
    convert(p + 1);
  };
  const auto add_to_totals_in_memory = [&] {
    for_sums_in_memory<kColumns>(totals, [&](int slab, int column, LoadedSums& total) {
#pragma unroll
      for (int n = 0; n < kLoaded; ++n)
        for (int e = 0; e < 4; ++e) add_to_total(total[n][e], sums[slab][column + n][e]);
      store_tensor_memory(place_of_sums(totals, slab, column), total);
    });
    wait_stores();
  };
  if constexpr (kRounded<R>) {
#pragma unroll 1
    for (int p = 0; p < panels.count; ++p) take_panel(p);
  } else {
#pragma unroll 1
    for (int p = 0;;) {
      const int left = panels.count - p, end = p + (left < kAddedPanels ? left : kAddedPanels);
#pragma unroll 1
      for (; p < end; ++p) take_panel(p);
      if (!SLICED && p == panels.count) break;  // finish_tile adds both up
      add_to_totals_in_memory();
      if (SLICED && p == panels.count) break;
    }
  }

  if constexpr (!SLICED) load_queries<!PROJECT>(shared, x, query0, out);
  wait_copies<0>();
  __syncthreads();  // no thread uses what the sums replace
  if constexpr (!kRounded<R>)
    for_sums_in_memory<kColumns>(totals, [&](int slab, int column, const LoadedSums& total) {
#pragma unroll
      for (int n = 0; n < kLoaded; ++n)
        for (int e = 0; e < 4; ++e)
          shared.sums.totals[column + n][slab][e][threadIdx.x] = total[n][e];
    });
  shared.sums.squares[side][32 * group + lane.lane] = static_cast<double>(square) - square_lost;
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  if (lane.warp == 0) return_tensor_memory<Memory::kTensorColumns>(shared.tensor_memory);
  using Sums = SumsInRegisters<kSlabs, kColumns>;
  if constexpr (kRounded<R>) {
    finish_tile<false, PROJECT, SLICED>(shared, Sums{sums}, NoSums(), x, y, center, out, slices);
  } else {
    finish_tile<false, PROJECT, SLICED>(shared,
                                        SumsInMemory<kSlabs, Memory::kThreads>{shared.sums.totals},
                                        Sums{sums}, x, y, center, out, slices);
  }
#else
  __trap();  // has_tensor_memory in cuda/runtime.h
#endif
}

}  // namespace
}  // namespace pfgm
