// Which references have a weight, on CUDA devices.
//
// Most weights are zero. Weighted sums take a group of queries at a time and stage only references
// that have a weight for any of them. Queries with similar numbers of weights need similar
// references, so these are taken together. The weights of the listed references are gathered,
// because they lie apart, and are read for each slice of the features.
//
// A large group reads each reference half as often for a query as a small one does, but its list is
// longer.
#pragma once
#include "cuda/weights.h"

namespace pfgm {
namespace {

constexpr int kSumRows = 32, kLargeSumRows = 64;  // queries of a small and of a large group
constexpr Index kMostReferences = 1 << 16;        // of a chunk, for places of 16 bits
constexpr int kRankedQueries = 16;                // of a block of order_queries
constexpr Index kLargeFrom = 256;  // queries of a block from which on groups are large
template <int ROWS> constexpr int kListThreads = 8 * ROWS;
// Panels of listed references that a block sums: kFewestPanels to kMostPanels, or more, up to
// kPartPanels, if the parts would not fit into memory.
constexpr int kFewestPanels = 4, kMostPanels = 16, kPartPanels = 64;
constexpr int kGatheredPanels = 64;  // of a block of list_references, at most

// How many bits are set before those of this thread's word: `count` earlier ones, and those of
// threads before it. `count` then counts the bits of all threads too. `before` has a place for each
// warp.
template <int THREADS>
__device__ inline int place_of_word(unsigned word, int& count, int* before) {
  const Lane lane = this_lane();
  int place = __popc(word);
  for (int apart = 1; apart < 32; apart *= 2) {
    const int lower = __shfl_sync(kAll, place, lane.lane - apart);
    if (lane.lane >= apart) place += lower;
  }
  __syncthreads();  // no thread uses the counts of earlier words any more
  if (lane.lane == 31) before[lane.warp] = place;
  __syncthreads();
  place += count - __popc(word);
#pragma unroll
  for (int v = 0; v < THREADS / 32; ++v) {
    if (v < lane.warp) place += before[v];
    count += before[v];
  }
  return place;
}

// Writes the indices of all set bits of `words` words to `to`, in ascending order, and returns
// their number. bits(w) is word w. The last index is repeated up to a whole panel. `before` has a
// place for each warp.
template <int THREADS, class Bits>
__device__ inline int list(int* to, int* before, int words, Bits bits) {
  const int thread = static_cast<int>(threadIdx.x);
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < words; start += THREADS) {
    const int w = start + thread;
    const unsigned word = w < words ? bits(w) : 0;
    int place = place_of_word<THREADS>(word, count, before);
    for (int b = 0; b < 32; ++b) {
      const int set = static_cast<int>(word >> b & 1u);
      if (set) to[place] = 32 * w + b;
      place += set;
    }
  }
  __syncthreads();
  const int place = count + thread;
  if (count > 0 && place < round_up(count, kPanel)) to[place] = to[count - 1];
  __syncthreads();
  return count;
}

// For each group of queries: the references of a chunk that have a weight for any of them.
struct Lists {
  int* listed;  // (groups, stride): which they are, and the last one again up to a whole panel
  int* counts;  // (groups): how many
  // (groups, stride, queries of a group): their weights, in panels of pair_place. Those of a
  // reference that is there again, and of queries after the last one, are zero.
  float* weights;
  Index stride;
};

// Sums over parts of the lists, so that queries with many weights have more blocks than others.
struct Parts {
  float* sums;  // (parts, queries, features); only parts with a listed reference are written
  int* counts;  // (queries): how many are written
  int queries;
  int panels;  // of listed references in a part
};

// How many weights of a query are not zero.
__device__ inline int live_weights(const PieceSums& sums, int query) {
  int count = 0;
#pragma unroll 4
  for (int piece = 0; piece < sums.pieces; ++piece)
    count += sums.live[static_cast<Index>(query) * sums.pieces + piece];
  return count;
}

// order[rank] is the query with the rank-th fewest weights that are not zero. Queries that follow
// each other then need similar references. Equal queries keep their order.
__global__ void __launch_bounds__(kQueryThreads)
    order_queries(const PieceSums sums, int queries, int* order) {
  wait_for_earlier_launches();
  let_next_launch_start();
  int* counts = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int query = thread; query < queries; query += kQueryThreads)
    counts[query] = live_weights(sums, query);
  __syncthreads();
  constexpr int kSharers = kQueryThreads / kRankedQueries;  // threads for a query
  const int own = static_cast<int>(blockIdx.x) * kRankedQueries + thread / kSharers;
  const int mine = own < queries ? counts[own] : 0;
  int rank = 0;
#pragma unroll 1
  for (int query = thread % kSharers; query < queries; query += kSharers)
    rank += counts[query] < mine || (counts[query] == mine && query < own);
  for (int apart = 1; apart < kSharers; apart *= 2) rank += __shfl_xor_sync(kAll, rank, apart);
  if (own < queries && thread % kSharers == 0) order[rank] = own;
}

