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
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kRankedQueries = 16;  // of a block of order_queries

template <int ROWS> constexpr int kListThreads = ROWS <= 64 ? 8 * ROWS : 512;

constexpr int kGatheredPanels = 192;  // of a block of list_references, at most

// The place of the first of a thread's `own` things: `count` earlier ones and those of threads
// before it come first. `count` then counts those of all threads too. `before` has a place for each
// warp.
template <int THREADS>
__device__ inline int place_of(int own, int& count, int* before) {
  const Lane lane = this_lane();
  int place = own;
  for (int apart = 1; apart < 32; apart *= 2) {
    const int lower = __shfl_sync(kAll, place, lane.lane - apart);
    if (lane.lane >= apart) place += lower;
  }
  __syncthreads();  // no thread uses the counts of an earlier call any more
  if (lane.lane == 31) before[lane.warp] = place;
  __syncthreads();
  const int warp_count = lane.lane < THREADS / 32 ? before[lane.lane] : 0;
  place += count - own + __reduce_add_sync(kAll, lane.lane < lane.warp ? warp_count : 0);
  count += __reduce_add_sync(kAll, warp_count);
  return place;
}

// Writes the indices of all set bits of `words` words to `to`, in ascending order, and returns
// their number. bits(w) is word w. The last index is repeated up to a whole panel. `before` has a
// place for each warp.
template <int THREADS, class Place, class Bits>
__device__ inline int list(Place* to, int* before, int words, Bits bits) {
  const int thread = static_cast<int>(threadIdx.x);
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < words; start += THREADS) {
    const int w = start + thread;
    const unsigned word = w < words ? bits(w) : 0;
    int place = place_of<THREADS>(__popc(word), count, before);
    for (int b = 0; b < 32; ++b) {
      const int set = static_cast<int>(word >> b & 1u);
      if (set) to[place] = static_cast<Place>(32 * w + b);
      place += set;
    }
  }
  __syncthreads();
  const int place = count + thread;
  if (count > 0 && place < round_up(count, kPanel)) to[place] = to[count - 1];
  __syncthreads();
  return count;
}

// How many weights of a query are not zero.
__device__ inline int live_weights(const PieceSums& sums, int query) {
  int count = 0;
#pragma unroll 4
  for (int piece = 0; piece < sums.pieces; ++piece)
    count += sums.live_count[static_cast<Index>(query) * sums.pieces + piece];
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

// Of 32 references: a bit for each that the first half of the queries need, and one for the second
// half. Later `bits[0]` has a bit for each that is listed, and `place` is that of the first one.
struct ListedWord {
  unsigned bits[2];
  int place;
};

template <int ROWS>
struct ListMemory {
  std::uint32_t keys[kListThreads<ROWS>];
  int order[kListThreads<ROWS>];
  int live[kListThreads<ROWS> / 32];  // weights that are not zero, of 32 queries of the order
  int scratch[kListThreads<ROWS> / 32];
  int queries[ROWS];
  std::uint16_t listed[kPanel * kGatheredPanels];

  __device__ ListedWord* words() { return reinterpret_cast<ListedWord*>(this + 1); }
  static std::size_t bytes(Index references) {
    return sizeof(ListMemory) + sizeof(ListedWord) * divide_up(references, 32);
  }
};

// What a block of list_references gathers: one of the shares of a group's list.
struct ListTask {
  int group, share, shares;
};

// A block's task if groups have equally many blocks. Also finds the queries of its group. Places
// after the last query get that one again.
template <int ROWS>
__device__ inline ListTask take_even_share(ListMemory<ROWS>& shared, int queries,
                                           const int* order) {
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int shares = static_cast<int>(gridDim.x) / divide_up32(queries, ROWS);
  const int group = block / shares;
  const int place = static_cast<int>(smaller(ROWS * group + thread, queries - 1));
  if (thread < ROWS) shared.queries[thread] = order ? order[place] : place;
  return {group, block % shares, shares};
}

// Finds the order of the queries from their keys. If there are at most half as many queries as
// threads, two lanes find the rank of one.
template <int ROWS>
__device__ inline void find_order(ListMemory<ROWS>& shared, int queries, int* order) {
  const int shift = 2 * queries <= kListThreads<ROWS> ? 1 : 0;
  const int thread = static_cast<int>(threadIdx.x), query = thread >> shift, part = thread & shift;
  const std::uint32_t key = shared.keys[query];
  int rank = 0;  // keys that are less; those after the last query are not
#pragma unroll 1
  for (int other = 16 * part; other < queries; other += 16 << shift)
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const uint4 keys = *reinterpret_cast<const uint4*>(&shared.keys[other + i]);
      rank += (keys.x < key) + (keys.y < key) + (keys.z < key) + (keys.w < key);
    }
  if (shift != 0) rank += __shfl_xor_sync(kAll, rank, 1);
  if (part > 0 || query >= queries) return;
  shared.order[rank] = query;
  if (blockIdx.x == 0) order[rank] = query;
}

