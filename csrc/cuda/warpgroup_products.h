// Products of a tile of queries and references with asynchronous products of warpgroups (sm_90a),
// which reach the rate of Hopper's matrix units: the main loop of `distances` (cuda/distances.h)
// for many pairs. Products of a panel are those of WarpProducts, but for the order of the features
// in a panel. The panels are added up in another way.
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// A block has a warpgroup for each 64 references. A warp has 16 references and all queries. It
// copies its references itself, and converts them in registers. Queries are operands in shared
// memory.
template <class R, int QUERIES, int REFERENCES>
struct WarpgroupShape {
  using Reference = R;
  static constexpr int kQueries = QUERIES, kReferences = REFERENCES, kThreads = 2 * REFERENCES;
  static constexpr int kBlocks = 1;
  static constexpr int kStages = kThreads > 256 ? 3 : 4;
  static constexpr int kSlabs = 1, kSides = 1, kParts = 1;
  static constexpr int kColumns = kQueries / 8;
  // Turns in which the columns are finished. More columns at once would take too many registers.
  static constexpr int kTurns = kColumns > 16 || kThreads > 256 ? 2 : 1;
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
  struct Memory {
    Stage stages[kStages];
    float totals[kRounded<R> ? 1 : kColumns][kSlabs][4][kThreads];  // unused if Rounded
  };
  // When the loop has ended, totals are still needed.
  static constexpr std::size_t kReusable = kRounded<R> ? ~std::size_t{0} : kStages * sizeof(Stage);
};

__device__ inline int place_of_piece(int row, int piece) { return piece ^ 2 * (row % 4); }

// Copies panel after panel of aligned rows. In place of rows after the last a thread copies another
// one; their distances are not stored.
template <class Shape>
class WarpgroupCopy {
 public:
  using R = typename Shape::Reference;

  // Starts at the feature `first`.
  __device__ WarpgroupCopy(const Halves& x, int query0, const Rows<R>& y, int reference0,
                           const Center& center, int first)
      : x_(x), apart_(kStep * y.stride), width_(center.width), center_(center.scaled + first) {
    const Lane lane = this_lane();
    const int row = kRows * lane.warp + lane.lane / 8, piece = lane.lane % 8;
    // Eight lanes write the same piece of eight queries, which lie in different banks.
    const int query = 8 * lane.warp + lane.lane % 8, query_piece = lane.lane / 8;
    rows_ = static_cast<int>(y.count) - reference0 - row, queries_ = x.rows - query0 - query;
    left_ = center.features - first - 4 * piece;
    from_ = y.row(rows_ > 0 ? reference0 + row : 0) + first + 4 * piece;
    to_ = row * kPanel + 4 * place_of_piece(row, piece);
    from_query_ =
        static_cast<unsigned>(queries_ > 0 ? query0 + query : 0) * width_ + first + 8 * query_piece;
    to_query_ = 8 * (query_piece * Shape::kQueries + query);
  }

