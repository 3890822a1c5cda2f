// The gradient of the references: weighted sums over queries, on CUDA devices.
#pragma once
#include "cuda/lists.h"
#include "cuda/warp_sums.h"

namespace pfgm {
namespace {

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
    float sum[2][kSumRows / 8][4] = {}, y_weights[kSumRows / 8][2] = {};
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
    const ListedCopy<Memory> upstream_copy(shared, upstream, first, feature0, features);
    const ListedCopy<Memory> x_copy(shared, x, first, feature0, features);
    // The first half of the panels has G and p, the second half x and −F c.
    pipeline<Memory::kStages>(
        2 * panels,
        [&](int p, int slot) {
          const bool second = p >= panels;
          const int listed = (second ? p - panels : p) * kPanel;
          if (second)
            x_copy.panel(shared, slot, shared.listed + listed);
          else
            upstream_copy.panel(shared, slot, shared.listed + listed);
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
                  y_weights[n][odd] -= w, size[n][odd] += fabsf(w);
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
        float total = y_weights[n][odd], weights = size[n][odd], most = largest[n][odd];
        for (int apart = 4; apart < 32; apart *= 2) {
          total += __shfl_xor_sync(kAll, total, apart);
          weights += __shfl_xor_sync(kAll, weights, apart);
          most = fmaxf(most, __shfl_xor_sync(kAll, most, apart));
        }
        // Sums of numbers of both signs have errors relative to √(Σ w²), which is at most this.
        const float weight_size = fmaxf(fabsf(total), square_root(weights) * square_root(most));
        float result_squares = 0, sum_squares = 0;  // squares
        each_result(n, odd, [&](Index j, int feature, float& result) {
          const float v = load_float(y.row(j) + feature), scaled = weight_size * v;
          result += total * v;
          result_squares += result * result, sum_squares += scaled * scaled;
        });
        for (int apart = 4; apart < 32; apart *= 2) {
          result_squares += __shfl_xor_sync(kAll, result_squares, apart);
          sum_squares += __shfl_xor_sync(kAll, sum_squares, apart);
        }
        if (lane.g == 0)
          shared.squares[lane.warp][8 * n + 2 * lane.t + odd] = {result_squares, sum_squares};
      }
    __syncthreads();
    float result_squares = 0, sum_squares = 0;  // of the reference with the lane's number
    for (const auto& row : shared.squares)
      result_squares += row[lane.lane].x, sum_squares += row[lane.lane].y;
    unsigned again = __ballot_sync(
        kAll, reference0 + lane.lane < y.count && !(result_squares >= kEnough * sum_squares));
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
      const TwoFloats y_value = two_floats(y.row(j) + feature);
      float result = 0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const Index query = first + shared.listed[i], place = query * stride + j;
        const float apart = (x.row(query)[feature] - y_value.high) - y_value.low;
        result += coefficients.probability[place] * upstream.row(query)[feature] +
                  coefficients.scaled[place] * apart;
      }
      store(j, feature, result);
    }
  }
}

}  // namespace
}  // namespace pfgm
