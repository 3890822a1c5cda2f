// Weighted sums over references, and over queries for the gradient of the references, on CUDA
// devices.
//
// Most weights are zero. A block lists the references, or queries, whose weight is not zero for any
// row of its result, and stages only those.
#pragma once
#include "cuda/weights.h"

namespace pfgm {
namespace {

// Size of the result of a block. A warp takes 32 features.
constexpr int kSumFeatures = 128, kSumRows = 32;
constexpr int kSumThreads = kSumFeatures;
constexpr int kStretchWords = 64;  // words of 32 references that a block lists, at most
constexpr int kMergeThreads = 256;
static_assert(kStretchWords <= kSumThreads, "one thread a word");

// Weights in halves are multiplied by it. The largest weight is then far from overflow, and others
// are off by at most 2^-39 of it.
constexpr float kWeightUnit = 0x1p14f;

// Whether halves hold a feature to about 2^-20 of its largest value, in units of `unit`. float16
// ends at 65504 and at steps of 2^-24.
__device__ inline bool halves_hold(float largest, float unit) {
  return largest == 0 || (largest >= 0x1p-5f * unit && largest <= 65504 * unit);
}

template <class T>
struct SumMemory {
  static constexpr int kStages = 3;
  // 32 bytes more than a multiple of the 32 banks: the accesses of a warp lie in different banks.
  static constexpr int kPitch = kSumFeatures + 32 / sizeof(T);
  static constexpr int kWeightPitch = kPanel + 4;
  T rows[kStages][kPanel][kPitch];
  float weights[kStages][kPanel * (kSumRows + 8)];
  int listed[32 * kStretchWords];
  int before[kStretchWords];
  int queries[kSumRows];
};
static_assert(sizeof(SumMemory<float>) <= kSharedLimit, "a block fits everywhere");

// Writes the indices of all set bits to listed, in ascending order, and returns their number.
// bits(w) is word w. The last index is repeated up to whole panels.
template <class T, class Bits>
__device__ inline int list(SumMemory<T>& shared, int words, Bits bits) {
  const int w = static_cast<int>(threadIdx.x);
  unsigned word = 0;
  if (w < words) word = bits(w);
  if (w < words) shared.before[w] = __popc(word);
  __syncthreads();
  int place = 0, count = 0;
  for (int i = 0; i < words; ++i) {
    if (i == w) place = count;
    count += shared.before[i];
  }
  const bool last = word != 0 && place + __popc(word) == count;
  for (int b = 0; b < 32; ++b)
    if (word >> b & 1u) shared.listed[place++] = 32 * w + b;
  for (; last && place % kPanel != 0; ++place) shared.listed[place] = shared.listed[count - 1];
  __syncthreads();
  return count;
}

// Copies kSumFeatures values of listed rows, from `feature` on. A thread copies the same piece of
// each of its rows.
template <class T>
class ListedCopy {
 public:
  __device__ ListedCopy(const Rows<T>& rows, Index first, int feature, int features)
      : stride_(rows.stride), aligned_(rows.aligned) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / kPieces, piece_ = thread % kPieces;
    const int known = features - feature - piece_ * kCount;
    known_ = known < 0 ? 0 : known < kCount ? known : kCount;
    from_ = rows.row(first) + feature + piece_ * kCount;
  }

  // Starts the copies of the panel whose indices are at `listed`.
  __device__ void panel(SumMemory<T>& shared, int slot, const int* listed) const {
    constexpr int kPitch = SumMemory<T>::kPitch;
    T* const to = &shared.rows[slot][row_][piece_ * kCount];
#pragma unroll
    for (int i = 0; i < kPanel; i += kStep) {
      const T* const from = from_ + listed[row_ + i] * stride_;
      if (aligned_)
        copy_async<16>(to + i * kPitch, from, known_ * static_cast<int>(sizeof(T)));
      else
        for (int k = 0; k < kCount; ++k) to[i * kPitch + k] = k < known_ ? from[k] : T{};
    }
  }

