// Which references have a weight, on CUDA devices.
//
// Most weights are zero. Weighted sums take a group of queries at a time and stage only references
// that have a weight for any of them. Queries with similar numbers of weights need similar
// references, so these are taken together. The weights of the listed references are gathered,
// because they lie apart, and are read for each slice of the features.
#pragma once
#include "cuda/threads.h"
#include "cuda/tiles.h"

namespace pfgm {
namespace {

constexpr int kRankedQueries = 16;    // of a block of order_queries
constexpr int kListThreads = 256;     // of a block of list_references
constexpr int kGatheredPanels = 192;  // of such a block, at most

// A prefix sum over the block: the position of the first of this thread's `items`, after
// `count` earlier ones and those of the threads before it. Adds the items of all threads to
// `count`. `before` has a place for each warp.
template <int THREADS>
__device__ inline int position_of(int items, int& count, int* before) {
  const Lane lane = this_lane();
  int position = items;
  for (int apart = 1; apart < 32; apart *= 2) {
    const int lower = __shfl_sync(kAll, position, lane.lane - apart);
    if (lane.lane >= apart) position += lower;
  }
  __syncthreads();  // no thread uses the counts of an earlier call any more
  if (lane.lane == 31) before[lane.warp] = position;
  __syncthreads();
  const int warp_count = lane.lane < THREADS / 32 ? before[lane.lane] : 0;
  position += count - items + __reduce_add_sync(kAll, lane.lane < lane.warp ? warp_count : 0);
  count += __reduce_add_sync(kAll, warp_count);
  return position;
}

// Writes the indices of all set bits of `words` words to `to`, in ascending order, and returns
// their number. bits(w) is word w. The last index is repeated up to a whole panel. `before` has a
// place for each warp.
template <int THREADS, class Listed, class Bits>
__device__ inline int list(Listed* to, int* before, int words, Bits bits) {
  const int thread = static_cast<int>(threadIdx.x);
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < words; start += THREADS) {
    const int w = start + thread;
    const unsigned word = w < words ? bits(w) : 0;
    int position = position_of<THREADS>(__popc(word), count, before);
    for (int b = 0; b < 32; ++b) {
      const int set = static_cast<int>(word >> b & 1u);
      if (set) to[position] = static_cast<Listed>(32 * w + b);
      position += set;
    }
  }
  __syncthreads();
  const int position = count + thread;
  if (count > 0 && position < round_up(count, kPanel)) to[position] = to[count - 1];
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
  int* counts = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int query = thread; query < queries; query += kQueryThreads)
    counts[query] = live_weights(sums, query);
  __syncthreads();
  constexpr int kSharers = kQueryThreads / kRankedQueries;  // threads for a query
  const int ranked = static_cast<int>(blockIdx.x) * kRankedQueries + thread / kSharers;
  const int count = ranked < queries ? counts[ranked] : 0;
  int rank = 0;
#pragma unroll 1
  for (int query = thread % kSharers; query < queries; query += kSharers)
    rank += counts[query] < count || (counts[query] == count && query < ranked);
  for (int apart = 1; apart < kSharers; apart *= 2) rank += __shfl_xor_sync(kAll, rank, apart);
  if (ranked < queries && thread % kSharers == 0) order[rank] = ranked;
}

// 32 references. find_needed sets bits[h] for those that half h of the group's queries needs.
// find_positions joins both in bits[0], and sets `position` to that of the first in the list.
struct ListedWord {
  unsigned bits[2];
  int position;
};

struct ListMemory {
  int scratch[kListThreads / 32];
  int queries[kSumRows];
  std::uint16_t listed[kPanel * kGatheredPanels];

  __device__ ListedWord* words() { return reinterpret_cast<ListedWord*>(this + 1); }
  static std::size_t bytes(Index references) {
    return sizeof(ListMemory) + sizeof(ListedWord) * divide_up(references, 32);
  }
};

// Finds which references each half of the queries needs. A warp takes 32 words for a half at a
// time.
__device__ inline void find_needed(ListMemory& shared, const std::uint32_t* live,
                                   std::uint32_t stride, int words, const Lane& lane) {
  constexpr int kHalf = kSumRows / 2;
#pragma unroll 1
  for (int i = lane.warp; i < 2 * divide_up32(words, 32); i += kListThreads / 32) {
    const int w = i / 2 * 32 + lane.lane, half = i % 2;
    const std::uint32_t* const from = live + (w < words ? w : words - 1);
    const int* const queries = shared.queries + kHalf * half;
    unsigned bits = 0;
#pragma unroll
    for (int q = 0; q < kHalf; ++q) bits |= from[static_cast<std::uint32_t>(queries[q]) * stride];
    if (w < words) shared.words()[w].bits[half] = bits;
  }
}

