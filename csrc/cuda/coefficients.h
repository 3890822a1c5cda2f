// From squared distances to the coefficients of the gradient, on CUDA devices.
//
// With upstream gradients G = ∂L/∂mean and g = ∂L/∂logsumexp, and coefficients in units of F:
//     t_j = G·y_j − Σ_i p_i G·y_i + g
//     c_j = −p_j t_j s₀/s_j, F = (N + D)/s₀      D = ∞: c_j = −p_j t_j, F = 1/σ²
// s₀ and d₀² are those of the nearest reference. Σ p_j t_j = g, so the t_j nearly cancel in Σ c_j.
// The following form avoids the cancellation. With e_j = d_j² − d₀² and moment = Σ p_j t_j e_j/s_j
// (D = ∞: Σ p_j t_j e_j/σ²):
//     C = moment − g                             D = ∞: C = −g
//     ∂L/∂x = F (Σ_j c_j (mean − y_j) + C (x − mean))
//     ∂L/∂r = r F C                              D = ∞: ∂L/∂σ = (g d₀²/σ² + moment)/σ
//     ∂L/∂y_j = Σ_b (p_bj G_b − F_b c_bj (x_b − y_j))
#pragma once
#include "cuda/intrinsics.h"
#include "cuda/threads.h"
#include "cuda/weight_law.h"

namespace pfgm {
namespace {

constexpr int kMomentThreads = 32;  // of finish_moments: small blocks spread its float64

// What the probabilities of a query need.
struct RowProbabilities {
  Fall fall;
  float per_total;  // 1 over the sum of weights, 0 at a limit
  float floor;      // a probability below it becomes zero

  __device__ RowProbabilities(const WeightLaw& law, double nearest, double total, double r,
                              double floor)
      : fall(nearest, law.rate(nearest, r)),
        per_total(law.at_limit(nearest, r) ? 0 : reciprocal(static_cast<float>(total))),
        floor(static_cast<float>(floor)) {}

  // p_j of a reference; `linear` is `fall` of its squared distance.
  __device__ float probability(const WeightLaw& law, float linear) const {
    const float p = law.weight(linear) * per_total;
    return p < floor ? 0 : p;
  }
};

struct PullMemory {
  RowProbabilities row;
  TwoFloats sums[2 * kQueryThreads / 32];
};

// Adds Σ p_j G·y_j and Σ p_j of one query over a piece of the chunk.
__global__ void __launch_bounds__(kQueryThreads)
    pull(const WeightLaw law, const double* radius, const double* nearest, const double* total,
         const Pairs pairs, int references, double floor, bool first_chunk, const Moments moments) {
  PullMemory& shared = *reinterpret_cast<PullMemory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  const Index query = blockIdx.x, at = query * pairs.stride + thread;
  const int first = piece * moments.size;
  if (thread < 32) {  // one warp does the arithmetic in float64 for all
    const RowProbabilities row(law, nearest[query], total[query], radius[query], floor);
    if (thread == 0) shared.row = row;
  }
  __syncthreads();
  const RowProbabilities row = shared.row;
  const double* const distances = pairs.squared + at;
  const float* const products = pairs.projected + at;
  TwoFloats projection = {}, mass = {};
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < references; start += kPiece) {
    const int left = references - start - thread;
    double squared[kThreadReferences];
    float projected[kThreadReferences];
#pragma unroll
    for (int i = 0; i < kThreadReferences; ++i) {
      const int step = i * kQueryThreads;
      squared[i] = step < left ? distances[start + step] : 0;
      projected[i] = step < left ? products[start + step] : 0;
    }
#pragma unroll
    for (int i = 0; i < kThreadReferences; ++i) {
      const bool exists = i * kQueryThreads < left;
      const float p = exists ? row.probability(law, row.fall(squared[i])) : 0;
      projection.add_product(p, p != 0 ? projected[i] : 0);  // G·y_j is undefined where p = 0
      mass.add(p);
    }
  }
  TwoFloats sums[] = {projection, mass};
  sum_over_block<kQueryThreads>(sums, shared.sums);
  if (threadIdx.x > 0) return;
  moments.add(moments.projection, query, piece, sums[0].sum(), first_chunk);
  moments.add(moments.mass, query, piece, sums[1].sum(), first_chunk);
}

// A number that may be out of the range of float32, as a product of two that are not.
struct TwoFactors {
  float first, second;

  __device__ explicit TwoFactors(double v) {
    const int power = (static_cast<int>(bits_of(v) >> 52 & 2047) - 1023) / 2;
    const int half = power < -126 ? -126 : power > 126 ? 126 : power;
    first = static_cast<float>(v * double_of(static_cast<std::int64_t>(1023 - half) << 52));
    second = float_of(static_cast<std::uint32_t>(127 + half) << 23);
  }
  __device__ float times(float v) const { return v * first * second; }
};

// What the coefficients of a query need besides its probabilities.
struct RowCoefficients {
  RowProbabilities probabilities;
  float per_mass;
  TwoFloats center;  // Σ p_i G·y_i − g
  TwoFactors unit;   // F

