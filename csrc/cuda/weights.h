// From squared distances to weights and to the coefficients of the gradient, with one block of
// threads per query. How a distance becomes a weight is in cuda/weight_law.h.
#pragma once
#include "cuda/distances.h"

namespace pfgm {
namespace {

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of a float32 result. A gradient multiplies p_j by (y_j − mean)²/s,
// which may be large; there the cutoff is kGradientCutoff nats lower.
constexpr double kWeightCutoff = 16, kGradientCutoff = 8;
constexpr int kQueryThreads = 256;

// Merge state of each query. nearest and total are results too.
struct QueryStates {
  double* nearest;
  double* total;
  double* logsumexp;
};

// The weights of a chunk, and a bit for each that is not zero. Rows of `weight` are pairs.stride
// apart, rows of `live` a 32nd of that.
struct ChunkWeights {
  float* weight;
  std::uint32_t* live;
};

__device__ inline void mark_live(const ChunkWeights& out, Index row, Index stride, int j,
                                 bool counts) {
  const unsigned bits = __ballot_sync(kAll, counts);
  if (j % 32 == 0 && j < stride) out.live[row * (stride / 32) + j / 32] = bits;
}

__device__ inline double logsumexp(const WeightLaw& law, double nearest, double total, double r) {
  if (law.gaussian) return (nearest == 0 ? 0 : -nearest / r / r / 2) + log(total);
  return -law.exponent * log(nearest + r * r) + log(total);
}

// Weights of one query over the chunk, relative to the nearest reference so far, and merged in
// float64 with earlier chunks. share = 1/total turns a weight into a probability; carry is the
// factor of the running mean.
__global__ void __launch_bounds__(kQueryThreads)
    weigh(const WeightLaw law, const double* radius, const Pairs pairs, int references,
          double floor, bool first_chunk, const QueryStates state, const ChunkWeights out,
          float* share, float* carry) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const double* squared = pairs.squared + query * pairs.stride;
  const double r = radius[query];
  double low = INFINITY, nans = 0;
  for (int j = thread; j < references; j += kQueryThreads) {
    const double d = squared[j];
    low = fmin(low, d);
    nans += isnan(d);
  }
  double nearest = over_block(low, scratch, Least());
  nans = over_block(nans, scratch, Sum());
  double kept = 0;
  if (!first_chunk) {
    const double before = state.nearest[query];
    nearest = before < nearest || isnan(before) ? before : nearest;
    kept = state.total[query] * exp(law.relative_score(before - nearest, nearest, r));
  }
  if (nans > 0) nearest = NAN;

  const double smallest = floor * fmax(kept, 1.0);
  double sum = 0;
  for (int start = 0; start < pairs.stride; start += kQueryThreads) {
    const int j = start + thread;
    float w = 0;
    if (j < references) w = law.weight(squared[j] - nearest, nearest, r);
    sum += w;
    if (w < smallest) w = 0;
    if (j < pairs.stride) out.weight[query * pairs.stride + j] = w;
    mark_live(out, query, pairs.stride, j, w != 0);
  }
  const double total = kept + over_block(sum, scratch, Sum());
  if (thread > 0) return;
  state.nearest[query] = nearest;
  state.total[query] = total;
  state.logsumexp[query] = logsumexp(law, nearest, total, r);
  share[query] = static_cast<float>(1 / total);
  carry[query] = static_cast<float>(kept / total);
}

// ---- the gradient ----------------------------------------------------------------------------
//
// With upstream gradients G = ∂L/∂mean and g = ∂L/∂logsumexp, and coefficients in units of F:
//     t_j = G·y_j − Σ_i p_i G·y_i + g
//     c_j = −p_j t_j s₀/s_j, F = (N + D)/s₀      D = ∞: c_j = −p_j t_j, F = 1/σ²
// s₀ and d₀² are those of the nearest reference. Σ p_j t_j = g, so the t_j nearly cancel in Σ c_j.
// The following form avoids the cancellation. With e_j = d_j² − d₀² and moment = Σ p_j t_j e_j/s_j
// (D = ∞: Σ p_j t_j e_j/σ²):
//     C = moment − g                             D = ∞: C = −g
//     ∂L/∂x = F (C (x − mean) − Σ_j c_j (y_j − mean))
//     ∂L/∂r = r F C                              D = ∞: ∂L/∂σ = (g d₀²/σ² + moment)/σ
//     ∂L/∂y_j = Σ_b (p_bj G_b − F_b c_bj (x_b − y_j))

// Sums of each query over the chunks so far.
struct Moments {
  double* projection;  // Σ p_j G·y_j
  // Σ p_j: close to 1, as distances differ a little from the forward pass; 0 at a limit.
  double* mass;
  double* moment;
  double* sum;        // Σ c_j of the rounded c_j
  double* exact_sum;  // C, without rounding
  double* unit;       // F, 0 at a limit
  double* grad_radius;
};

// p_j; zero below `floor`.
__device__ inline double probability(const WeightLaw& law, double squared, double nearest,
                                     double total, double r, double floor) {
  if (law.at_limit(nearest, r)) return 0;
  const double p = law.weight(squared - nearest, nearest, r) / total;
  return p < floor ? 0 : p;
}

// Adds the chunk's Σ p_j G·y_j and Σ p_j of one query.
__global__ void __launch_bounds__(kQueryThreads)
    pull(const WeightLaw law, const double* radius, const double* nearest, const double* total,
         const Pairs pairs, int references, double floor, bool first_chunk, const Moments moments) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  double projection = 0, mass = 0;
  for (int j = static_cast<int>(threadIdx.x); j < references; j += kQueryThreads) {
    const double p = probability(law, pairs.squared[row + j], nearest[query], total[query],
                                 radius[query], floor);
    if (p != 0) projection += p * pairs.projected[row + j];  // undefined where p = 0
    mass += p;
  }
  projection = over_block(projection, scratch, Sum());
  mass = over_block(mass, scratch, Sum());
  if (threadIdx.x > 0) return;
  moments.projection[query] = projection + (first_chunk ? 0 : moments.projection[query]);
  moments.mass[query] = mass + (first_chunk ? 0 : moments.mass[query]);
}

