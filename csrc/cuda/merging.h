// Sums over parts, merged with earlier chunks, on CUDA devices.
#pragma once
#include "cuda/lists.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kMergeThreads = 256;

// Sums the parts of one query, for WIDTH features from `feature` on, in float32 like the parts.
template <int WIDTH>
__device__ inline void sum_parts(const Parts& parts, Index query, int feature, Index features,
                                 float (&sum)[WIDTH]) {
  const Index at = query * features + feature;
  const int count = parts.counts[query];
  for (float& value : sum) value = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    float v[WIDTH];
    load_values(parts.sums + (i * parts.queries * features + at), v);
    for (int f = 0; f < WIDTH; ++f) sum[f] += v[f];
  }
}

// The weights by which merge multiplies: of earlier chunks, of this one, and 1 over their sum.
struct MergedWeights {
  float kept, chunk, per_weight;

  // The first thread of one block of each query also writes the state.
  __device__ MergedWeights(const WeightLaw& law, double r, const PieceSums& sums,
                           const QueryStates& state) {
    const Index query = blockIdx.x;
    const float* const piece_sums = sums.sum + query * sums.pieces;
    kept = static_cast<float>(sums.earlier[query]), chunk = 0;
#pragma unroll 4
    for (int piece = 0; piece < sums.pieces; ++piece) chunk += piece_sums[piece];
    per_weight = reciprocal(kept + chunk);
    if (blockIdx.y > 0 || threadIdx.x > 0) return;
    const double nearest = sums.nearest[query];
    double total = sums.earlier[query];
#pragma unroll 1
    for (int piece = 0; piece < sums.pieces; ++piece) total += piece_sums[piece];
    state.nearest[query] = nearest;
    state.total[query] = total;
    state.logsumexp[query] = law.logsumexp(nearest, total, r);
  }
};

// The running mean: that of earlier chunks, with their weight, and the parts of this chunk, times
// `divisor`. A thread has WIDTH features.
template <int WIDTH>
__global__ void __launch_bounds__(kMergeThreads)
    merge(const WeightLaw law, const double* radius, float* mean, const Parts parts,
          const PieceSums sums, float divisor, int features, bool first_chunk,
          const QueryStates state) {
  const Index query = blockIdx.x;
  const MergedWeights weights(law, radius[query], sums, state);
  const int feature = WIDTH * static_cast<int>(blockIdx.y * kMergeThreads + threadIdx.x);
  if (feature >= features) return;
  const Index at = query * features + feature;
  float sum[WIDTH], before[WIDTH] = {};
  sum_parts(parts, query, feature, features, sum);
  if (!first_chunk) load_values(mean + at, before);
  for (int f = 0; f < WIDTH; ++f)
    sum[f] = weights.kept * weights.per_weight * before[f] + divisor * weights.per_weight * sum[f];
  store_values(mean + at, sum);
}

// Features of a thread and of a block that sums differences. The thread's lie kMergeThreads apart.
constexpr int kHeldFeatures = 4, kMergeFeatures = kHeldFeatures * kMergeThreads;
// Sums over references keep enough digits of a sum of differences if its square is at least this,
// relative to the size of what is summed.
constexpr float kEnough = 0x1p-6f;

struct MergeMemory {
  int listed[kPiece];
  float sums[kMergeThreads];
  float scratch[kMergeThreads / 32];
  int before[kMergeThreads / 32];
};

// A query, a chunk of references and their weights, from the block's first feature on. If `halves`,
// weights are words of both_halves. counts[i] says how many weights of piece i, of `size`
// references, are not zero.
template <class R>
struct QueryChunk {
  const float* x;
  Rows<R> y;
  ChunkWeights weights;
  bool halves;
  const int* counts;
  int size, feature0, left;  // features from the first one on

