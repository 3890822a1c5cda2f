// The gradient of the references: weighted sums over queries, on CUDA devices.
#pragma once
#include "cuda/lists.h"
#include "cuda/merging.h"
#include "cuda/warp_sums.h"

namespace pfgm {
namespace {

// Shared memory of reference_gradient. Here references are the rows of the result, and queries are
// listed.
struct GradientMemory : WarpSums<float, false>::Memory {
  float2 totals[kSumRows];  // −Σ_b w_bj, and what its errors are relative to
};
static_assert(sizeof(GradientMemory) <= 49 << 10, "every card holds two blocks");

// The rows of queries, and those of p_bj and w_bj = −F c_bj for the block's references. `count`
// queries are listed.
struct GradientTerms {
  Rows<float> upstream, x;
  const float *p, *w;
  Index stride;
  int count;
};

// Computes Σ_b p_bj G_b + w_bj x_b, which overwrites shared.rows[0], and the totals.
__device__ inline void sum_terms(GradientMemory& shared, const GradientTerms& terms, int feature0,
                                 int features) {
  static_assert(kSumRows == 8 * (kSumThreads / 32) && kSumRows <= kPanel);
  const Lane lane = this_lane();
  const int panels = divide_up32(terms.count, kPanel);
  const ListedCopy<GradientMemory> upstream(shared, terms.upstream, feature0, features);
  const ListedCopy<GradientMemory> x(shared, terms.x, feature0, features);
  float sum[2][kSumRows / 8][4] = {}, largest = 0;
  float2 total = {}, size = {};
  // The first half of the panels has G and p, the second half x and w.
  pipeline<GradientMemory::kStages>(
      2 * panels,
      [&](int p, int slot) {
        const bool second = p >= panels;
        const int first = (second ? p - panels : p) * kPanel;
        const std::uint16_t* const listed = shared.listed + first;
        if (second)
          x.panel(shared, slot, listed);
        else
          upstream.panel(shared, slot, listed);
        const float* const weights = (second ? terms.w : terms.p) + 8 * lane.warp + lane.g;
#pragma unroll
        for (int i = 0; i < kPanel / 4; ++i) {  // a warp has eight references
          const int k = 4 * i + lane.t;
          copy_async<4>(&shared.weights[slot][weight_offset(lane.warp, i / 2, lane.lane) + i % 2],
                        weights + listed[k] * terms.stride, first + k < terms.count ? 4 : 0);
        }
      },
      [&](int p, int slot) {
        const float* const weights = shared.weights[slot];
        if (p >= panels)
#pragma unroll
          for (int s = 0; s < kPanel / 8; ++s) {
            const float* const pair = weights + weight_offset(lane.warp, s, lane.lane);
            const float2 w = *reinterpret_cast<const float2*>(pair);
            const float2 absolute = {fabsf(w.x), fabsf(w.y)};
            total.x += w.x, total.y += w.y, size.x += absolute.x, size.y += absolute.y;
            largest = fmaxf(largest, fmaxf(absolute.x, absolute.y));
          }
        add_weighted<kSumRows / 8, kSumPitch<float>>(sum, shared.rows[slot][0] + 32 * lane.warp,
                                                     weights, lane);
      });
#pragma unroll
  for (int n = 0; n < kSumRows / 8; ++n)
    for (int odd = 0; odd < 2; ++odd)
      store_values(&shared.rows[0][8 * n + 2 * lane.t + odd][32 * lane.warp + 4 * lane.g],
                   {sum[0][n][odd], sum[0][n][2 + odd], sum[1][n][odd], sum[1][n][2 + odd]});
  for (int apart = 1; apart < 4; apart *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, apart));
  const float sum_w = over_quad(total.x) + over_quad(total.y);
  // Sums of numbers of both signs have errors relative to √(Σ w²), which is at most this.
  const float root = square_root(over_quad(size.x) + over_quad(size.y)) * square_root(largest);
  if (lane.t == 0) shared.totals[8 * lane.warp + lane.g] = {-sum_w, fmaxf(fabsf(sum_w), root)};
  __syncthreads();
}

// Adds Σ_b p_bj G_b + w_bj (x_b − y_j) of the block's reference number `row` to `out`, or stores it
// there if it `begins`. A warp does this; a lane has every 32nd feature. Products with x_b and y_j
// lose digits where these are close: then the warp sums differences.
template <class R>
__device__ inline void finish_terms(const GradientMemory& shared, const GradientTerms& terms,
                                    int row, const R* y, int feature0, int features, bool begins,
                                    float* out) {
  constexpr int kHeld = kSumFeatures / 32;
  const int lane = this_lane().lane, feature = feature0 + lane;
  const float2 total = shared.totals[row];
  TwoFloats point[kHeld] = {};
  float value[kHeld], squares = 0, sum_squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (feature + 32 * i < features) point[i] = two_floats(y + feature + 32 * i);
    const float scaled = total.y * point[i].high;
    value[i] = shared.rows[0][row][lane + 32 * i] + total.x * point[i].high;
    squares += value[i] * value[i], sum_squares += scaled * scaled;
  }
  if (!(over_warp(squares, Sum()) >= kEnough * over_warp(sum_squares, Sum()))) {
    for (float& v : value) v = 0;
#pragma unroll 2
    for (int k = 0; k < terms.count; ++k) {
      const Index query = shared.listed[k], pair = query * terms.stride + row;
      const float p = terms.p[pair], w = terms.w[pair];
      const float* const g = terms.upstream.row(query) + feature;
      const float* const x = terms.x.row(query) + feature;
      for (int i = 0; i < kHeld; ++i)
        if (feature + 32 * i < features)
          value[i] += p * g[32 * i] + w * ((x[32 * i] - point[i].high) - point[i].low);
    }
  }
  for (int i = 0; i < kHeld; ++i)
    if (feature + 32 * i < features) {
      float& at = out[feature + 32 * i];
      at = begins ? value[i] : at + value[i];
    }
}