 private:
  static constexpr int kCount = 16 / sizeof(T), kPieces = kSumFeatures / kCount;
  static constexpr int kStep = kSumThreads / kPieces;
  static_assert(kPanel % kStep == 0, "every thread copies as many rows");
  const T* from_;
  const Index stride_;
  const bool aligned_;
  int row_, piece_, known_;
};

// parts[stretch][query][feature] = Σ_j w_j y_j / divisor over one stretch of the chunk. With
// `order`, which may be null, a block takes queries that follow each other there. `divisor` is a
// power of two with which no sum of M weighted values overflows; weights have been divided by it.
// If HALVES, they are halves instead, times kWeightUnit, and 1 over kWeightUnit · divisor is
// `weight_unit`.
template <class R, bool HALVES>
__global__ void __launch_bounds__(kSumThreads, 2)
    weighted_sum(const Rows<R> y, int features, const float* scale, const ChunkWeights weights,
                 float weight_unit, Index stride, int queries, const int* order, int stretch_words,
                 float* parts) {
  using Memory = SumMemory<R>;
  constexpr int kTiles = kSumRows / 8;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const int query0 = static_cast<int>(blockIdx.y) * kSumRows;
  const int known_queries = static_cast<int>(smaller(kSumRows, queries - query0));
  const Index first = static_cast<Index>(blockIdx.z) * stretch_words * 32;
  const int words = static_cast<int>(smaller(stretch_words, divide_up(y.count - first, 32)));
  if (const int q = static_cast<int>(threadIdx.x); q < kSumRows) {
    const int place = query0 + (q < known_queries ? q : 0);
    shared.queries[q] = order ? order[place] : place;
  }
  __syncthreads();
  const int count = list(shared, words, [&](int w) {
    unsigned any = 0;
    for (int q = 0; q < known_queries; ++q)
      any |= weights.live[shared.queries[q] * (stride / 32) + first / 32 + w];
    return any;
  });

  // A thread copies the weights of one reference of a panel, for every fourth query.
  constexpr int kStep = kSumThreads / kPanel;
  const int k = static_cast<int>(threadIdx.x) % kPanel, q0 = static_cast<int>(threadIdx.x) / kPanel;
  const float* const weights_of_stretch = weights.weight + first;
  const int apart = static_cast<int>(stride);
  const ListedCopy<R> copy(y, first, feature0, features);

  float sum[2][kTiles][4] = {};
  const int panels = static_cast<int>(divide_up(count, kPanel));
  const auto stage = [&](int p, int slot) {
    const int* const listed = shared.listed + p * kPanel;
    copy.panel(shared, slot, listed);
    const float* const from = weights_of_stretch + listed[k];
    const int valid = p * kPanel + k < count ? 4 : 0;
#pragma unroll
    for (int i = 0; i < kSumRows / kStep; ++i)
      copy_async<4>(&shared.weights[slot][(q0 + kStep * i) * Memory::kWeightPitch + k],
                    from + shared.queries[q0 + kStep * i] * apart, valid);
  };
  const int own = 32 * lane.warp;
  const auto values = [&](int slot) { return shared.rows[slot][0] + own; };
  constexpr bool kScaled = HALVES && !kExactHalf<R>;
  const float factor = kScaled ? scale[0] : 1;
  float largest[4] = {}, unit = HALVES ? weight_unit : 1, per_factor = kScaled ? scale[1] : 1;
  pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
    if constexpr (HALVES)
      add_weighted_halves<kExactHalf<R>, kTiles, Memory::kPitch, Memory::kWeightPitch>(
          sum, values(slot), shared.weights[slot], factor, largest, lane);
    else
      add_weighted<kPanel, kTiles, Memory::kPitch, Memory::kWeightPitch, 1>(
          sum, values(slot), shared.weights[slot], lane);
  });
  if constexpr (kScaled) {
    bool hold = true;
    for (float value : largest) hold = hold && halves_hold(value, per_factor);
    if (over_block<kSumThreads>(hold ? 0 : 1, shared.before, Most()) != 0) {
      for (auto& features : sum)
        for (auto& tile : features)
          for (float& value : tile) value = 0;
      pipeline<Memory::kStages>(panels, stage, [&](int, int slot) {
        add_weighted_floats<kTiles, Memory::kPitch, Memory::kWeightPitch>(
            sum, values(slot), shared.weights[slot], weight_unit, lane);
      });
      unit = per_factor = 1;
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= known_queries) continue;
      const Index row = static_cast<Index>(blockIdx.z) * queries + shared.queries[q];
      float* out = parts + row * features;
      for (int f = 0; f < 4; ++f) {
        const int feature = feature0 + own + 4 * lane.g + f;
        // In two steps: the product of the units may be too small for float32.
        if (feature < features)
          out[feature] = kUnit<R> * unit * sum[f / 2][n][f % 2 * 2 + odd] * per_factor;
      }
    }
}