// Finds the positions of the listed references, and returns their number. A thread takes
// consecutive words.
__device__ inline int find_positions(ListMemory& shared, int words) {
  const int each = divide_up32(words, kListThreads), first = each * static_cast<int>(threadIdx.x);
  const int last = first + each < words ? first + each : words;
  int items = 0, count = 0;
#pragma unroll 1
  for (int w = first; w < last; ++w) {
    ListedWord& word = shared.words()[w];
    word.bits[0] |= word.bits[1];
    word.position = items;
    items += __popc(word.bits[0]);
  }
  const int before = position_of<kListThreads>(items, count, shared.scratch);
#pragma unroll 1
  for (int w = first; w < last; ++w) shared.words()[w].position += before;
  __syncthreads();
  return count;
}

// Writes those references of word w to `to` whose positions in the list are among the `size` ones
// from `first` on.
__device__ inline void write_listed(std::uint16_t* to, int first, int size, int w,
                                    ListedWord word) {
  int position = word.position - first;
  if (position >= size || position + __popc(word.bits[0]) <= 0) return;
#pragma unroll
  for (int b = 0; b < 32; ++b) {
    const unsigned set = word.bits[0] >> b & 1u;
    if (set && static_cast<unsigned>(position) < static_cast<unsigned>(size))
      to[position] = static_cast<std::uint16_t>(32 * w + b);
    position += static_cast<int>(set);
  }
}

// Gathers the weights of query 8n + g for `panels` panels of listed references. Those after the
// first `count` get zero, and so does a query that does not exist. A thread has four weights of a
// panel.
template <bool HALVES>
__device__ inline void gather_weights(const float* weights, const std::uint16_t* listed,
                                      bool exists, int n, int count, int panels,
                                      float* __restrict__ to, const Lane& lane) {
  const int step = lane.warp % 2;
#pragma unroll 4
  for (int panel = 0; panel < panels; ++panel) {
    std::uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const int position = kPanel * panel + 16 * step + 4 * i + lane.t;
      const float weight = weights[listed[position < count ? position : count - 1]];
      words[i] = exists && position < count ? bits_of(weight) : 0;
    }
    // Pair 0 has the low halves, pair 1 the high ones; of float32 the first or the second eight
    // references.
    TwoHalves front = {words[2], words[0]}, back = {words[3], words[1]};
    if constexpr (HALVES)
      front = separate_halves(words[0], words[1]), back = separate_halves(words[2], words[3]);
    float* const panel_weights = to + kPanel * kSumRows * panel;
    const auto store = [&](int s, std::uint32_t first, std::uint32_t second) {
      *reinterpret_cast<uint2*>(panel_weights + weight_offset(n, 2 * step + s, lane.lane)) = {
          first, second};
    };
    store(0, front.low, back.low);
    store(1, front.high, back.high);
  }
}

// The list of a group, and the weights of what is listed. All blocks of a group find which
// references are listed, and share out the panels of the list. If HALVES, weights are words of
// both_halves.
//
// With only two blocks on a multiprocessor, threads have registers for more loads at a time.
template <bool HALVES>
__global__ void __launch_bounds__(kListThreads, 2)
    list_references(const ChunkWeights weights, const int* order, int references, const Lists out,
                    const Parts parts) {
  ListMemory& shared = *reinterpret_cast<ListMemory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), words = divide_up32(references, 32);
  const int shares = static_cast<int>(gridDim.x) / divide_up32(parts.queries, kSumRows);
  const int group = static_cast<int>(blockIdx.x) / shares;
  const int share = static_cast<int>(blockIdx.x) % shares;
  const int queries = static_cast<int>(smaller(kSumRows, parts.queries - kSumRows * group));
  if (thread < kSumRows) {  // ranks after the last one repeat it
    const int rank = kSumRows * group + (thread < queries ? thread : queries - 1);
    shared.queries[thread] = order ? order[rank] : rank;
  }
  __syncthreads();
  find_needed(shared, weights.live, static_cast<std::uint32_t>(out.stride / 32), words, lane);
  __syncthreads();
  const int count = find_positions(shared, words), panels = divide_up32(count, kPanel);
  if (share == 0 && thread == 0) out.counts[group] = count;
  if (share == 0 && thread < queries)
    parts.counts[shared.queries[thread]] = divide_up32(panels, parts.panels);

  const int each = divide_up32(panels, shares), first = share * each;
  const int block_panels = static_cast<int>(larger(0, smaller(each, panels - first)));
  const int size = kPanel * block_panels, left = count - kPanel * first;
#pragma unroll 1
  for (int w = thread; w < words; w += kListThreads)
    write_listed(shared.listed, kPanel * first, size, w, shared.words()[w]);
  __syncthreads();
  const Index at = group * out.stride + kPanel * first;
#pragma unroll 1
  for (int i = thread; i < size; i += kListThreads)
    out.listed[at + i] = shared.listed[i < left ? i : left - 1];
  const int n = lane.warp / 2, query = 8 * n + lane.g;
  gather_weights<HALVES>(weights.weight + shared.queries[query] * out.stride, shared.listed,
                         query < queries, n, static_cast<int>(smaller(left, size)), block_panels,
                         out.weights + kSumRows * at, lane);
}

}  // namespace
}  // namespace pfgm