  __device__ QueryChunk(const Rows<float>& points, const Rows<R>& references,
                        const ChunkWeights& all, Index stride, bool halves, const PieceSums& sums,
                        int features)
      : y(references), weights(all), halves(halves), size(sums.size) {
    const Index query = blockIdx.x;
    feature0 = static_cast<int>(blockIdx.y) * kMergeFeatures, left = features - feature0;
    x = points.row(query) + feature0, y.at += feature0;
    weights.weight += query * stride, weights.live += query * (stride / 32);
    counts = sums.live_count + query * sums.pieces;
  }

  // Calls body(k, feature) for the features of the thread.
  template <class Body>
  __device__ void each_feature(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kHeldFeatures; ++k) {
      const int feature = k * kMergeThreads + static_cast<int>(threadIdx.x);
      if (feature < left) body(k, feature);
    }
  }
};

// value[k] = Σ_j w_j (x_i − y_ji) over the chunk, i = k·kMergeThreads + thread. If there are few
// features, threads share out the references.
template <class R>
__device__ inline void sum_differences(MergeMemory& shared, const QueryChunk<R>& chunk,
                                       float (&value)[kHeldFeatures]) {
  const int thread = static_cast<int>(threadIdx.x);
  int width = 1;  // threads with features of their own
  while (width < chunk.left && width < kMergeThreads) width *= 2;
  const int first_feature = thread % width;
  const auto each_feature = [&](const auto& body) {
#pragma unroll
    for (int k = 0; k < kHeldFeatures; ++k) {
      const int feature = k * kMergeThreads + first_feature;
      if (feature < chunk.left) body(k, feature);
    }
  };
  float point[kHeldFeatures];
  each_feature([&](int k, int feature) { point[k] = chunk.x[feature]; });
  for (float& v : value) v = 0;
#pragma unroll 1
  for (int start = 0; start < chunk.y.count; start += kPiece) {
    if (chunk.counts[start / chunk.size] == 0) continue;
    const int words = static_cast<int>(divide_up(smaller(kPiece, chunk.y.count - start), 32));
    const int count = list<kMergeThreads>(shared.listed, shared.before, words, [&](int w) {
      return chunk.weights.live[start / 32 + w];
    });
    float sum[kHeldFeatures] = {};
#pragma unroll 4
    for (int i = thread / width; i < count; i += kMergeThreads / width) {
      const int j = start + shared.listed[i];
      const std::uint32_t word = bits_of(chunk.weights.weight[j]);
      const float w = chunk.halves ? half_of_word(word, 0) + half_of_word(word, 1) : float_of(word);
      const R* const row = chunk.y.row(j);
      each_feature([&](int k, int feature) {
        const TwoFloats y = two_floats(row + feature);
        sum[k] += w * ((point[k] - y.high) - y.low);
      });
    }
    for (int k = 0; k < kHeldFeatures; ++k) value[k] += sum[k];
  }
#pragma unroll 1
  for (int half = kMergeThreads / 2; half >= width; half /= 2) {
    shared.sums[thread] = value[0];
    __syncthreads();
    if (thread < half) value[0] += shared.sums[thread + half];
    __syncthreads();
  }
}

// What find_differences needs to know of the weights w_j of a chunk.
struct DifferenceWeights {
  float sum;         // Σ w_j
  float size;        // of w_j, to which errors of sums over references are relative
  float per_part;    // w_j over the weights in parts.sums
  float per_stored;  // w_j over the stored weights
};

// value[k] = Σ_j w_j (x_i − y_ji) of a query, computed by a block. The parts lose digits where this
// sum and `before`, that of earlier chunks, are small beside what is summed. Its size is about |x|
// and √reach, the distance at which weights become small. There the block sums differences instead.
template <class R>
__device__ inline void find_differences(MergeMemory& shared, const QueryChunk<R>& chunk,
                                        const Parts& parts, int features, double reach,
                                        const DifferenceWeights& w,
                                        const float (&before)[kHeldFeatures],
                                        float (&value)[kHeldFeatures]) {
  const float per_reach = reciprocal(static_cast<float>(square_root64(reach)));
  const float per_size = reciprocal(w.size) * per_reach;
  float apart = 0, size = 0;
  for (float& v : value) v = 0;
  chunk.each_feature([&](int k, int feature) {
    float sum[1];
    sum_parts(parts, blockIdx.x, chunk.feature0 + feature, features, sum);
    value[k] = w.sum * chunk.x[feature] - w.per_part * sum[0];
    const float scaled = (before[k] + value[k]) * per_size, scaled_x = chunk.x[feature] * per_reach;
    apart += scaled * scaled, size += scaled_x * scaled_x;
  });
  apart = over_block<kMergeThreads>(apart, shared.scratch, Sum());
  size = over_block<kMergeThreads>(size, shared.scratch, Sum());
  if (apart >= kEnough * (1 + size)) return;  // false if a number is NaN or infinite
  sum_differences(shared, chunk, value);
  for (float& v : value) v *= w.per_stored;
}