  __device__ RowCoefficients(const WeightLaw& law, const RowProbabilities& probabilities,
                             const Moments& moments, Index query, double nearest, double r,
                             double g)
      : probabilities(probabilities), unit(law.unit(nearest, r)) {
    const double total = moments.over_pieces(moments.mass, query), mass = total == 0 ? 1 : total;
    const double at = moments.over_pieces(moments.projection, query) / mass - g;
    per_mass = reciprocal(static_cast<float>(mass));
    center.high = static_cast<float>(at);
    center.low = static_cast<float>(at - center.high);
  }
};

struct alignas(16) CoefficientMemory {
  RowCoefficients row;
  TwoFloats sums[3 * kQueryThreads / 32];
  float largest[kQueryThreads / 32];
  int live[kQueryThreads / 32];
};

// Computes the coefficients of one query over a piece of the chunk, and their sums. With
// REFERENCES, also stores what the gradient of the references needs.
template <bool REFERENCES>
__global__ void __launch_bounds__(kQueryThreads, 2)
    find_coefficients(const WeightLaw law, const double* radius, const double* nearest,
                      const double* total, const double* grad_logsumexp, const Pairs pairs,
                      int references, double floor, bool first_chunk, const Moments moments,
                      const Coefficients out) {
  CoefficientMemory& shared = *reinterpret_cast<CoefficientMemory*>(shared_memory());
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  const int first = piece * moments.size, stride = static_cast<int>(pairs.stride);
  const Index query = blockIdx.x, at = query * stride + thread;
  if (lane.warp == 0) {  // does the arithmetic in float64 for all
    const double low = nearest[query], r = radius[query];
    const RowCoefficients row(law, RowProbabilities(law, low, total[query], r, floor), moments,
                              query, low, r, grad_logsumexp[query]);
    if (lane.lane == 0) shared.row = row;
  }
  __syncthreads();
  const RowCoefficients row = shared.row;
  const double* const distances = pairs.squared + at;
  const float* const products = pairs.projected + at;
  std::uint32_t* const words = out.c.live + query * (stride / 32) + lane.warp;
  TwoFloats moment = {}, sum = {};
  float size = 0, largest = 0;  // of c_j
  int live = 0;
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < stride; start += kPiece) {
    const int left = references - start - thread, columns = stride - start - thread;
    double squared[kThreadReferences];
    float projected[kThreadReferences];
#pragma unroll
    for (int i = 0; i < kThreadReferences; ++i) {
      const int step = i * kQueryThreads;
      squared[i] = step < left ? distances[start + step] : 0;
      projected[i] = step < left ? products[start + step] : 0;
    }
#pragma unroll
    for (int i = 0; i < kThreadReferences; ++i) {
      const int step = i * kQueryThreads;
      const float linear = row.probabilities.fall(squared[i]);
      // per_mass may be NaN.
      const float p = step < left ? row.probabilities.probability(law, linear) * row.per_mass : 0;
      const float pt = p * ((projected[i] - row.center.high) - row.center.low);
      const Ratios ratios = law.ratios(linear);
      const float c =
          p == 0 ? 0 : -rounded_product(pt, ratios.nearest);  // G·y_j is undefined where p = 0
      moment.add(p == 0 ? 0 : pt * ratios.excess);
      sum.add(c);
      size += fabsf(c), largest = fmaxf(largest, fabsf(c));
      if (step < columns) {
        out.c.weight[at + start + step] = c;
        if (REFERENCES) {
          out.probability[at + start + step] = p;
          out.scaled[at + start + step] = c == 0 ? 0 : row.unit.times(-c);
        }
      }
      live += mark_live(words + (start + step) / 32, lane.lane == 0 && step < columns, p != 0);
    }
  }
  if (lane.lane == 0) shared.live[lane.warp] = live;
  largest = over_block<kQueryThreads>(largest, shared.largest, Most());
  TwoFloats sums[] = {moment, sum, {size, 0}};
  sum_over_block<kQueryThreads>(sums, shared.sums);
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kQueryThreads / 32; ++w) live += shared.live[w];
  out.live_count[query * static_cast<int>(gridDim.y) + piece] = live;
  moments.add(moments.moment, query, piece, sums[0].sum(), first_chunk);
  moments.add(moments.chunk_sum, query, piece, sums[1].sum(), true);
  moments.squares[query * moments.pieces + piece] = sums[2].sum() * largest;
}

// After the last chunk: F, C and ∂L/∂r, from the sums over all references.
__global__ void __launch_bounds__(kMomentThreads)
    finish_moments(const WeightLaw law, const double* radius, const double* nearest,
                   const double* grad_logsumexp, int queries, const Moments moments) {
  const int query = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (query >= queries) return;
  const double r = radius[query], low = nearest[query], g = grad_logsumexp[query];
  const double moment = moments.over_pieces(moments.moment, query) / law.exponent;
  const Totals totals = law.totals(low, r, g, moment);
  moments.unit[query] = totals.unit, moments.exact_sum[query] = totals.sum;
  moments.grad_radius[query] = totals.grad_radius;
}

}  // namespace
}  // namespace pfgm
