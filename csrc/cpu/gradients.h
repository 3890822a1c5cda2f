// What the gradients of a query are made of.
//
// With upstream gradients G = ∂L/∂mean and g = ∂L/∂logsumexp:
//     t_j = G·(y_j − mean) + g,   c_j = −(N + D) p_j t_j / s_j   (D = ∞: −p_j t_j / σ²)
//     ∂L/∂x = Σ_j c_j (x − y_j),  ∂L/∂r = r Σ_j c_j              (D = ∞: Σ_j p_j t_j d_j² / σ³)
//     ∂L/∂y_j = Σ_b [p_bj G_b − c_bj (x_b − y_j)]
// Σ p_j t_j = g, so the t_j nearly cancel in Σ c_j. The following form avoids the cancellation. Let
// s and d² be those of the nearest reference, e_j = d_j² − d² and moment = Σ p_j t_j e_j / s_j (D =
// ∞: Σ p_j t_j e_j / σ²):
//     C = Σ c_j = −(N + D)(g − moment)/s                         (D = ∞: −g/σ²)
//     ∂L/∂x = C (x − mean) − Σ_j c_j (y_j − mean)
//     ∂L/∂r = r C                                                (D = ∞: (g d²/σ² + moment)/σ)
// p_j is computed relative to the nearest reference of the forward pass. From logsumexp it would be
// too inexact: for small σ, logsumexp is as large as d²/σ². In rows where the rounding of the mean
// would be visible, t_j does not use the rounded mean (cpu/ill_conditioned_rows.h).
#pragma once
#include "cpu/ill_conditioned_rows.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// Computes p_j from squared distances and counts those that are not zero. T is the type whose
// digits they need.
template <class T>
void probabilities(const WeightLaw& law, QueryState& state, double radius, const double* squared,
                   double* p, Index count) {
  state.nonzero = 0;
  if (law.at_limit(state.nearest, radius)) {
    std::memset(p, 0, padded_count(count) * sizeof(double));
    return;
  }
  const double fall = law.cutoff - std::log(state.total), inverse = 1 / state.total;
  weigh_for<T>(law, state.nearest, radius, fall, squared, p, count);
  for (Index j = 0; j < count; ++j) {
    p[j] *= inverse;
    state.nonzero += p[j] != 0;
  }
}

// Replaces t_j by c_j, after adding g to t_j. Returns the chunk's part of the moment. `bound`
// becomes a bound of Σ |c_j| whose inverse is finite. All arrays are padded. If `nonzero` is 0, t
// stays.
double coefficients(const WeightLaw& law, const QueryState& state, double radius, double g,
                    const double* squared, const double* p, double* t, Index count, double* bound) {
  *bound = 1e-300;
  if (state.nonzero == 0) return 0;
  if (law.is_constant(state.nearest, radius)) {
    std::memset(t, 0, padded_count(count) * sizeof(double));
    return 0;
  }
  Doubles moment = {}, size = {};
  for (Index j = 0; j < padded_count(count); j += kDoubles) {
    const Doubles probability = vector_at(p + j), s = vector_at(squared + j);
    // t is undefined where p = 0.
    const Doubles weighted = probability == 0.0 ? Doubles{} : probability * (vector_at(t + j) + g);
    const Doubles excess = s - state.nearest;
    const Doubles scaled = law.per_scale(weighted, s, radius);
    const Doubles c = -2.0 * law.exponent * scaled;
    moment += scaled * excess;
    vector_at(t + j) = c;
    size += c > 0.0 ? c : -c;
  }
  *bound += sum_of(size);
  return sum_of(moment);
}

Status check_singular(const Problem& problem, const WeightLaw& law, const Backward& io) {
  for (Index b = 0; b < problem.queries; ++b)
    if (io.grad_logsumexp[b] != 0 && law.is_constant(io.nearest[b], problem.radius[b]))
      return {Failure::singular, b};
  return {};
}

// A gradient multiplies p_j by (y_j − mean)²/s, which may be large. So p_j counts down to
// e^-kGradientCutoff of the smallest weight that counts for a mean.
constexpr double kGradientCutoff = 8;

template <class T>
bool query_is_ill_conditioned(const Problem& problem, const Backward& io, const WeightLaw& law,
                              Index query) {
  const double radius = problem.radius[query], nearest = io.nearest[query];
  const T* mean = static_cast<const T*>(io.mean) + query * problem.features;
  const T* grad = static_cast<const T*>(io.grad_mean) + query * problem.features;
  return !law.is_constant(nearest, radius) &&
         (leaves_range<T>(problem, law, nearest, radius, grad) ||
          is_ill_conditioned<T>(problem, law, nearest, io.total[query], radius, mean));
}

// Adds Σ_j p_bj and Σ_j p_bj G·(y_j − mean) to pulls[2b] and pulls[2b + 1], for the ill-conditioned
// rows b of a block. `first` is the first query of the block.
template <class T>
Status add_pulls(const Problem& problem, const Backward& io, const WeightLaw& law, Index first,
                 const Index* ill_conditioned, Index count, double* pulls) {
  const Index features = problem.features, block = smaller(count, kIllConditionedBlock);
  Buffer<T> x(block * features);
  Buffer<double> radius(block), p(block * kStride);
  Buffer<QueryState> states(block);
  Problem some = problem;
  some.queries = block;
  some.x = x.data();
  some.x_stride = features;
  some.radius = radius.data();
  Distances<T> distances(some, law, block);
  typename Distances<T>::Lists lists(block);
  if (!x || !radius || !p || !states || !distances || !lists) return {Failure::memory, 0};
  const Index chunk = chunk_size(problem);

  for (Index at = 0; at < count; at += block, ill_conditioned += block) {
    const Index n = smaller(block, count - at);
    for (Index i = 0; i < n; ++i) {
      const Index query = first + ill_conditioned[i];
      std::memcpy(x.at(i * features), static_cast<const T*>(problem.x) + query * problem.x_stride,
                  features * sizeof(T));
      radius[i] = problem.radius[query];
      states[i] = state_of(io, query);
    }
    distances.set_queries(0, n);
    for (Index begin = 0; begin < problem.references; begin += chunk) {
      distances.set_chunk(begin, smaller(chunk, problem.references - begin), states.data(), lists);
      parallel(n, problem.threads, [&](Index i, int) {
        // The main pass reports a row that is not finite.
        if (!is_distance(distances.refine(i, states[i]))) return;
        const Index from = (first + ill_conditioned[i]) * features;
        probabilities<double>(law, states[i], radius[i], distances.row(i), p.at(i * kStride),
                              distances.count());
        project_row(distances, static_cast<const T*>(io.grad_mean) + from,
                    static_cast<const T*>(io.mean) + from, features, p.at(i * kStride),
                    static_cast<double*>(nullptr), pulls + 2 * ill_conditioned[i]);
      });
    }
  }
  return {};
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