// The running x − mean, like the mean in `merge`. `unit` turns the stored weights into those of
// `sums`.
template <class R>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_difference(const WeightLaw law, const double* radius, const Rows<float> x,
                     const Rows<R> y, float* difference, const Parts parts,
                     const ChunkWeights weights, Index stride, bool halves, float unit,
                     const PieceSums sums, float divisor, int features, bool first_chunk,
                     const QueryStates state) {
  auto& shared = *reinterpret_cast<MergeMemory*>(shared_memory());
  const Index query = blockIdx.x;
  const double r = radius[query];
  const MergedWeights merged(law, r, sums, state);
  const QueryChunk<R> chunk(x, y, weights, stride, halves, sums, features);
  float* const out = difference + query * features + chunk.feature0;
  const float share = merged.chunk * merged.per_weight;
  float before[kHeldFeatures] = {}, value[kHeldFeatures];
  if (!first_chunk)
    chunk.each_feature(
        [&](int k, int feature) { before[k] = merged.kept * merged.per_weight * out[feature]; });
  find_differences(shared, chunk, parts, features, sums.nearest[query] + r * r * law.per_exponent,
                   {share, share, divisor * merged.per_weight, unit * merged.per_weight}, before,
                   value);
  chunk.each_feature([&](int k, int feature) { out[feature] = before[k] + value[k]; });
}

// Adds the chunk's Σ c_j (mean − y_j) to grad_x. The last chunk turns the sum into ∂L/∂x.
// Differences from the mean keep their digits: close to a reference it is about x, and far from all
// of them it is still near the y_j.
template <class R>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_gradient(const WeightLaw law, const double* radius, const double* nearest,
                   const Rows<float> x, const Rows<float> mean, const Rows<R> y, float* grad_x,
                   const Parts parts, const ChunkWeights weights, Index stride,
                   const PieceSums sums, const Moments moments, int features, bool first_chunk,
                   bool last_chunk) {
  auto& shared = *reinterpret_cast<MergeMemory*>(shared_memory());
  const Index query = blockIdx.x;
  const double r = radius[query], sum = moments.over_pieces(moments.chunk_sum, query, sums.pieces);
  const QueryChunk<R> chunk(mean, y, weights, stride, false, sums, features);
  const Index at = query * features + chunk.feature0;
  float before[kHeldFeatures] = {}, value[kHeldFeatures];
  if (!first_chunk)
    chunk.each_feature([&](int k, int feature) { before[k] = grad_x[at + feature]; });
  const double squares = moments.over_pieces(moments.squares, query, sums.pieces);
  const double size = square_root64(sum * sum + squares);
  find_differences(shared, chunk, parts, features, nearest[query] + r * r * law.per_exponent,
                   {static_cast<float>(sum), static_cast<float>(size), 1, 1}, before, value);
  const double unit = moments.unit[query], sum_c = moments.exact_sum[query];
  const float* const point = x.row(query) + chunk.feature0;
  chunk.each_feature([&](int k, int feature) {
    float result = before[k] + value[k];
    if (last_chunk) {
      const double apart = static_cast<double>(point[feature]) - chunk.x[feature];
      result = unit == 0 ? 0 : static_cast<float>(unit * (result + sum_c * apart));
    }
    grad_x[at + feature] = result;
  });
}

}  // namespace
}  // namespace pfgm