// The sum of the parts of one query and feature, in float32 like the parts.
__device__ inline float sum_of_parts(const float* parts, int stretches, Index apart) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < stretches; ++i) sum += parts[i * apart];
  return sum;
}

// The running mean: that of earlier chunks, with their weight, and the sums over the stretches of
// this chunk, times `divisor`. One block of each query also writes the state.
__global__ void __launch_bounds__(kMergeThreads)
    merge(const WeightLaw law, const double* radius, float* mean, const float* parts,
          const PieceSums sums, float divisor, int features, int stretches, bool first_chunk,
          const QueryStates state) {
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float* const of_pieces = sums.sum + query * sums.pieces;
  const float kept = static_cast<float>(sums.kept[query]);
  float weight = kept;
#pragma unroll 4
  for (int piece = 0; piece < sums.pieces; ++piece) weight += of_pieces[piece];
  if (blockIdx.y == 0 && thread == 0) {
    const double nearest = sums.closest[query];
    double total = sums.kept[query];
#pragma unroll 1
    for (int piece = 0; piece < sums.pieces; ++piece) total += of_pieces[piece];
    state.nearest[query] = nearest;
    state.total[query] = total;
    state.logsumexp[query] = law.logsumexp(nearest, total, radius[query]);
  }
  const int feature = static_cast<int>(blockIdx.y) * kMergeThreads + thread;
  if (feature >= features) return;
  const Index at = query * features + feature, apart = static_cast<Index>(gridDim.x) * features;
  const float per_weight = reciprocal(weight);
  const float before = first_chunk ? 0 : kept * per_weight * mean[at];
  mean[at] = before + divisor * per_weight * sum_of_parts(parts + at, stretches, apart);
}

// Adds the chunk's Σ c_j y_j to grad_x. The last chunk turns the sum into ∂L/∂x.
__global__ void __launch_bounds__(kMergeThreads)
    merge_gradient(float* grad_x, const float* parts, const Rows<float> x, const float* mean,
                   const Moments moments, int features, int stretches, bool first_chunk,
                   bool last_chunk) {
  const Index query = blockIdx.x;
  const int feature = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
  if (feature >= features) return;
  const Index at = query * features + feature;
  float sum = sum_of_parts(parts + at, stretches, static_cast<Index>(gridDim.x) * features);
  if (!first_chunk) sum += grad_x[at];
  if (last_chunk) {
    const double point = x.row(query)[feature], center = mean[at], unit = moments.unit[query];
    const double apart = sum - moments.sum[query] * center;
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
  using Memory = SumMemory<float>;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const Index reference0 = static_cast<Index>(blockIdx.y) * kSumRows;
  float sum[2][kSumRows / 8][4] = {}, of_y[kSumRows / 8][2] = {};

  for (Index first = 0; first < x.count; first += 32 * kStretchWords) {
    const Index left = x.count - first;
    const int words = static_cast<int>(smaller(kStretchWords, divide_up(left, 32)));
    const int count = list(shared, words, [&](int w) {
      unsigned any = 0;
      for (int b = 0; b < 32 && 32 * w + b < left; ++b) {
        const Index word = (first + 32 * w + b) * (stride / 32) + reference0 / 32;
        any |= static_cast<unsigned>(coefficients.c.live[word] != 0) << b;
      }
      return any;
    });
    const int panels = static_cast<int>(divide_up(count, kPanel));
    const ListedCopy<float> of_upstream(upstream, first, feature0, features);
    const ListedCopy<float> of_x(x, first, feature0, features);
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
          add_weighted<kPanel, kSumRows / 8, Memory::kPitch, 1, kSumRows + 8>(
              sum, shared.rows[slot][0] + 32 * lane.warp, weights, lane);
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