// Shares out the blocks to at most 8 groups. Each group has one block, and of the others a number
// in proportion to `panels`, which its lane gives and which are at least 1.
__device__ inline ListTask share_out(int panels, int groups, const Lane& lane) {
  const int block = static_cast<int>(blockIdx.x);
  int sum = panels;
  for (int apart = 1; apart < 8; apart *= 2) {
    const int lower = __shfl_sync(kAll, sum, lane.lane - apart);
    if (lane.lane >= apart) sum += lower;
  }
  const auto total = static_cast<unsigned>(__shfl_sync(kAll, sum, groups - 1));
  const unsigned others = gridDim.x - static_cast<unsigned>(groups);
  const int end = lane.lane + 1 + static_cast<int>(others * static_cast<unsigned>(sum) / total);
  const int group = __popc(__ballot_sync(kAll, lane.lane < groups && end <= block));
  const int before = __shfl_sync(kAll, end, group - 1), last = __shfl_sync(kAll, end, group);
  const int first = group == 0 ? 0 : before;
  return {group, block - first, last - first};
}

// The same if groups have blocks in proportion to the panels that their lists can have: a list has
// at most all references, and at most as many as its queries have weights. There are several
// groups, and at most kListThreads queries. With ORDER every block finds the order, as
// order_queries does.
template <int ROWS, bool ORDER>
__device__ inline ListTask take_uneven_share(ListMemory<ROWS>& shared, const PieceSums& sums,
                                             int queries, int references, int* order,
                                             const Lane& lane) {
  constexpr int kThreads = kListThreads<ROWS>, kWarps = ROWS / 32;  // of the block; of a group
  const int thread = static_cast<int>(threadIdx.x), groups = divide_up32(queries, ROWS);
  const bool known = thread < queries;
  // Keys have the order of the numbers of weights, and of equal queries.
  shared.keys[thread] =
      known ? static_cast<std::uint32_t>(live_weights(sums, thread) * kThreads + thread) : ~0u;
  if constexpr (ORDER) {
    __syncthreads();
    find_order(shared, queries, order);
  } else if (known) {
    shared.order[thread] = order[thread];
  }
  __syncthreads();
  const int query = shared.order[known ? thread : queries - 1];
  const int live = known ? static_cast<int>(shared.keys[query] / kThreads) : 0;
  const int warp_count = __reduce_add_sync(kAll, live);
  if (lane.lane == 0) shared.live[lane.warp] = warp_count;
  __syncthreads();
  int most = 0;  // listed references of the lane's group
  if (lane.lane < groups)
    for (int warp = 0; warp < kWarps; ++warp) most += shared.live[kWarps * lane.lane + warp];
  const int panels = divide_up32(most < references ? most : references, kPanel);
  const ListTask task = share_out(panels > 0 ? panels : 1, groups, lane);
  if (thread / ROWS == task.group) shared.queries[thread % ROWS] = query;
  return task;
}

