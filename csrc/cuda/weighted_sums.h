// Weighted sums over references, and over queries for the gradient of the references, on CUDA
// devices.
//
// A block stages only references, or queries, that are listed (cuda/lists.h).
#pragma once
#include "cuda/lists.h"

namespace pfgm {
namespace {

constexpr int kSumFeatures = 128;  // of the result of a block
constexpr int kSumThreads = kSumFeatures;
constexpr int kSumBlocks = 2;  // whose registers a multiprocessor must hold
constexpr int kMergeThreads = 256;

// Weights in halves are multiplied by it. The largest weight is then far from overflow, and others
// are off by at most 2^-39 of it.
constexpr float kWeightUnit = 0x1p14f;

// Whether halves hold a feature to about 2^-20 of its largest value, in units of `unit`. float16
// ends at 65504 and at steps of 2^-24.
__device__ inline bool halves_hold(float largest, float unit) {
  return largest == 0 || (largest >= 0x1p-5f * unit && largest <= 65504 * unit);
}

// Between staged rows: 32 bytes more than a multiple of the 32 banks, so that the accesses of a
// warp lie in different banks.
template <class T> constexpr int kSumPitch = kSumFeatures + 32 / sizeof(T);

// Of a block of weighted_sum with a group of ROWS queries.
template <class T, int ROWS>
struct SumMemory {
  using Value = T;
  using Place = std::uint16_t;  // of a reference in a chunk
  static constexpr int kStages = 2;
  T rows[kStages][kPanel][kSumPitch<T>];
  float weights[kStages][kPanel * ROWS];
  Place listed[kPanel * kPartPanels];
  int scratch[kSumThreads / 32];
  int queries[ROWS];
};
// The driver takes 1 KiB more for each block. So GeForce cards hold two blocks in 100 KiB.
static_assert(sizeof(SumMemory<float, kSumRows>) <= 49 << 10, "GeForce cards hold two blocks");

// Of a block of reference_gradient.
struct GradientMemory {
  using Value = float;
  using Place = int;
  static constexpr int kStages = 3;
  float rows[kStages][kPanel][kSumPitch<float>];
  float weights[kStages][kPanel * (kSumRows + 8)];
  Place listed[kPanel * kPartPanels];
  int scratch[kSumThreads / 32];
  float2 squares[kSumThreads / 32][kSumRows];  // of results, and of what is summed
};
static_assert(sizeof(GradientMemory) <= kSharedLimit, "a block fits everywhere");

// Copies kSumFeatures values of listed rows, from `feature` on. A thread copies the same piece of
// each of its rows. Values after the last feature become zero.
template <class Memory>
class ListedCopy {
 public:
  using T = typename Memory::Value;
  using Place = typename Memory::Place;

  __device__ ListedCopy(Memory& shared, const Rows<T>& rows, Index first, int feature, int features)
      : rows_(rows), whole_(rows.aligned && features % kCount == 0) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, piece_ = thread % kPieces;
    const int known = features - feature - piece_ * kCount;
    known_ = known < 0 ? 0 : known < kCount ? known : kCount;
    from_ = rows.row(first) + feature + piece_ * kCount;
    if (known_ > 0) return;
#pragma unroll 1
    for (int slot = 0; slot < Memory::kStages; ++slot)
#pragma unroll 1
      for (int row = row_; row < kPanel; row += kStep)
        *reinterpret_cast<uint4*>(&shared.rows[slot][row][piece_ * kCount]) = {};
  }

  // Starts the copies of the panel whose indices are at `listed`.
  __device__ void panel(Memory& shared, int slot, const Place* listed) const {
    if (known_ == 0) return;
    T* const to = &shared.rows[slot][row_][piece_ * kCount];
    if (whole_) {
      // The product of two 32-bit numbers is one instruction, that of 64-bit numbers several.
      const auto bytes = static_cast<std::uint32_t>(rows_.stride * sizeof(T));
      const auto* const from = reinterpret_cast<const char*>(from_);
      std::uint32_t places[kPanel / kStep];  // all are read before the first copy begins
      for (int i = 0; i < kPanel / kStep; ++i)
        places[i] = static_cast<std::uint32_t>(listed[row_ + i * kStep]);
#pragma unroll
      for (int i = 0; i < kPanel / kStep; ++i)
        copy_async<16>(to + i * kStep * kSumPitch<T>,
                       from + static_cast<std::uint64_t>(places[i]) * bytes);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kPanel; i += kStep)
      for (int k = 0; k < kCount; ++k)
        to[i * kSumPitch<T> + k] = k < known_ ? from_[listed[row_ + i] * rows_.stride + k] : T{};
  }