// A word of 32 references has a bit for each that is listed. `place` is that of the first one.
struct ListedWord {
  unsigned bits;
  int place;
};

template <int ROWS>
struct ListMemory {
  int scratch[kListThreads<ROWS> / 32];
  int queries[ROWS];
  std::uint32_t keys[kListThreads<ROWS>];
  int listed[kPanel * kGatheredPanels];

  __device__ ListedWord* words() { return reinterpret_cast<ListedWord*>(this + 1); }
  static std::size_t bytes(Index references) {
    return sizeof(ListMemory) + sizeof(ListedWord) * divide_up(references, 32);
  }
};

// The order of at most kListThreads queries, as order_queries finds it. Every block finds it, and
// keeps the queries of its group.
template <int ROWS>
__device__ inline void order_few_queries(ListMemory<ROWS>& shared, const PieceSums& sums,
                                         int queries, int group, int* order) {
  const int query = static_cast<int>(threadIdx.x);
  // Keys have the order of the numbers of weights, and of equal queries.
  std::uint32_t key = ~0u;
  if (query < queries)
    key = static_cast<std::uint32_t>(live_weights(sums, query) * kListThreads<ROWS> + query);
  shared.keys[query] = key;
  __syncthreads();
  int rank = 0;
#pragma unroll 4
  for (int other = 0; other < queries; other += 4) {
    const uint4 keys = *reinterpret_cast<const uint4*>(&shared.keys[other]);
    rank += (keys.x < key) + (keys.y < key) + (keys.z < key) + (keys.w < key);
  }
  if (query >= queries) return;
  if (rank / ROWS == group) shared.queries[rank % ROWS] = query;
  if (group == 0 && blockIdx.x == 0) order[rank] = query;
}

// Writes the listed references of a word whose places are among `size` places from `first` on.
__device__ inline void write_places(int* to, int first, int size, int w, ListedWord word) {
  int place = word.place - first;
  if (place >= size || place + __popc(word.bits) <= 0) return;
#pragma unroll
  for (int b = 0; b < 32; ++b) {
    const unsigned set = word.bits >> b & 1u;
    if (set && static_cast<unsigned>(place) < static_cast<unsigned>(size)) to[place] = 32 * w + b;
    place += static_cast<int>(set);
  }
}

