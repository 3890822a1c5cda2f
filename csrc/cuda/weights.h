// From squared distances to weights, on CUDA devices. How a distance becomes a weight is in
// cuda/weight_law.h.
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/threads.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kWeighBlocks = 6;  // of a multiprocessor; some hold no more

// What the weights of a query need.
struct RowWeights {
  Fall fall;
  float smallest;  // a weight below it becomes zero
};

// In a round a warp of weigh takes 32 words, each of 32 references. They are kQueryThreads
// references apart, because the warps of a block take neighbours.
constexpr int kRound = 32 * kQueryThreads;

// The words of a warp in a round. Indices have 32 bits, of which one multiplication makes an
// address.
struct Round {
  unsigned first, pair;  // of the first word, in its chunk, and in the rows of all queries
  int left;              // references from there to the end of the tile, or of the round

  // Whether there is a reference `behind` places after the first one.
  __device__ bool has(unsigned behind) const { return static_cast<int>(behind) < left; }

  // Stores zeros for the words that are not candidates. Eight lanes have the weights of a word.
  __device__ void store_zeros(const ChunkWeights& out, unsigned candidates, unsigned lane) const {
    const unsigned zeros = ~candidates;
    if (has(kQueryThreads * lane) && (zeros >> lane & 1u) != 0)
      out.live[(pair + kQueryThreads * lane) / 32] = 0;
    unsigned lane_zeros = zeros >> lane / 8;
#pragma unroll 1
    for (unsigned j = kQueryThreads * (lane / 8) + 4 * (lane % 8); has(j); j += 4 * kQueryThreads) {
      if ((lane_zeros & 1u) != 0) *reinterpret_cast<float4*>(out.weight + (pair + j)) = {};
      lane_zeros >>= 4;
    }
  }
};

// Finds the weights of a query in the words of a warp.
template <bool HALVES>
struct Weigher {
  const WeightLaw& law;
  RowWeights row;
  float factor;

  __device__ float weight(double squared) const { return law.weight(row.fall(squared)); }

  // A bit for each word whose tile has a weight that is not zero, as its smallest distance says. A
  // lane looks at one word. A weight that is NaN counts.
  __device__ unsigned find_candidates(const Round& round, const Pairs& pairs, unsigned lane) const {
    const unsigned behind = kQueryThreads * lane;
    const bool exists = round.has(behind);
    const double least = exists ? pairs.lowest[blockIdx.x * static_cast<unsigned>(pairs.tiles) +
                                               (round.first + behind) / kTileReferences]
                                : 0;
    return __ballot_sync(kAll, exists && !(weight(least) < row.smallest));
  }

  // Stores the weights of the words that are candidates, and adds to their sum and to the number of
  // those that are not zero.
  __device__ void weigh(const Round& round, unsigned candidates, const double* distances,
                        const ChunkWeights& out, unsigned lane, float& sum, int& live) const {
    constexpr int kWordsAtOnce = 4;
    const unsigned pair = round.pair + lane;
    const unsigned end = round.pair + static_cast<unsigned>(round.left);
#pragma unroll 1
    while (candidates != 0) {
      unsigned to[kWordsAtOnce];  // ~0 after the last word
      double squared[kWordsAtOnce];
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i, candidates &= candidates - 1) {
        const auto word = static_cast<unsigned>(__ffs(static_cast<int>(candidates)) - 1);
        to[i] = candidates != 0 ? pair + kQueryThreads * word : ~0u;
        squared[i] = to[i] < end ? distances[to[i]] : 0;
      }
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        const bool stores = to[i] != ~0u;
        float w = weight(squared[i]);
        if (to[i] >= end) w = 0;
        sum += w;
        if (w < row.smallest) w = 0;
        const float stored = HALVES ? float_of(both_halves(w * factor)) : w * factor;
        if (stores) out.weight[to[i]] = stored;
        live += mark_live(out.live + to[i] / 32, lane == 0 && stores, w != 0);
      }
    }
  }
};

struct WeighMemory {
  std::int64_t least[kQueryThreads / 32];
  RowWeights row;
  float sums[kQueryThreads / 32];
  int live[kQueryThreads / 32];
};

// Finds the weights of one query over a piece of the chunk, relative to the nearest reference so
// far, which comes from the minima of tiles and from earlier chunks. They are stored times
// `factor`, in halves if HALVES. The distances of tiles without a nonzero weight, which are most,
// are not read.
template <bool HALVES>
__global__ void __launch_bounds__(kQueryThreads, kWeighBlocks)
    weigh(const WeightLaw law, const double* radius, const Pairs pairs, int references,
          double floor, float factor, bool first_chunk, const QueryStates state,
          const ChunkWeights out, const PieceSums sums) {
  WeighMemory& shared = *reinterpret_cast<WeighMemory*>(shared_memory());
  const Lane lane = this_lane();
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  // Numbers ≥ 0 have the order of their bits, and −1 comes before. Comparing bits takes no float64.
  std::int64_t least = bits_of(static_cast<double>(INFINITY));
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += kQueryThreads)
    least = Least()(least, bits_of(pairs.lowest[query * pairs.tiles + tile]));
  least = least_of_warp(least);
  if (lane.lane == 0) shared.least[lane.warp] = least;
  __syncthreads();
  if (lane.warp == 0) {  // does the arithmetic in float64 for all
    for (const std::int64_t bits : shared.least) least = Least()(least, bits);
    const double before = first_chunk ? INFINITY : state.nearest[query];
    double nearest = isnan(before) ? -1 : fmin(double_of(least), before);
    if (nearest < 0) nearest = NAN;  // in the minima NaN is −1
    const Fall fall(nearest, law.rate(nearest, radius[query]));
    const double earlier =
        first_chunk ? 0 : state.total[query] * static_cast<double>(law.weight(fall(before)));
    if (lane.lane == 0) {
      shared.row = {fall, static_cast<float>(floor) * fmaxf(static_cast<float>(earlier), 1)};
      if (piece == 0) sums.nearest[query] = nearest, sums.earlier[query] = earlier;
    }
  }
  __syncthreads();
  const Weigher<HALVES> weigher = {law, shared.row, factor};
  const unsigned row = blockIdx.x * static_cast<unsigned>(pairs.stride);
  const int first = piece * sums.size;
  const int end = first + static_cast<int>(smaller(sums.size, references - first));
  const auto lane_index = static_cast<unsigned>(lane.lane);
  float sum = 0;
  int live = 0;
#pragma unroll 1
  for (int start = first; start < end; start += kRound) {
    const int at = start + 32 * lane.warp;
    const int left = static_cast<int>(smaller(end - at, kRound));
    const Round round = {static_cast<unsigned>(at), row + static_cast<unsigned>(at), left};
    const unsigned candidates = weigher.find_candidates(round, pairs, lane_index);
    round.store_zeros(out, candidates, lane_index);
    weigher.weigh(round, candidates, pairs.squared, out, lane_index, sum, live);
  }
  sum = over_warp(sum, Sum());
  if (lane.lane == 0) shared.sums[lane.warp] = sum, shared.live[lane.warp] = live;
  __syncthreads();
  if (thread > 0) return;
  for (int w = 1; w < kQueryThreads / 32; ++w) sum += shared.sums[w], live += shared.live[w];
  sums.sum[query * sums.pieces + piece] = sum;
  sums.live_count[query * sums.pieces + piece] = live;
}

}  // namespace
}  // namespace pfgm