 private:
  static constexpr int kCount = 16 / sizeof(T), kPieces = kSumFeatures / kCount;
  static constexpr int kStep = kSumThreads / kPieces;
  static_assert(kPanel % kStep == 0, "every thread copies as many rows");
  const T* from_;
  const Rows<T>& rows_;
  const bool whole_;
  int row_, piece_, known_;
};

// One value or four, in one access.
template <int WIDTH>
__device__ inline void load_values(const float* from, float (&v)[WIDTH]) {
  if constexpr (WIDTH == 4)
    load4(from, v);
  else
    v[0] = *from;
}
template <int WIDTH>
__device__ inline void store_values(float* to, const float (&v)[WIDTH]) {
  if constexpr (WIDTH == 4)
    *reinterpret_cast<float4*>(to) = float4{v[0], v[1], v[2], v[3]};
  else
    *to = v[0];
}

// sums[part][query][feature] = Σ_j w_j y_j / divisor over one part of the list of the query's
// group. `divisor` is a power of two with which no sum of M weighted values overflows; weights have
// been divided by it. If HALVES, they are halves instead, times kWeightUnit, and 1 over kWeightUnit
// · divisor is `weight_unit`.
template <class R, int ROWS, bool HALVES>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    weighted_sum(const Rows<R> y, int features, const float* scale, float weight_unit,
                 const int* order, const Lists lists, const Parts parts) {
  wait_for_earlier_launches();
  using Memory = SumMemory<R, ROWS>;
  constexpr int kTiles = ROWS / 8, kPanelWeights = kPanel * ROWS;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x);
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  // The last queries of the order have most weights. Their blocks start first.
  const int group = static_cast<int>(gridDim.y - 1 - blockIdx.y), query0 = ROWS * group;
  const int first = static_cast<int>(blockIdx.z) * parts.panels * kPanel;
  const int left = lists.counts[group] - first;
  if (left <= 0) return;  // the same for all threads
  const int count = static_cast<int>(smaller(left, parts.panels * kPanel));
  const int panels = static_cast<int>(divide_up(count, kPanel));
  if (thread < ROWS) {
    const int place = query0 + (query0 + thread < parts.queries ? thread : 0);
    shared.queries[thread] = order ? order[place] : place;
  }
  const Index list = group * lists.stride + first;
  const int* const listed = lists.listed + list;
  for (int i = thread; i < panels * kPanel; i += kSumThreads)
    shared.listed[i] = static_cast<typename Memory::Place>(listed[i]);
  __syncthreads();

  const ListedCopy<Memory> copy(shared, y, 0, feature0, features);
  const float* const weights_at = lists.weights + (ROWS * list + 4 * thread);
  const auto stage = [&](int p, int slot) {
    copy.panel(shared, slot, shared.listed + p * kPanel);
#pragma unroll
    for (int i = 0; i < kPanelWeights; i += 4 * kSumThreads)
      copy_async<16>(&shared.weights[slot][i + 4 * thread], weights_at + (p * kPanelWeights + i));
  };

  float sum[2][kTiles][4] = {};
  const int own = 32 * lane.warp;
  const auto values = [&](int slot) { return shared.rows[slot][0] + own; };
  constexpr bool kScaled = HALVES && !kExactHalf<R>;
  const float factor = kScaled ? scale[0] : 1;
  float largest[4] = {}, unit = HALVES ? weight_unit : 1, per_factor = kScaled ? scale[1] : 1;
  pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
    if constexpr (HALVES)
      add_weighted_halves<kExactHalf<R>, kTiles, kSumPitch<R>>(
          sum, values(slot), shared.weights[slot], factor, largest, lane);
    else
      add_weighted<kPanel, kTiles, kSumPitch<R>>(
          sum, values(slot),
          [&](int n, int s) {
            return *reinterpret_cast<const float2*>(
                &shared.weights[slot][pair_place(n, s, lane.lane)]);
          },
          lane);
  });
  if constexpr (kScaled) {
    bool hold = true;
    for (float value : largest) hold = hold && halves_hold(value, per_factor);
    if (over_block<kSumThreads>(hold ? 0 : 1, shared.scratch, Most()) != 0) {
      for (auto& features : sum)
        for (auto& tile : features)
          for (float& value : tile) value = 0;
      pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
        add_weighted_floats<kTiles, kSumPitch<R>>(sum, values(slot), shared.weights[slot],
                                                  weight_unit, lane);
      });
      unit = per_factor = 1;
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (query0 + q >= parts.queries) continue;
      const Index row = static_cast<Index>(blockIdx.z) * parts.queries + shared.queries[q];
      float* out = parts.sums + row * features;
      // In two steps: the product of the units may be too small for float32.
      float v[4];
      for (int f = 0; f < 4; ++f)
        v[f] = kUnit<R> * unit * sum[f / 2][n][f % 2 * 2 + odd] * per_factor;
      const int feature = feature0 + own + 4 * lane.g;
      if (features % 4 == 0) {
        if (feature < features) store_values(out + feature, v);
      } else {
        for (int f = 0; f < 4; ++f)
          if (feature + f < features) out[feature + f] = v[f];
      }
    }
}