  // Starts the copies of the next panel of the warp's references.
  __device__ void next_references(typename Shape::Stage& stage) {
    const int count = left_ < 0 ? 0 : left_ < 4 ? left_ : 4;
    R* const to = stage.y[0] + to_;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i)
      copy_async<16>(to + i * kStep * kPanel, i * kStep < rows_ ? from_ + i * apart_ : from_,
                     count * static_cast<int>(sizeof(R)));
    from_ += kPanel, left_ -= kPanel;
  }

  // The same for panel p of the centre.
  __device__ void copy_center(typename Shape::Stage& stage, int p) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kPanel / 4)
      copy_async<16>(&stage.center[4 * thread], center_ + p * kPanel + 4 * thread);
  }

  // The same for panel p of the queries.
  __device__ void copy_queries(typename Shape::Stage& stage, int p) const {
    if (static_cast<int>(threadIdx.x) >= kCopyThreads) return;
#pragma unroll
    for (int i = 0; i < Shape::kQueries; i += kQueryStep) {
      const unsigned from = from_query_ + (i < queries_ ? i * width_ : 0) + p * kPanel;
      copy_async<16>(stage.x[0][0][0] + to_query_ + 8 * i, x_.high + from);
      if constexpr (!kRounded<R>)
        copy_async<16>(stage.x[1][0][0] + to_query_ + 8 * i, x_.low + from);
    }
  }

 private:
  static constexpr int kRows = 32 * Shape::kReferences / Shape::kThreads;  // of a warp
  static constexpr int kStep = 4;  // rows of references, from one copy of a thread to the next
  static constexpr int kCopyThreads = 256;  // that copy queries
  static constexpr int kQueryStep = kCopyThreads / Shape::kPieces;
  static_assert(Shape::kPieces == 4, "a warp copies all pieces of eight queries");
  static_assert(Shape::kThreads >= kCopyThreads && Shape::kQueries % kQueryStep == 0);

  const Halves& x_;
  const Index apart_;     // between rows of y
  const unsigned width_;  // of x
  const float* const center_;
  int left_;            // features from the first one that this thread copies on
  int rows_, queries_;  // rows that there are from the first one of this thread on
  const R* from_;
  unsigned from_query_;  // in x
  int to_, to_query_;    // in a stage
};

// A panel of a warp's references as operands: references g and g + 8, features 2t, 2t + 1, 2t + 8
// and 2t + 9 of each half. squares[e] is the sum of the squares of reference g + 8e, of their high
// parts if R is Rounded.
template <class R>
__device__ inline ReferencePanel convert_rows(const R (*rows)[kPanel], const float* center,
                                              float scale, const Lane& lane, float (&squares)[2]) {
  ReferencePanel panel;
  squares[0] = squares[1] = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int feature = 16 * half + 8 * i + 2 * lane.t;
      const float2 c = *reinterpret_cast<const float2*>(center + feature);
      for (int e = 0; e < 2; ++e) {
        const float2 y = *reinterpret_cast<const float2*>(
            rows[lane.g + 8 * e] + 4 * place_of_piece(lane.g, feature / 4) + feature % 4);
        const float first = y.x * scale - c.x, second = y.y * scale - c.y;
        const TwoHalves parts = split_halves(first, second);
        squares[e] += kRounded<R> ? sum_of_squares(parts.high) : first * first + second * second;
        panel.high[half][2 * i + e] = parts.high, panel.low[half][2 * i + e] = parts.low;
      }
    }
  __syncwarp();  // all values are read
  return panel;
}

// What a block copies and computes with, panel after panel of its slice of the features.
//
// A warp's references are free when it has converted them. Others may still read the centre, so it
// comes with the queries. These are free when all products with them are done, so their copies
// begin later.
template <class Shape>
class WarpgroupStages {
 public:
  using R = typename Shape::Reference;

  __device__ WarpgroupStages(typename Shape::Memory& shared, const Halves& x, int query0,
                             const Rows<R>& y, int reference0, const Center& center, int first,
                             int panels)
      : shared_(shared), copy_(x, query0, y, reference0, center, first), panels_(panels) {}

  __device__ typename Shape::Stage& at(int p) { return shared_.stages[p % kStages]; }
  // The references of this warp in a panel.
  __device__ R (*rows(int p, const Lane& lane))[kPanel] { return at(p).y + 16 * lane.warp; }

  // Starts the copies of the first panels, 2·kStages − 1 groups.
  __device__ void start() {
    begin_references(0);
    for (int p = 0; p < kStages - 1; ++p) begin_references(p + 1), begin_queries(p);
  }
  // Before the first panel: its queries and the references of the next one arrive. 2·kStages − 4
  // groups of copies follow them.
  __device__ void arrive_first() { arrive<2 * kStages - 4>(); }
  // In panel p, when its references are converted.
  __device__ void replace_references(int p) { begin_references(p + kStages); }
  // After replace_references(p): the queries of panel p + 1 arrive, which 2·kStages − 5 groups
  // follow, and before them its references.
  __device__ void arrive_next() { arrive<2 * kStages - 5>(); }
  // In panel p, when the products of panel p − 1 are done.
  __device__ void replace_queries(int p) { begin_queries(p + kStages - 1); }

