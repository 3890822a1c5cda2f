// Lists of references that blocks share out evenly, for weighted sums of many queries with
// asynchronous products (cuda/warpgroup_sums.h). Such a block has more queries and features than
// one of weighted_sum, so it reads references and weights less often. Its products are the same.
//
// A multiprocessor has room for one block. A block may add up the end of one list and the beginning
// of another.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

// Each group has a list for each slice of the features, with the same references. The work of a
// list is counted in panels: kListPanels unless it is empty, and then its own. Lists follow each
// other, by groups.
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
    of_list = listed > 0 ? kListPanels + divide_up32(listed, kPanel) : 0;
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
    found.first = done < kListPanels ? 0 : done - kListPanels;
    found.panels = done + found.work - kListPanels - found.first;
    found.part = static_cast<int>(blockIdx.x) - (list + kListPanels) / share.each;
    return found;
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
    const Index of_slice = segment.slice * static_cast<Index>(parts.queries);
    parts.counts[of_slice + shared.queries[thread]] = segment.part + 1;
  }
}

}  // namespace
}  // namespace pfgm