// Sums of the parts of one query and WIDTH features from `feature` on, in float32 like the parts.
template <int WIDTH>
__device__ inline void sum_parts(const Parts& parts, Index query, int feature, Index features,
                                 float (&sum)[WIDTH]) {
  const Index at = query * features + feature;
  const int slice = parts.slices > 1 ? feature / kShareFeatures : 0;
  const int count = parts.counts[slice * static_cast<Index>(parts.queries) + query];
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
  float kept, own, per_weight;

  // The first thread of one block of each query also writes the state.
  __device__ MergedWeights(const WeightLaw& law, double r, const PieceSums& sums,
                           const QueryStates& state) {
    const Index query = blockIdx.x;
    const float* const of_pieces = sums.sum + query * sums.pieces;
    kept = static_cast<float>(sums.kept[query]), own = 0;
#pragma unroll 4
    for (int piece = 0; piece < sums.pieces; ++piece) own += of_pieces[piece];
    per_weight = reciprocal(kept + own);
    if (blockIdx.y > 0 || threadIdx.x > 0) return;
    const double nearest = sums.closest[query];
    double total = sums.kept[query];
#pragma unroll 1
    for (int piece = 0; piece < sums.pieces; ++piece) total += of_pieces[piece];
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
  wait_for_earlier_launches();
  let_next_launch_start();
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
// From this square of a sum of differences on, relative to the size of what is summed, sums over
// references leave enough digits of it.
constexpr float kEnough = 0x1p-6f;

struct MergeMemory {
  int listed[kPiece];
  float sums[kMergeThreads];
  float scratch[kMergeThreads / 32];
  int before[kMergeThreads / 32];
};

// The features from the first one of a block on, of a query and of a chunk of references, and their
// weights, which are words of both_halves if `halves`. `counts` says how many of each `size` of
// them are not zero.
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
    counts = sums.live + query * sums.pieces;
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
        const TwoFloats of_y = two_floats(row + feature);
        sum[k] += w * ((point[k] - of_y.high) - of_y.low);
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

// The weights w_j that a sum of differences has of a chunk.
struct DifferenceWeights {
  float sum;        // Σ w_j
  float size;       // of w_j, to which errors of sums over references are relative
  float of_parts;   // w_j over the weights that parts.sums have
  float of_stored;  // the same of those that are stored
};

// value[k] = Σ_j w_j (x_i − y_ji) of a query, computed by a block. Sums over references lose digits
// where this and `before`, that of earlier chunks, are small beside the size of what is summed,
// which is about |x| and `reach`, the distance at which weights become small, squared. Then the
// block sums differences.
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
    value[k] = w.sum * chunk.x[feature] - w.of_parts * sum[0];
    const float scaled = (before[k] + value[k]) * per_size, of_x = chunk.x[feature] * per_reach;
    apart += scaled * scaled, size += of_x * of_x;
  });
  apart = over_block<kMergeThreads>(apart, shared.scratch, Sum());
  size = over_block<kMergeThreads>(size, shared.scratch, Sum());
  if (apart >= kEnough * (1 + size)) return;  // no, if a number is out of range
  sum_differences(shared, chunk, value);
  for (float& v : value) v *= w.of_stored;
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
  wait_for_earlier_launches();
  let_next_launch_start();
  auto& shared = *reinterpret_cast<MergeMemory*>(shared_memory());
  const Index query = blockIdx.x;
  const double r = radius[query];
  const MergedWeights merged(law, r, sums, state);
  const QueryChunk<R> chunk(x, y, weights, stride, halves, sums, features);
  float* const out = difference + query * features + chunk.feature0;
  const float share = merged.own * merged.per_weight;
  float before[kHeldFeatures] = {}, value[kHeldFeatures];
  if (!first_chunk)
    chunk.each_feature(
        [&](int k, int feature) { before[k] = merged.kept * merged.per_weight * out[feature]; });
  find_differences(shared, chunk, parts, features, sums.closest[query] + r * r * law.per_exponent,
                   {share, share, divisor * merged.per_weight, unit * merged.per_weight}, before,
                   value);
  chunk.each_feature([&](int k, int feature) { out[feature] = before[k] + value[k]; });
}

