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
};
static_assert(sizeof(SumMemory<float>) <= kSharedLimit, "a block fits everywhere");

// Writes the indices of all set bits to listed, in ascending order, and returns their number.
// bits(w) is word w.
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
  for (int b = 0; b < 32; ++b)
    if (word >> b & 1u) shared.listed[place++] = 32 * w + b;
  __syncthreads();
  return count;
}

// Starts to copy the listed rows, kSumFeatures values of each from `feature` on.
template <class T>
__device__ inline void copy_listed(SumMemory<T>& shared, int slot, const Rows<T>& rows, Index first,
                                   int listed, int count, int feature, int features) {
  constexpr int pieces = kSumFeatures * sizeof(T) / 16;
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * pieces; i += kSumThreads) {
    const int k = i / pieces;
    const bool known = listed + k < count;
    const Index row = known ? first + shared.listed[listed + k] : 0;
    copy_piece<kSumFeatures>(shared.rows[slot][k], rows.row(row) + feature, i % pieces,
                             known ? features - feature : 0, rows.aligned);
  }
}

// parts[stretch][query][feature] = share_query Σ_j w_j y_j over one stretch of the chunk. Without
// `share`, every share is 1.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    weighted_sum(const Rows<R> y, int features, const ChunkWeights weights, Index stride,
                 int queries, const float* share, int stretch_words, float* parts) {
  using Memory = SumMemory<R>;
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const Lane lane = this_lane();
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const Index query0 = static_cast<Index>(blockIdx.y) * kSumRows;
  const int known_queries = static_cast<int>(smaller(kSumRows, queries - query0));
  const Index first = static_cast<Index>(blockIdx.z) * stretch_words * 32;
  const int words = static_cast<int>(smaller(stretch_words, divide_up(y.count - first, 32)));
  const int count = list(shared, words, [&](int w) {
    unsigned any = 0;
    for (int q = 0; q < known_queries; ++q)
      any |= weights.live[(query0 + q) * (stride / 32) + first / 32 + w];
    return any;
  });

  float sum[2][kSumRows / 8][4] = {}, shares[kSumRows / 8];
  for (int n = 0; n < kSumRows / 8; ++n) {
    const int q = 8 * n + lane.g;
    shares[n] = share && q < known_queries ? share[query0 + q] : 1;
  }
  pipeline<Memory::kStages>(
      static_cast<int>(divide_up(count, kPanel)),
      [&](int p, int slot) {
        copy_listed(shared, slot, y, first, p * kPanel, count, feature0, features);
        for (int i = static_cast<int>(threadIdx.x); i < kSumRows * kPanel; i += kSumThreads) {
          const int q = i / kPanel, k = i % kPanel;
          const bool known = q < known_queries && p * kPanel + k < count;
          const Index j = known ? first + shared.listed[p * kPanel + k] : 0;
          const Index row = known ? query0 + q : 0;
          copy_async<4>(&shared.weights[slot][q * Memory::kWeightPitch + k],
                        weights.weight + row * stride + j, known ? 4 : 0);
        }
      },
      [&](int, int slot) {
        add_weighted<kPanel, kSumRows / 8, Memory::kPitch, Memory::kWeightPitch, 1>(
            sum, shared.rows[slot][0] + 32 * lane.warp, shared.weights[slot], shares, lane);
      });

#pragma unroll
  for (int n = 0; n < kSumRows / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int q = 8 * n + 2 * lane.t + odd;
      if (q >= known_queries) continue;
      float* out = parts + (static_cast<Index>(blockIdx.z) * queries + query0 + q) * features;
      for (int f = 0; f < 4; ++f) {
        const int feature = feature0 + 32 * lane.warp + 4 * lane.g + f;
        if (feature < features) out[feature] = kUnit<R> * sum[f / 2][n][f % 2 * 2 + odd];
      }
    }
}

// The sum of the parts of one query and feature, in float32 like the parts.
__device__ inline float sum_of_parts(const float* parts, int stretches, Index apart) {
  float sum = 0;
  for (int i = 0; i < stretches; ++i) sum += parts[i * apart];
  return sum;
}

// The running mean: carry times the mean of earlier chunks, plus the sums over the stretches of
// this chunk.
__global__ void __launch_bounds__(kMergeThreads)
    merge(float* mean, const float* parts, const float* carry, int features, int stretches,
          bool first_chunk) {
  const Index query = blockIdx.x;
  const int feature = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
  if (feature >= features) return;
  const Index at = query * features + feature;
  const float before = first_chunk ? 0 : carry[query] * mean[at];
  mean[at] = before + sum_of_parts(parts + at, stretches, static_cast<Index>(gridDim.x) * features);
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
    // The first half of the panels has G and p, the second half x and −F c.
    pipeline<Memory::kStages>(
        2 * panels,
        [&](int p, int slot) {
          const bool second = p >= panels;
          const int listed = (second ? p - panels : p) * kPanel;
          const Rows<float> rows = {second ? x.at : upstream.at,
                                    second ? x.stride : upstream.stride, x.count,
                                    second ? x.aligned : upstream.aligned};
          copy_listed(shared, slot, rows, first, listed, count, feature0, features);
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
                  of_y[n][odd] += weights[k * (kSumRows + 8) + 8 * n + 2 * lane.t + odd];
          float signs[kSumRows / 8];
          for (float& sign : signs) sign = p >= panels ? -1 : 1;
          add_weighted<kPanel, kSumRows / 8, Memory::kPitch, 1, kSumRows + 8>(
              sum, shared.rows[slot][0] + 32 * lane.warp, weights, signs, lane);
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
        float gradient = sum[f / 2][n][f % 2 * 2 + odd] +
                         of_y[n][odd] * static_cast<float>(load1(y.row(j) + feature));
        float& out = grad_y[j * features + feature];
        out = first_block ? gradient : out + gradient;
      }
    }
}

}  // namespace
}  // namespace pfgm