// Finds which references each half of the queries needs. A warp takes 32 of them for a half at a
// time.
template <int ROWS>
__device__ inline void find_needed(ListMemory<ROWS>& shared, const std::uint32_t* live,
                                   std::uint32_t stride, int words, const Lane& lane) {
  constexpr int kHalf = ROWS / 2;
#pragma unroll 1
  for (int i = lane.warp; i < 2 * divide_up32(words, 32); i += kListThreads<ROWS> / 32) {
    const int w = i / 2 * 32 + lane.lane, half = i % 2;
    const std::uint32_t* const from = live + (w < words ? w : words - 1);
    const int* const queries = shared.queries + kHalf * half;
    unsigned bits = 0;
#pragma unroll(kHalf < 32 ? kHalf : 32)  // more loads at a time would spill
    for (int q = 0; q < kHalf; ++q) bits |= from[static_cast<std::uint32_t>(queries[q]) * stride];
    if (w < words) shared.words()[w].bits[half] = bits;
  }
}

// Finds the places of the listed references, and returns their number. A thread has words that
// follow each other.
template <int ROWS>
__device__ inline int find_places(ListMemory<ROWS>& shared, int words) {
  constexpr int kThreads = kListThreads<ROWS>;
  const int each = divide_up32(words, kThreads), first = each * static_cast<int>(threadIdx.x);
  const int last = first + each < words ? first + each : words;
  int own = 0, count = 0;
#pragma unroll 1
  for (int w = first; w < last; ++w) {
    ListedWord& word = shared.words()[w];
    word.bits[0] |= word.bits[1];
    word.place = own;
    own += __popc(word.bits[0]);
  }
  const int before = place_of<kThreads>(own, count, shared.scratch);
#pragma unroll 1
  for (int w = first; w < last; ++w) shared.words()[w].place += before;
  __syncthreads();
  return count;
}

// Writes the listed references of a word whose places are among `size` places from `first` on.
__device__ inline void write_places(std::uint16_t* to, int first, int size, int w,
                                    ListedWord word) {
  int place = word.place - first;
  if (place >= size || place + __popc(word.bits[0]) <= 0) return;
#pragma unroll
  for (int b = 0; b < 32; ++b) {
    const unsigned set = word.bits[0] >> b & 1u;
    if (set && static_cast<unsigned>(place) < static_cast<unsigned>(size))
      to[place] = static_cast<std::uint16_t>(32 * w + b);
    place += static_cast<int>(set);
  }
}

// Gathers weights of query 8n + g for `panels` panels of listed references, of which `count` count.
// The others get zero, and so does a query that is not `known`. A thread has four weights of a
// panel.
template <int ROWS, bool HALVES, bool OPERANDS>
__device__ inline void gather_weights(const float* weights, const std::uint16_t* listed, bool known,
                                      int n, int count, int panels, float* __restrict__ to,
                                      const Lane& lane) {
  const int step = lane.warp % 2;
#pragma unroll 4
  for (int panel = 0; panel < panels; ++panel) {
    std::uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const int place = kPanel * panel + 16 * step + 4 * i + lane.t;
      const float weight = weights[listed[place < count ? place : count - 1]];
      words[i] = known && place < count ? bits_of(weight) : 0;
    }
    float* const panel_weights = to + kPanel * ROWS * panel;
    // Part s: low (0) or high (1) halves; of float32 the first or the second eight references.
    const auto store = [&](int s, std::uint32_t first, std::uint32_t second) {
      if constexpr (OPERANDS) {
        std::uint32_t* const at = reinterpret_cast<std::uint32_t*>(panel_weights) +
                                  operand_place<ROWS>(8 * n + lane.g, step, s) + lane.t;
        at[0] = first, at[kOperandStep<ROWS>] = second;
      } else {
        float* const pair = panel_weights + pair_place(n, 2 * step + s, lane.lane);
        *reinterpret_cast<std::uint64_t*>(pair) = first | static_cast<std::uint64_t>(second) << 32;
      }
    };
    if constexpr (HALVES) {
      const TwoHalves front = separate_halves(words[0], words[1]),
                      back = separate_halves(words[2], words[3]);
      store(0, front.low, back.low);
      store(1, front.high, back.high);
    } else {
      store(0, words[0], words[1]);
      store(1, words[2], words[3]);
    }
  }
}