 private:
  static constexpr int kStages = Shape::kStages;

  // A group of copies each, in this order: references of panel p + 1, queries of panel p.
  __device__ void begin_references(int p) {
    if (p < panels_) copy_.next_references(at(p));
    commit_copies();
  }
  __device__ void begin_queries(int p) {
    if (p < panels_) {
      copy_.copy_center(at(p), p);
      copy_.copy_queries(at(p), p);
    }
    commit_copies();
  }
  // All but the newest PENDING groups have arrived, for all threads and their products.
  template <int PENDING>
  __device__ void arrive() {
    wait_copies<PENDING>();
    publish_shared();
    __syncthreads();
  }

  typename Shape::Memory& shared_;
  WarpgroupCopy<Shape> copy_;
  const int panels_;
};

// Sums of a warp with 64 queries, which one instruction computes.
constexpr int kProductQueries = 64;
using PanelSums = float[kProductQueries / 8][4];

// Begins the products of a panel with band `band` of 64 queries, in the order of
// add_products or add_rounded_products.
template <bool ROUNDED, class Stage>
__device__ inline void begin_panel(PanelSums& sums, const ReferencePanel& y, const Stage& stage,
                                   int band, bool adds) {
  constexpr int kApart = sizeof stage.x[0][0];
  const auto x = [&](int part, int i) { return stage.x[part][2 * i][band * kProductQueries]; };
  keep_in_place(sums);
  begin_products();
  if constexpr (ROUNDED) {
    begin_product(sums, y.high[0], x(0, 0), kApart, adds);
  } else {
    begin_product(sums, y.low[0], x(0, 0), kApart, adds);
    begin_product(sums, y.low[1], x(0, 1), kApart);
#pragma unroll
    for (int i = 0; i < 2; ++i) begin_product(sums, y.high[i], x(1, i), kApart);
    begin_product(sums, y.high[0], x(0, 0), kApart);
  }
  begin_product(sums, y.high[1], x(0, 1), kApart);
  commit_products();
}

// Adds the products of a panel with 64 queries to the sums with all queries.
template <int COLUMNS>
__device__ inline void add_panel(float (&sums)[1][COLUMNS][4], PanelSums& panel, int group) {
  keep_in_place(panel);
#pragma unroll
  for (int n = 0; n < kProductQueries / 8; ++n)
    for (int e = 0; e < 4; ++e) sums[0][group * kProductQueries / 8 + n][e] += panel[n][e];
}

// Panels whose products one float adds up. Their sum then goes to the total, and the next sum
// begins with what the total cannot hold. weight_law knows the error.
constexpr int kAddedPanels = 14;

__device__ inline void add_to_total(float& total, float& sum) {
  const float old = total, larger = old + sum;
  total = larger;
  sum -= larger - old;
}