// c_j, p_j and F c_j of the chunk. p_j and F c_j may be null.
struct Coefficients {
  ChunkWeights c;
  float* probability;
  float* scaled;
};

__global__ void __launch_bounds__(kQueryThreads)
    find_coefficients(const WeightLaw law, const double* radius, const double* nearest,
                      const double* total, const double* grad_logsumexp, const Pairs pairs,
                      int references, double floor, bool first_chunk, const Moments moments,
                      const Coefficients out) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  const double r = radius[query], low = nearest[query], g = grad_logsumexp[query];
  const double mass = moments.mass[query] == 0 ? 1 : moments.mass[query];
  const double center = moments.projection[query] / mass;
  const bool limit = law.at_limit(low, r);
  const double unit = law.gaussian ? 1 / r / r : 2 * law.exponent / (low + r * r);
  double moment = 0, sum = 0;
  for (int start = 0; start < pairs.stride; start += kQueryThreads) {
    const int j = start + static_cast<int>(threadIdx.x);
    double p = 0, c = 0;
    if (j < references)
      p = probability(law, pairs.squared[row + j], low, total[query], r, floor) / mass;
    if (p != 0) {
      const double d = pairs.squared[row + j];
      const double pt = p * (pairs.projected[row + j] - center + g);
      if (law.gaussian) {
        c = -pt;
        moment += pt * ((d - low) / r / r);
      } else {
        const double s = d + r * r;
        c = -pt * ((low + r * r) / s);
        moment += pt * ((d - low) / s);
      }
    }
    const float rounded = static_cast<float>(c);
    sum += rounded;
    if (j < pairs.stride) {
      out.c.weight[row + j] = rounded;
      if (out.probability) {
        out.probability[row + j] = static_cast<float>(p);
        out.scaled[row + j] = static_cast<float>(c == 0 ? 0 : c * unit);
      }
    }
    mark_live(out.c, query, pairs.stride, j, p != 0);
  }
  moment = over_block(moment, scratch, Sum());
  sum = over_block(sum, scratch, Sum());
  if (threadIdx.x > 0) return;
  if (!first_chunk) moment += moments.moment[query], sum += moments.sum[query];
  moments.moment[query] = moment;
  moments.sum[query] = sum;
  const double exact_sum = law.gaussian ? -g : moment - g;
  moments.exact_sum[query] = exact_sum;
  moments.unit[query] = limit ? 0 : unit;
  moments.grad_radius[query] = limit          ? 0
                               : law.gaussian ? (g * (low / r / r) + moment) / r
                                              : r * unit * exact_sum;
}

}  // namespace
}  // namespace pfgm
