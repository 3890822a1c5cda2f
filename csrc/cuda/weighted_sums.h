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

// Features of a thread and of a block of merge_difference. The thread's lie kMergeThreads apart.
constexpr int kHeldFeatures = 4, kMergeFeatures = kHeldFeatures * kMergeThreads;
// From this (x − mean)² on, relative to the size of what is summed, sums over references leave
// enough digits of it.
constexpr float kEnough = 0x1p-6f;

struct MergeMemory {
  int listed[kPiece];
  float sums[kMergeThreads];
  float scratch[kMergeThreads / 32];
  int before[kMergeThreads / 32];
};

// value[k] = Σ_j w_j (x_i − y_ji) over the chunk, i = k·kMergeThreads + thread < features. `x` and
// the rows of `y` begin at the first of these features, `weights` at those of the query, which are
// words of both_halves if `halves`, and `counts` at how many of each `size` of them are not zero.
// If there are few features, threads share out the references.
template <class R>
__device__ inline void sum_differences(MergeMemory& shared, const float* x, const Rows<R>& y,
                                       int features, const ChunkWeights& weights, bool halves,
                                       const int* counts, int size, float (&value)[kHeldFeatures]) {
  const int thread = static_cast<int>(threadIdx.x);
  int width = 1;  // threads with features of their own
  while (width < features && width < kMergeThreads) width *= 2;
  const int first_feature = thread % width;
  const auto each_feature = [&](const auto& body) {
#pragma unroll
    for (int k = 0; k < kHeldFeatures; ++k) {
      const int feature = k * kMergeThreads + first_feature;
      if (feature < features) body(k, feature);
    }
  };
  float point[kHeldFeatures];
  each_feature([&](int k, int feature) { point[k] = x[feature]; });
  for (float& v : value) v = 0;
#pragma unroll 1
  for (int start = 0; start < y.count; start += kPiece) {
    if (counts[start / size] == 0) continue;
    const int words = static_cast<int>(divide_up(smaller(kPiece, y.count - start), 32));
    const int count = list<kMergeThreads>(shared.listed, shared.before, words,
                                          [&](int w) { return weights.live[start / 32 + w]; });
    float sum[kHeldFeatures] = {};
#pragma unroll 4
    for (int i = thread / width; i < count; i += kMergeThreads / width) {
      const int j = start + shared.listed[i];
      const std::uint32_t word = bits_of(weights.weight[j]);
      const float w = halves ? half_of_word(word, 0) + half_of_word(word, 1) : float_of(word);
      const R* const row = y.row(j);
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

// The running x − mean, like the mean in `merge`. Sums over references lose digits of a difference
// that is small beside the size of these, which is about |x| and the distance at which weights
// become small. Then the block sums differences. `unit` turns the stored weights into those of
// `sums`.
template <class R>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_difference(const WeightLaw law, const double* radius, const Rows<float> x, Rows<R> y,
                     float* difference, const Parts parts, ChunkWeights chunk, Index stride,
                     bool halves, float unit, const PieceSums sums, float divisor, int features,
                     bool first_chunk, const QueryStates state) {
  wait_for_earlier_launches();
  let_next_launch_start();
  auto& shared = *reinterpret_cast<MergeMemory*>(shared_memory());
  const Index query = blockIdx.x;
  const double r = radius[query];
  const MergedWeights weights(law, r, sums, state);
  const int feature0 = static_cast<int>(blockIdx.y) * kMergeFeatures, left = features - feature0;
  const float* const point = x.row(query) + feature0;
  float* const out = difference + query * features + feature0;
  const double reach = sums.closest[query] + r * r * law.per_exponent;
  const float per_reach = reciprocal(static_cast<float>(square_root64(reach)));
  const float share = weights.own * weights.per_weight;
  float before[kHeldFeatures] = {}, value[kHeldFeatures] = {}, apart = 0, size = 0;
#pragma unroll
  for (int k = 0; k < kHeldFeatures; ++k) {
    const int feature = k * kMergeThreads + static_cast<int>(threadIdx.x);
    if (feature >= left) continue;
    float sum[1];
    sum_parts(parts, query, feature0 + feature, features, sum);
    if (!first_chunk) before[k] = weights.kept * weights.per_weight * out[feature];
    value[k] = share * point[feature] - divisor * weights.per_weight * sum[0];
    const float scaled = (before[k] + value[k]) * per_reach, of_x = point[feature] * per_reach;
    apart += scaled * scaled, size += of_x * of_x;
  }
  apart = over_block<kMergeThreads>(apart, shared.scratch, Sum());
  size = over_block<kMergeThreads>(size, shared.scratch, Sum());
  if (!(apart >= kEnough * (1 + size))) {  // also if a number is out of range
    chunk.weight += query * stride, chunk.live += query * (stride / 32), y.at += feature0;
    sum_differences(shared, point, y, left, chunk, halves, sums.live + query * sums.pieces,
                    sums.size, value);
    for (float& v : value) v *= unit * weights.per_weight;
  }
#pragma unroll
  for (int k = 0; k < kHeldFeatures; ++k) {
    const int feature = k * kMergeThreads + static_cast<int>(threadIdx.x);
    if (feature < left) out[feature] = before[k] + value[k];
  }
}

// Adds the chunk's Σ c_j y_j to grad_x. The last chunk turns the sum into ∂L/∂x.
__global__ void __launch_bounds__(kMergeThreads)
    merge_gradient(float* grad_x, const Parts parts, const Rows<float> x, const float* mean,
                   const Moments moments, int features, bool first_chunk, bool last_chunk) {
  wait_for_earlier_launches();
  let_next_launch_start();
  const Index query = blockIdx.x;
  const int feature = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
  if (feature >= features) return;
  const Index at = query * features + feature;
  float sums[1];
  sum_parts(parts, query, feature, features, sums);
  float sum = sums[0] + (first_chunk ? 0 : grad_x[at]);
  if (last_chunk) {
    const double point = x.row(query)[feature], center = mean[at], unit = moments.unit[query];
    const double apart = sum - moments.total[query] * center;
    const double gradient = unit * (moments.exact_sum[query] * (point - center) - apart);
    sum = unit == 0 ? 0 : static_cast<float>(gradient);
  }
  grad_x[at] = sum;
}

// Adds Σ_b p_bj G_b − F c_bj (x_b − y_j) over a block of queries to grad_y of 32 references. Here
// references are the rows of the result, and queries are listed.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    reference_gradient(const Rows<float> upstream, const Rows<float> x, const Rows<R> y,
                       int features, const Coefficients coefficients, Index stride,
                       bool first_block, float* grad_y) {
  wait_for_earlier_launches();
  using Memory = GradientMemory;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const Index reference0 = static_cast<Index>(blockIdx.y) * kSumRows;
  float sum[2][kSumRows / 8][4] = {}, of_y[kSumRows / 8][2] = {};

  constexpr int kListed = kPanel * kPartPanels;
  for (Index first = 0; first < x.count; first += kListed) {
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
          for (int i = static_cast<int>(threadIdx.x); i < kSumRows * kPanel; i += kSumThreads) {
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
                for (int k = lane.g; k < kPanel; k += 8)
                  of_y[n][odd] -= weights[k * (kSumRows + 8) + 8 * n + 2 * lane.t + odd];
          add_weighted<kPanel, kSumRows / 8, kSumPitch<float>>(
              sum, shared.rows[slot][0] + 32 * lane.warp,
              [&](int n, int s) {
                const float* const at =
                    weights + (8 * s + lane.t) * (kSumRows + 8) + 8 * n + lane.g;
                return float2{at[0], at[4 * (kSumRows + 8)]};
              },
              lane);
        });
  }

#pragma unroll
  for (int n = 0; n < kSumRows / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      for (int apart = 4; apart < 32; apart *= 2)
        of_y[n][odd] += __shfl_xor_sync(kAll, of_y[n][odd], apart);
      const Index j = reference0 + 8 * n + 2 * lane.t + odd;
      if (j >= y.count) continue;
      for (int f = 0; f < 4; ++f) {
        const int feature = feature0 + 32 * lane.warp + 4 * lane.g + f;
        if (feature >= features) continue;
        float gradient =
            sum[f / 2][n][f % 2 * 2 + odd] + of_y[n][odd] * load_float(y.row(j) + feature);
        float& out = grad_y[j * features + feature];
        out = first_block ? gradient : out + gradient;
      }
    }
}

}  // namespace
}  // namespace pfgm