// The list of a group, and the weights of what is listed. All blocks of a group find which
// references are listed, and share out the panels of their list. If UNEVEN, groups that may have
// longer lists have more blocks. With ORDER these find the order first. If HALVES, weights are
// words of both_halves. If OPERANDS, products of the sums are asynchronous.
//
// If a multiprocessor needs to hold two blocks only, threads have registers for more loads at a
// time.
template <int ROWS, bool UNEVEN, bool ORDER, bool HALVES, bool OPERANDS>
__global__ void __launch_bounds__(kListThreads<ROWS>, 2)
    list_references(const ChunkWeights weights, const PieceSums sums, int* order, int references,
                    const Lists out, const Parts parts) {
  wait_for_earlier_launches();
  let_next_launch_start();
  static_assert(HALVES || !OPERANDS, "operands are halves");
  constexpr int kThreads = kListThreads<ROWS>;
  ListMemory<ROWS>& shared = *reinterpret_cast<ListMemory<ROWS>*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), words = divide_up32(references, 32);
  ListTask task;
  if constexpr (UNEVEN)
    task = take_uneven_share<ROWS, ORDER>(shared, sums, parts.queries, references, order, lane);
  else
    task = take_even_share(shared, parts.queries, order);
  const int known = static_cast<int>(smaller(ROWS, parts.queries - ROWS * task.group));
  __syncthreads();
  find_needed(shared, weights.live, static_cast<std::uint32_t>(out.stride / 32), words, lane);
  __syncthreads();
  const int count = find_places(shared, words), panels = divide_up32(count, kPanel);
  if (task.share == 0 && thread == 0) out.counts[task.group] = count;
  if (task.share == 0 && thread < known) {
    int* const parts_of = parts.counts + shared.queries[thread];
    if constexpr (OPERANDS)  // the sums write those of lists that are not empty
#pragma unroll 1
      for (int slice = 0; slice < parts.slices; ++slice)
        parts_of[slice * static_cast<Index>(parts.queries)] = 0;
    else
      *parts_of = divide_up32(panels, parts.panels);
  }

  const int each = divide_up32(panels, task.shares), first = task.share * each;
  const int own = static_cast<int>(larger(0, smaller(each, panels - first)));
  const int size = kPanel * own, left = count - kPanel * first;
#pragma unroll 1
  for (int w = thread; w < words; w += kThreads) {
    const ListedWord word = shared.words()[w];
    write_places(shared.listed, kPanel * first, size, w, word);
  }
  __syncthreads();
  const Index at = task.group * out.stride + kPanel * first;
#pragma unroll 1
  for (int i = thread; i < size; i += kThreads)
    out.listed[at + i] = shared.listed[i < left ? i : left - 1];
  constexpr int kTogether = kThreads / kPanel * 4;  // queries whose weights are gathered at once
  static_assert(ROWS % kTogether == 0);
#pragma unroll 1
  for (int q = 0; q < ROWS; q += kTogether) {
    const int n = q / 8 + lane.warp / 2, query = 8 * n + lane.g;
    gather_weights<ROWS, HALVES, OPERANDS>(
        weights.weight + shared.queries[query] * out.stride, shared.listed, query < known, n,
        static_cast<int>(smaller(left, size)), own, out.weights + ROWS * at, lane);
  }
}

}  // namespace
}  // namespace pfgm