// Adds the chunk's Σ c_j (x − y_j) to grad_x. The last chunk turns the sum into ∂L/∂x. What c_j
// lose where they are rounded counts as if it were at the mean.
template <class R>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_gradient(const WeightLaw law, const double* radius, const double* nearest,
                   const Rows<float> x, const Rows<R> y, float* grad_x, const float* mean,
                   const Parts parts, const ChunkWeights weights, Index stride,
                   const PieceSums sums, const Moments moments, int features, bool first_chunk,
                   bool last_chunk) {
  wait_for_earlier_launches();
  let_next_launch_start();
  auto& shared = *reinterpret_cast<MergeMemory*>(shared_memory());
  const Index query = blockIdx.x;
  const double r = radius[query], sum = moments.over_pieces(moments.of_chunk, query, sums.pieces);
  const QueryChunk<R> chunk(x, y, weights, stride, false, sums, features);
  const Index at = query * features + chunk.feature0;
  float before[kHeldFeatures] = {}, value[kHeldFeatures];
  if (!first_chunk)
    chunk.each_feature([&](int k, int feature) { before[k] = grad_x[at + feature]; });
  const double squares = moments.over_pieces(moments.squares, query, sums.pieces);
  const double size = square_root64(sum * sum + squares);
  find_differences(shared, chunk, parts, features, nearest[query] + r * r * law.per_exponent,
                   {static_cast<float>(sum), static_cast<float>(size), 1, 1}, before, value);
  const double unit = moments.unit[query];
  const double rest = moments.exact_sum[query] - moments.total[query];
  chunk.each_feature([&](int k, int feature) {
    float result = before[k] + value[k];
    if (last_chunk) {
      const double apart = static_cast<double>(chunk.x[feature]) - mean[at + feature];
      result = unit == 0 ? 0 : static_cast<float>(unit * (result + rest * apart));
    }
    grad_x[at + feature] = result;
  });
}

