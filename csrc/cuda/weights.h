// From squared distances to weights, and to the coefficients of the gradient: one block a query.
#pragma once
#include "cuda/distances.h"

namespace pfgm {
namespace {

// A weight below e^-kUnseen / M of their sum is taken for zero: M of them are less than the rounding
// of a float32 result. In a gradient p_j is weighed by (y_j − mean)²/s, which may be large: its p_j
// have kGradientDigits nats more.
constexpr double kUnseen = 16, kGradientDigits = 8;
constexpr int kQueryThreads = 256;

// What is known of each query after the chunks so far; nearest and total are results as well.
struct State {
  double* nearest;
  double* total;
  double* logsumexp;
};

// The weights of a chunk, and a bit for each that is not zero; rows are pairs.stride apart, those of
// `live` a 32nd of it.
struct Weights {
  float* weight;
  std::uint32_t* live;
};

__device__ inline void mark_live(const Weights& out, Index row, Index stride, int j, bool counts) {
  const unsigned bits = __ballot_sync(kAll, counts);
  if (j % 32 == 0 && j < stride) out.live[row * (stride / 32) + j / 32] = bits;
}

__device__ inline double logsumexp(const Law& law, double nearest, double total, double r) {
  if (law.gaussian) return (nearest == 0 ? 0 : -nearest / r / r / 2) + log(total);
  return -law.half * log(nearest + r * r) + log(total);
}

// One query's weights of the chunk, relative to the nearest reference so far and merged in float64
// with what earlier chunks gave. share = 1/total is what a weight is multiplied with to be a
// probability, carry what the running mean is.
__global__ void __launch_bounds__(kQueryThreads)
    weigh(const Law law, const double* radius, const Pairs pairs, int references, double floor,
          bool first_chunk, const State state, const Weights out, float* share, float* carry) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const double* squared = pairs.squared + query * pairs.stride;
  const double r = radius[query];
  double low = INFINITY, odd = 0;
  for (int j = thread; j < references; j += kQueryThreads) {
    const double d = squared[j];
    low = fmin(low, d);
    odd += isnan(d);
  }
  double nearest = over_block(low, scratch, Least());
  odd = over_block(odd, scratch, Sum());
  double kept = 0;
  if (!first_chunk) {
    const double before = state.nearest[query];
    nearest = before < nearest || isnan(before) ? before : nearest;
    kept = state.total[query] * exp(law.relative(before - nearest, nearest, r));
  }
  if (odd > 0) nearest = NAN;

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
// With upstream G = ∂L/∂mean and g = ∂L/∂logsumexp (spec section 10), in units F:
//     t_j = G·y_j − Σ_i p_i G·y_i + g
//     c_j = −p_j t_j s₀/s_j, F = (N + D)/s₀      D = ∞: c_j = −p_j t_j, F = 1/σ²
// s₀ is that of the nearest reference. Σ p_j t_j = g, so that the t_j nearly cancel in Σ c_j. With
// e_j = d_j² − d₀² and moment = Σ p_j t_j e_j/s_j (D = ∞: Σ p_j t_j e_j/σ²) nothing is lost:
//     C = moment − g                             D = ∞: C = −g
//     ∂L/∂x = F (C (x − mean) − Σ_j c_j (y_j − mean))
//     ∂L/∂r = r F C                              D = ∞: ∂L/∂σ = (g d₀²/σ² + moment)/σ
//     ∂L/∂y_j = Σ_b (p_bj G_b − F_b c_bj (x_b − y_j))

// Of each query, from chunk to chunk.
struct Moments {
  double* pulled;  // Σ p_j G·y_j
  double* mass;    // Σ p_j: 1 but for what distances differ from the forward pass, 0 at a limit
  double* moment;
  double* sum;    // Σ c_j
  double* whole;  // C
  double* unit;   // F, 0 at a limit
  double* grad_radius;
};

// p_j, zero where it counts for nothing.
__device__ inline double probability(const Law& law, double squared, double nearest, double total,
                                     double r, double floor) {
  if (law.at_limit(nearest, r)) return 0;
  const double p = law.weight(squared - nearest, nearest, r) / total;
  return p < floor ? 0 : p;
}

// Adds the chunk's Σ p_j G·y_j and Σ p_j of one query.
__global__ void __launch_bounds__(kQueryThreads)
    pull(const Law law, const double* radius, const double* nearest, const double* total,
         const Pairs pairs, int references, double floor, bool first_chunk, const Moments moments) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  double pulled = 0, mass = 0;
  for (int j = static_cast<int>(threadIdx.x); j < references; j += kQueryThreads) {
    const double p = probability(law, pairs.squared[row + j], nearest[query], total[query],
                                 radius[query], floor);
    if (p != 0) pulled += p * pairs.projected[row + j];  // else it may be anything
    mass += p;
  }
  pulled = over_block(pulled, scratch, Sum());
  mass = over_block(mass, scratch, Sum());
  if (threadIdx.x > 0) return;
  moments.pulled[query] = pulled + (first_chunk ? 0 : moments.pulled[query]);
  moments.mass[query] = mass + (first_chunk ? 0 : moments.mass[query]);
}

// c_j, p_j and F c_j of the chunk; the last two only where they are not null.
struct Coefficients {
  Weights c;
  float* probability;
  float* scaled;
};

__global__ void __launch_bounds__(kQueryThreads)
    find_coefficients(const Law law, const double* radius, const double* nearest,
                      const double* total, const double* grad_logsumexp, const Pairs pairs,
                      int references, double floor, bool first_chunk, const Moments moments,
                      const Coefficients out) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  const double r = radius[query], low = nearest[query], g = grad_logsumexp[query];
  const double mass = moments.mass[query] == 0 ? 1 : moments.mass[query];
  const double center = moments.pulled[query] / mass;
  const bool limit = law.at_limit(low, r);
  const double unit = law.gaussian ? 1 / r / r : 2 * law.half / (low + r * r);
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
  const double whole = law.gaussian ? -g : moment - g;
  moments.whole[query] = whole;
  moments.unit[query] = limit ? 0 : unit;
  moments.grad_radius[query] = limit          ? 0
                               : law.gaussian ? (g * (low / r / r) + moment) / r
                                              : r * unit * whole;
}

}  // namespace
}  // namespace pfgm