// Adds ∂L/∂y of 32 references over a block of queries to grad_y.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    reference_gradient(const Rows<float> upstream, const Rows<float> x, const Rows<R> y,
                       int features, const Coefficients coefficients, Index stride,
                       bool first_block, float* grad_y) {
  auto& shared = *reinterpret_cast<GradientMemory*>(shared_memory());
  constexpr int kListed = kPanel * kPartPanels;
  const int feature0 = static_cast<int>(blockIdx.x) * kSumFeatures;
  const int reference0 = static_cast<int>(blockIdx.y) * kSumRows;
#pragma unroll 1
  for (int first = 0; first < x.count; first += kListed) {
    const int left = static_cast<int>(smaller(kListed, x.count - first));
    const int words = divide_up32(left, 32);
    const Index pair0 = first * stride + reference0;
    const int count = list<kSumThreads>(shared.listed, shared.scratch, words, [&](int w) {
      unsigned any = 0;
      for (int b = 0; b < 32 && 32 * w + b < left; ++b) {
        const Index word = (pair0 + (32 * w + b) * stride) / 32;
        any |= static_cast<unsigned>(coefficients.c.live[word] != 0) << b;
      }
      return any;
    });
    const float *const p = coefficients.probability + pair0, *const w = coefficients.scaled + pair0;
    const GradientTerms terms = {upstream.from(first), x.from(first), p, w, stride, count};
    sum_terms(shared, terms, feature0, features);
#pragma unroll 1
    for (int row = this_lane().warp; row < kSumRows; row += kSumThreads / 32) {
      const Index j = reference0 + row;
      if (j < y.count)
        finish_terms(shared, terms, row, y.row(j), feature0, features, first_block && first == 0,
                     grad_y + j * features);
    }
  }
}

}  // namespace
}  // namespace pfgm