// Adds Σ_b p_bj G_b − F c_bj (x_b − y_j) over a block of queries to grad_y of 32 references. Here
// references are the rows of the result, and queries are listed. Products with x_b and y_j lose
// digits where these are close: then the block sums differences for a reference.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    reference_gradient(const Rows<float> upstream, const Rows<float> x, const Rows<R> y,
                       int features, const Coefficients coefficients, Index stride,
                       bool first_block, float* grad_y) {
  wait_for_earlier_launches();
  using Memory = GradientMemory;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x);
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const Index reference0 = static_cast<Index>(blockIdx.y) * kSumRows;

  constexpr int kListed = kPanel * kPartPanels;
  for (Index first = 0; first < x.count; first += kListed) {
    float sum[2][kSumRows / 8][4] = {}, of_y[kSumRows / 8][2] = {};
    float size[kSumRows / 8][2] = {}, largest[kSumRows / 8][2] = {};  // of −F c
    const Index left = x.count - first;
    const int words = static_cast<int>(divide_up(smaller(kListed, left), 32));
    const int count = list<kSumThreads>(shared.listed, shared.scratch, words, [&](int w) {
      unsigned any = 0;
      for (int b = 0; b < 32 && 32 * w + b < left; ++b) {
        const Index word = (first + 32 * w + b) * (stride / 32) + reference0 / 32;
        any |= static_cast<unsigned>(coefficients.c.live[word] != 0) << b;
      }
      return any;
    });
    const int panels = static_cast<int>(divide_up(count, kPanel));
    const ListedCopy<Memory> of_upstream(shared, upstream, first, feature0, features);
    const ListedCopy<Memory> of_x(shared, x, first, feature0, features);
    // The first half of the panels has G and p, the second half x and −F c.
    pipeline<Memory::kStages>(
        2 * panels,
        [&](int p, int slot) {
          const bool second = p >= panels;
          const int listed = (second ? p - panels : p) * kPanel;
          if (second)
            of_x.panel(shared, slot, shared.listed + listed);
          else
            of_upstream.panel(shared, slot, shared.listed + listed);
          const float* weights = second ? coefficients.scaled : coefficients.probability;
          for (int i = thread; i < kSumRows * kPanel; i += kSumThreads) {
            const int k = i / kSumRows, j = i % kSumRows;
            const bool known = listed + k < count;
            const Index row = known ? first + shared.listed[listed + k] : 0;
            copy_async<4>(&shared.weights[slot][k * (kSumRows + 8) + j],
                          weights + row * stride + reference0 + j, known ? 4 : 0);
          }
        },
        [&](int p, int slot) {
          const float* weights = shared.weights[slot];
          if (p >= panels)  // each lane takes an eighth of the queries
#pragma unroll
            for (int n = 0; n < kSumRows / 8; ++n)
              for (int odd = 0; odd < 2; ++odd)
                for (int k = lane.g; k < kPanel; k += 8) {
                  const float w = weights[k * (kSumRows + 8) + 8 * n + 2 * lane.t + odd];
                  of_y[n][odd] -= w, size[n][odd] += fabsf(w);
                  largest[n][odd] = fmaxf(largest[n][odd], fabsf(w));
                }
          add_weighted<kPanel, kSumRows / 8, kSumPitch<float>>(
              sum, shared.rows[slot][0] + 32 * lane.warp,
              [&](int n, int s) {
                const float* const at =
                    weights + (8 * s + lane.t) * (kSumRows + 8) + 8 * n + lane.g;
                return float2{at[0], at[4 * (kSumRows + 8)]};
              },
              lane);
        });

    const bool begins = first_block && first == 0;
    const auto store = [&](Index j, int feature, float gradient) {
      float& out = grad_y[j * features + feature];
      out = begins ? gradient : out + gradient;
    };
    // Calls body(n, odd, f, j, feature) for the results of this thread.
    const auto each_result = [&](int n, int odd, const auto& body) {
      const Index j = reference0 + 8 * n + 2 * lane.t + odd;
      for (int f = 0; f < 4; ++f) {
        const int feature = feature0 + 32 * lane.warp + 4 * lane.g + f;
        if (j < y.count && feature < features) body(j, feature, sum[f / 2][n][f % 2 * 2 + odd]);
      }
    };
#pragma unroll
    for (int n = 0; n < kSumRows / 8; ++n)
      for (int odd = 0; odd < 2; ++odd) {
        float total = of_y[n][odd], weights = size[n][odd], most = largest[n][odd];
        for (int apart = 4; apart < 32; apart *= 2) {
          total += __shfl_xor_sync(kAll, total, apart);
          weights += __shfl_xor_sync(kAll, weights, apart);
          most = fmaxf(most, __shfl_xor_sync(kAll, most, apart));
        }
        // Sums of numbers of both signs have errors relative to √(Σ w²), which is at most this.
        const float of_weights = fmaxf(fabsf(total), square_root(weights) * square_root(most));
        float of_result = 0, of_sums = 0;  // squares
        each_result(n, odd, [&](Index j, int feature, float& result) {
          const float v = load_float(y.row(j) + feature), scaled = of_weights * v;
          result += total * v;
          of_result += result * result, of_sums += scaled * scaled;
        });
        for (int apart = 4; apart < 32; apart *= 2) {
          of_result += __shfl_xor_sync(kAll, of_result, apart);
          of_sums += __shfl_xor_sync(kAll, of_sums, apart);
        }
        if (lane.g == 0) shared.squares[lane.warp][8 * n + 2 * lane.t + odd] = {of_result, of_sums};
      }
    __syncthreads();
    float of_result = 0, of_sums = 0;  // of the reference with the lane's number
    for (const auto& row : shared.squares)
      of_result += row[lane.lane].x, of_sums += row[lane.lane].y;
    unsigned again =
        __ballot_sync(kAll, reference0 + lane.lane < y.count && !(of_result >= kEnough * of_sums));
#pragma unroll
    for (int n = 0; n < kSumRows / 8; ++n)
      for (int odd = 0; odd < 2; ++odd)
        if ((again >> (8 * n + 2 * lane.t + odd) & 1u) == 0)
          each_result(n, odd,
                      [&](Index j, int feature, float result) { store(j, feature, result); });
#pragma unroll 1
    for (const int feature = feature0 + thread; again != 0; again &= again - 1) {
      if (feature >= features) break;
      const Index j = reference0 + __ffs(static_cast<int>(again)) - 1;
      const TwoFloats of_y = two_floats(y.row(j) + feature);
      float result = 0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const Index query = first + shared.listed[i], place = query * stride + j;
        const float apart = (x.row(query)[feature] - of_y.high) - of_y.low;
        result += coefficients.probability[place] * upstream.row(query)[feature] +
                  coefficients.scaled[place] * apart;
      }
      store(j, feature, result);
    }
  }
}

}  // namespace
}  // namespace pfgm