// Gathers weights of a query for `panels` panels of listed references, of which `count` count; the
// others get zero, and all do if the query is not `known`. A thread has four weights of a panel.
// Loads have no conditions, so that those of several panels can come before all stores.
template <int ROWS, bool HALVES>
__device__ inline void gather_weights(const float* weights, const int* listed, bool known,
                                      int count, int panels, float* __restrict__ to,
                                      const Lane& lane) {
  const int n = lane.warp / 2, step = lane.warp % 2;
#pragma unroll 4
  for (int panel = 0; panel < panels; ++panel) {
    std::uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const int place = kPanel * panel + 16 * step + 4 * i + lane.t;
      const float weight = weights[listed[place < count ? place : count - 1]];
      words[i] = known && place < count ? bits_of(weight) : 0;
    }
    const auto store = [&](int s, std::uint32_t first, std::uint32_t second) {
      float* const pair = to + kPanel * ROWS * panel + pair_place(n, 2 * step + s, lane.lane);
      *reinterpret_cast<std::uint64_t*>(pair) = first | static_cast<std::uint64_t>(second) << 32;
    };
    if constexpr (HALVES) {
      const TwoHalves front = apart(words[0], words[1]), back = apart(words[2], words[3]);
      store(0, front.low, back.low);
      store(1, front.high, back.high);
    } else {
      store(0, words[0], words[1]);
      store(1, words[2], words[3]);
    }
  }
}

// The list of a group, and the weights of what is listed. All blocks of a group find which
// references are listed, and share out the panels of their list. With ORDER they find the order
// first. If HALVES, weights are words of both_halves.
template <int ROWS, bool ORDER, bool HALVES>
__global__ void __launch_bounds__(kListThreads<ROWS>)
    list_references(const ChunkWeights weights, const PieceSums sums, int* order, int references,
                    const Lists out, const Parts parts) {
  wait_for_earlier_launches();
  let_next_launch_start();
  constexpr int kThreads = kListThreads<ROWS>;
  ListMemory<ROWS>& shared = *reinterpret_cast<ListMemory<ROWS>*>(shared_memory());
  ListedWord* const listed_words = shared.words();
  const int share = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int known = static_cast<int>(smaller(ROWS, parts.queries - ROWS * group));
  if constexpr (ORDER)
    order_few_queries(shared, sums, parts.queries, group, order);
  else if (thread < known)
    shared.queries[thread] = order ? order[ROWS * group + thread] : ROWS * group + thread;
  __syncthreads();
  const Index stride = out.stride / 32;
  const int words = static_cast<int>(divide_up(references, 32));
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < words; start += kThreads) {
    const int w = start + thread;
    unsigned bits = 0;
    if (w < words)
#pragma unroll
      for (int q = 0; q < ROWS; ++q)
        bits |= weights.live[shared.queries[q < known ? q : 0] * stride + w];
    const int place = place_of_word<kThreads>(bits, count, shared.scratch);
    if (w < words) listed_words[w] = {bits, place};
  }
  if (share == 0 && thread == 0) out.counts[group] = count;
  if (share == 0 && thread < known)
    parts.counts[shared.queries[thread]] =
        static_cast<int>(divide_up(count, static_cast<Index>(parts.panels) * kPanel));

  const int panels = static_cast<int>(divide_up(count, kPanel));
  const int each = static_cast<int>(divide_up(panels, gridDim.x)), first = share * each;
  const int own = static_cast<int>(larger(0, smaller(each, panels - first)));
  const int size = kPanel * own, left = count - kPanel * first;
#pragma unroll 1
  for (int w = thread; w < words; w += kThreads)
    write_places(shared.listed, kPanel * first, size, w, listed_words[w]);
  __syncthreads();
  const Index at = group * out.stride + kPanel * first;
#pragma unroll 1
  for (int i = thread; i < size; i += kThreads)
    out.listed[at + i] = shared.listed[i < left ? i : left - 1];
  const Lane lane = this_lane();
  static_assert(kThreads == kPanel * ROWS / 4, "a thread for four weights of a panel");
  const int query = 8 * (lane.warp / 2) + lane.g;
  const float* const from = weights.weight + shared.queries[query < known ? query : 0] * out.stride;
  gather_weights<ROWS, HALVES>(from, shared.listed, query < known,
                               static_cast<int>(smaller(left, size)), own, out.weights + ROWS * at,
                               lane);
}

}  // namespace
}  // namespace pfgm