template <int COLUMNS, int THREADS>
__device__ inline void add_to_totals(float (&totals)[COLUMNS][1][4][THREADS],
                                     float (&sums)[1][COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
    for (int e = 0; e < 4; ++e) add_to_total(totals[n][0][e][threadIdx.x], sums[0][n][e]);
}

// Totals of a thread in shared memory.
template <int SLABS, int THREADS>
struct SumsInMemory {
  const float (*columns)[SLABS][4][THREADS];

  __device__ float at(int slab, int column, int i) const {
    return columns[column][slab][i][threadIdx.x];
  }
  template <int COUNT>
  __device__ void drop() {
    columns += COUNT;
  }
};

// Zero for all sums.
struct NoSums {
  __device__ float at(int, int, int) const { return 0; }
  template <int COUNT>
  __device__ void drop() {}
};

// ---- the main loop -----------------------------------------------------------------------------

// As WarpProducts. A warpgroup multiplies 64 queries at a time. While it adds up the products and
// converts the next references, matrix units multiply for another warpgroup. If it converted them
// earlier, they would go through shared memory, which is nearly as busy as the units. For Rounded
// references one float adds up all panels.
template <class R, int QUERIES, int REFERENCES>
class WarpgroupProducts : public WarpgroupShape<R, QUERIES, REFERENCES> {
 public:
  using Shape = WarpgroupShape<R, QUERIES, REFERENCES>;
  using Shape::kColumns;
  using typename Shape::Memory;
  static constexpr bool kGeforce = false;

  // See has_warpgroups in cuda/runtime.h.
  __device__ static constexpr bool is_unused() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return false;
#else
    return true;
#endif
  }

  __device__ WarpgroupProducts(Memory& shared, const Halves& x, int query0, const Rows<R>& y,
                               int reference0, const Center& center, int first, int panels)
      : shared_(shared),
        factor_(*center.scale),
        adds_(center.features < 0),
        panels_(panels),
        stages_(shared, x, query0, y, reference0, center, first, panels) {}

  // Calls finish(total, rest) with the sums of the thread, which are total + rest. Leaves the
  // squares of the references in `tile`.
  template <Target TARGET, class Sums, class Finish>
  __device__ void run(Sums& tile, const Finish& finish) {
    constexpr int kQueryGroups = QUERIES / kProductQueries;
    float sums[1][kColumns][4] = {}, square[2] = {}, square_lost[2] = {};
    PanelSums panel_sums = {};
    const auto step = [&](int p) {
      float squares[2];
      const ReferencePanel panel =
          convert_rows<R>(stages_.rows(p, lane_), stages_.at(p).center, factor_, lane_, squares);
      const auto begin = [&](int group) {
        begin_panel<kRounded<R>>(panel_sums, panel, stages_.at(p), group, adds_);
      };
      stages_.replace_references(p);
      begin(0);
      stages_.arrive_next();
      stages_.replace_queries(p);
      for (int e = 0; e < 2; ++e) add_compensated(square[e], square_lost[e], squares[e]);
#pragma unroll
      for (int group = 0; group < kQueryGroups; ++group) {
        wait_products<0>();
        add_panel(sums, panel_sums, group);
        if (group < kQueryGroups - 1) begin(group + 1);
      }
    };
    const auto end_loop = [&] {
      wait_copies<0>();
      __syncthreads();
      tile.store_squares(0, 16 * lane_.warp, lane_, square, square_lost);
    };

    stages_.start();
    stages_.arrive_first();
    if constexpr (kRounded<R>) {
#pragma unroll 1
      for (int p = 0; p < panels_; ++p) step(p);
      end_loop();
      finish(SumsInRegisters<1, kColumns>{sums}, NoSums{});
    } else {
      constexpr bool kSlice = TARGET == Target::slice;
      auto& totals = shared_.totals;
      for (auto& column : totals)
        for (auto& each : column[0]) each[threadIdx.x] = 0;
#pragma unroll 1
      for (int p = 0;;) {
        const int left = panels_ - p, end = p + (left < kAddedPanels ? left : kAddedPanels);
#pragma unroll 1
        for (; p < end; ++p) step(p);
        if (!kSlice && p == panels_) break;  // finish_tile adds both up
        add_to_totals(totals, sums);
        if (kSlice && p == panels_) break;
      }
      end_loop();
      finish(SumsInMemory<1, Shape::kThreads>{totals}, SumsInRegisters<1, kColumns>{sums});
    }
  }

 private:
  Memory& shared_;
  const Lane lane_ = this_lane();
  const float factor_;
  // Always false, but hidden from the compiler, which would otherwise spill.
  const bool adds_;
  const int panels_;
  WarpgroupStages<Shape> stages_;
};

}  // namespace
}  // namespace pfgm
