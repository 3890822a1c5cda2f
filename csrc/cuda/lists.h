// Which references have a weight, on CUDA devices.
//
// Most weights are zero. Weighted sums take 32 queries at a time and stage only references that
// have a weight for any of them. Queries with similar numbers of weights need similar references,
// so these are taken together.
#pragma once
#include "cuda/weights.h"

namespace pfgm {
namespace {

constexpr int kSumRows = 32;        // queries of a group
constexpr int kRankedQueries = 16;  // of a block of order_queries
constexpr int kListThreads = 256;
// Panels of listed references that a block sums: kFewestPanels to kMostPanels, or more, up to
// kPartPanels, if the parts would not fit into memory.
constexpr int kFewestPanels = 4, kMostPanels = 16, kPartPanels = 64;

// Writes the indices of all set bits of `words` words to `to`, in ascending order, and returns
// their number. bits(w) is word w. The last index is repeated up to a whole panel. `before` has a
// place for each warp.
template <int THREADS, class Bits>
__device__ inline int list(int* to, int* before, int words, Bits bits) {
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x);
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < words; start += THREADS) {
    const int w = start + thread;
    const unsigned word = w < words ? bits(w) : 0;
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

// For each group of 32 queries: the references of a chunk that have a weight for any of them.
struct Lists {
  int* listed;  // (groups, stride): which they are, and the last one again up to a whole panel
  int* counts;  // (groups): how many
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

struct ListMemory {
  int scratch[kListThreads / 32];
  int queries[kSumRows];
  std::uint32_t keys[kListThreads];
};

// The order of at most kListThreads queries, as order_queries finds it. Every block finds it, and
// keeps the queries of its group.
__device__ inline void order_few_queries(ListMemory& shared, const PieceSums& sums, int queries,
                                         int group, int* order) {
  const int query = static_cast<int>(threadIdx.x);
  // Keys have the order of the numbers of weights, and of equal queries.
  std::uint32_t key = ~0u;
  if (query < queries)
    key = static_cast<std::uint32_t>(live_weights(sums, query) * kListThreads + query);
  shared.keys[query] = key;
  __syncthreads();
  int rank = 0;
#pragma unroll 4
  for (int other = 0; other < queries; other += 4) {
    const uint4 keys = *reinterpret_cast<const uint4*>(&shared.keys[other]);
    rank += (keys.x < key) + (keys.y < key) + (keys.z < key) + (keys.w < key);
  }
  if (query >= queries) return;
  if (rank / kSumRows == group) shared.queries[rank % kSumRows] = query;
  if (group == 0) order[rank] = query;
}

// The lists of a group. With ORDER it finds the order first.
template <bool ORDER>
__global__ void __launch_bounds__(kListThreads)
    list_references(const std::uint32_t* live, const PieceSums sums, int* order, int references,
                    const Lists out, const Parts parts) {
  ListMemory& shared = *reinterpret_cast<ListMemory*>(shared_memory());
  const int group = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int known = static_cast<int>(smaller(kSumRows, parts.queries - kSumRows * group));
  if constexpr (ORDER)
    order_few_queries(shared, sums, parts.queries, group, order);
  else if (thread < known)
    shared.queries[thread] = order ? order[kSumRows * group + thread] : kSumRows * group + thread;
  __syncthreads();
  const Index words = out.stride / 32;
  const auto any = [&](int w) {
    unsigned bits = 0;
#pragma unroll
    for (int q = 0; q < kSumRows; ++q) bits |= live[shared.queries[q < known ? q : 0] * words + w];
    return bits;
  };
  const int count = list<kListThreads>(out.listed + group * out.stride, shared.scratch,
                                       static_cast<int>(divide_up(references, 32)), any);
  if (thread == 0) out.counts[group] = count;
  if (thread < known)
    parts.counts[shared.queries[thread]] =
        static_cast<int>(divide_up(count, static_cast<Index>(parts.panels) * kPanel));
}

}  // namespace
}  // namespace pfgm
