// Gradients in the queries and their radii with few features (cpu/dense_rows.h, cpu/gradients.h).
#pragma once
#include "cpu/dense_mean.h"
#include "cpu/gradients.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr int kGradientSumRows = 2;  // rows of a register tile that also holds their means

// Whether float32 holds g and its products with weights.
inline bool fits_float(double g) {
  const double size = std::fabs(g);
  return size == 0 || (size > 1e-20 && size < 1e30);
}

// Computes the listed p_j and G·(y_j − mean). Adds Σ p_j and Σ p_j G·(y_j − mean) to sums.
inline void list_probabilities(const DenseRows& rows, const WeightLaw& law, QueryState& state,
                               double radius, const float* grad, const float* mean, Index features,
                               List& list, double* sums) {
  weigh(law, state.nearest, radius, visible_fall(law, state), list.squared, list.weight,
        list.length);
  const double inverse = 1 / state.total;
  state.nonzero = 0;
  for (Index i = 0; i < list.length; ++i) {
    if (list.weight[i] == 0) continue;
    list.weight[i] *= inverse;
    list.term[i] = project(grad, mean, rows.reference(list.index[i]), features);
    sums[0] += list.weight[i];
    sums[1] += list.weight[i] * list.term[i];
    ++state.nonzero;
  }
}

// Replaces the listed weights by p_j and the terms by c_j. Returns the list's part of the moment.
// With subtract_average, t_j is relative to its average: for ill-conditioned rows, whose references
// are all listed.
inline double list_coefficients(const DenseRows& rows, const WeightLaw& law, QueryState& state,
                                double radius, double g, const float* grad, const float* mean,
                                Index features, bool subtract_average, List& list) {
  double sums[2] = {}, bound;
  list_probabilities(rows, law, state, radius, grad, mean, features, list, sums);
  if (subtract_average) g -= average(sums);
  return coefficients(law, state, radius, g, list.squared, list.weight, list.term, list.length,
                      &bound);
}

// Replaces the distances of a row by c_j / scale. `terms` are G·(y_j − mean). Returns the row's
// part of the moment. The scale keeps sums over large references from overflowing.
inline double row_coefficients(const FloatWeights& weights, double total, double g,
                               const float* terms, float* row, const float* low, Index padded,
                               double* scale) {
  const float inverse = static_cast<float>(1 / total), upstream = static_cast<float>(g);
  Doubles moment = {};
  Floats size = Floats{} + std::numeric_limits<float>::min();
  weights.weigh(
      row, low, padded,
      [&](Index j, const Floats& u, const Floats& w) {
        const Floats weighted =
            w == 0.0f ? Floats{} : w * inverse * (vector_at(terms + j) + upstream);
        const Floats c = weights.law().times_slope(weighted, u);
        add_lanes(c * u, moment);
        const Floats magnitude = c > 0.0f ? c : -c;
        size = magnitude > size ? magnitude : size;
        vector_at(row + j) = c;
      },
      [&](Index j) { vector_at(row + j) = Floats{}; });
  float largest = size[0];
  for (Index lane = 1; lane < kFloats; ++lane)
    largest = size[lane] > largest ? size[lane] : largest;
  for (Index j = 0; j < padded; j += kFloats) vector_at(row + j) *= 1 / largest;
  *scale = -2 * weights.slope() * static_cast<double>(largest);
  return sum_of(moment);
}

// Computes terms[i][j] = G·(y_j − mean) for up to kTileQueries rows of a chunk.
template <class GradOf, class MeanOf>
void project_rows(const DenseRows& rows, const Index* row, Index number, Index features,
                  const GradOf& grad_of, const MeanOf& mean_of, float* terms) {
  constexpr Index tile = Simd<float>::tile;
  const Index panel = dense_panel(features);
  for (Index j = 0; j < rows.padded(); j += tile)
    for (Index k = 0; k < features; k += panel) {
      const float *grad[kTileQueries], *mean[kTileQueries];
      for (Index q = 0; q < number; ++q) {
        grad[q] = grad_of(row[q]) + k;
        mean[q] = mean_of(row[q]) + k;
      }
      sum_panel<Projection, false, kTileQueries>(
          number, mean, grad, rows.packed(j) + k * tile, smaller(panel, features - k),
          [&](int q, const Floats(&part)[kTileVectors]) {
            for (int v = 0; v < kTileVectors; ++v) {
              Floats& term = vector_at(terms + q * kFloatStride + j + v * kFloats);
              term = k == 0 ? part[v] : term + part[v];
            }
          });
    }
}

// Adds Σ_j p_bj and Σ_j p_bj G·(y_j − mean) to pulls[2b] and pulls[2b + 1], for the ill-conditioned
// rows b of a block. `first` is the first query of the block.
inline Status add_pulls_of_rows(const Problem& problem, const WeightLaw& law, const Backward& io,
                                Index first, const Index* ill_conditioned, Index count,
                                float* workspace, List& list, double* pulls) {
  const Index features = problem.features;
  Buffer<float> x(count * features);
  Buffer<double> radius(count);
  if (!x || !radius) return {Failure::memory, 0};
  for (Index i = 0; i < count; ++i) {
    const Index query = first + ill_conditioned[i];
    std::memcpy(x.at(i * features), static_cast<const float*>(problem.x) + query * problem.x_stride,
                features * sizeof(float));
    radius[i] = problem.radius[query];
  }
  Problem some = problem;
  some.queries = count;
  some.x = x.data();
  some.x_stride = features;
  some.radius = radius.data();
  DenseRows rows(some, law, 0, count, workspace);
  by_chunks(some, [&](Index begin, Index references) {
    rows.set_chunk(begin, references);
    for (Index i = 0; i < count; ++i) {
      const Index query = first + ill_conditioned[i];
      QueryState state = state_of(io, query);
      rows.split(i, state, false, list);
      // The main pass reports a row that is not finite.
      if (list.length == 0 || !is_distance(list.nearest)) continue;
      list_probabilities(rows, law, state, radius[i],
                         static_cast<const float*>(io.grad_mean) + query * features,
                         static_cast<const float*>(io.mean) + query * features, features, list,
                         pulls + 2 * ill_conditioned[i]);
    }
  });
  return {};
}

// The gradients of a block of queries. Fails with the first query that has no nearest distance.
inline Status gradients_of_block(const Problem& problem, const WeightLaw& law, const Backward& io,
                                 Index first, Index count, DenseWork& work, int thread) {
  const Index features = problem.features;
  DenseRows rows(problem, law, first, count, work.rows.at(thread * work.space));
  List& list = work.lists[thread];
  float* terms = work.terms.at(thread * kTileQueries * kFloatStride);
  double* sums = io.sums ? io.sums + first * features : work.sums.at(thread * kMaxRows * features);
  const bool needs_x = io.grad_x || io.sums;
  const auto mean = [&](Index b) {
    return static_cast<const float*>(io.mean) + (first + b) * features;
  };
  const auto grad = [&](Index b) {
    return static_cast<const float*>(io.grad_mean) + (first + b) * features;
  };
  QueryState states[kMaxRows];
  double moments[kMaxRows], averages[kMaxRows], scales[kMaxRows], local_pulls[2 * kMaxRows] = {};
  bool row_is_constant[kMaxRows], row_is_ill_conditioned[kMaxRows];
  Index ill_conditioned[kMaxRows], ill_conditioned_count = 0;
  Status failed;
  if (!io.sums) std::memset(sums, 0, count * features * sizeof(double));
  for (Index b = 0; b < count; ++b) {
    states[b] = state_of(io, first + b);
    moments[b] = io.moments ? io.moments[first + b] : 0;
    row_is_constant[b] = law.is_constant(states[b].nearest, rows.radius(b));
    row_is_ill_conditioned[b] = query_is_ill_conditioned<float>(problem, io, law, first + b);
    if (row_is_ill_conditioned[b]) ill_conditioned[ill_conditioned_count++] = b;
  }
  // Whether the one chunk gives the averages of ill-conditioned rows itself.
  const bool one_chunk = problem.references <= dense_chunk(problem) && !io.pulls;
  if (ill_conditioned_count > 0 && !one_chunk && !io.pulls) {
    const Status status =
        add_pulls_of_rows(problem, law, io, first, ill_conditioned, ill_conditioned_count,
                          work.rows.at(thread * work.space), list, local_pulls);
    if (status.failure != Failure::none) return status;
  }
  const double* pulls = io.pulls ? io.pulls + 2 * first : local_pulls;
  for (Index b = 0; b < count; ++b)
    averages[b] = row_is_ill_conditioned[b] ? average(pulls + 2 * b) : 0;

  by_chunks(problem, [&](Index begin, Index references) {
    rows.set_chunk(begin, references);
    Index whole[kMaxRows], number = 0;
    for (Index b = 0; b < count; ++b) {
      const double g = io.grad_logsumexp[first + b];
      const bool rest = rows.split(b, states[b], !row_is_ill_conditioned[b] && fits_float(g), list);
      if (!is_distance(list.nearest))
        failed = first_of(failed, {failure_of(list.nearest), first + b});
      if (row_is_constant[b] || !is_distance(list.nearest)) continue;
      if (list.length > 0) {
        moments[b] +=
            list_coefficients(rows, law, states[b], rows.radius(b), g - averages[b], grad(b),
                              mean(b), features, row_is_ill_conditioned[b] && one_chunk, list);
        // If no weight counts, list.term still holds the terms of another row.
        if (needs_x && states[b].nonzero > 0)
          add_list(rows, list, list.term, mean(b), features, sums + b * features);
      }
      if (rest) whole[number++] = b;
    }
    for (Index i = 0; i < number; i += kTileQueries) {
      const Index together = smaller(kTileQueries, number - i);
      project_rows(rows, whole + i, together, features, grad, mean, terms);
      for (Index q = 0; q < together; ++q) {
        const Index b = whole[i + q];
        const FloatWeights weights(law, states[b].nearest, rows.radius(b),
                                   visible_fall(law, states[b]));
        moments[b] += row_coefficients(weights, states[b].total, io.grad_logsumexp[first + b],
                                       terms + q * kFloatStride, rows.row(b), rows.low_row(b),
                                       rows.padded(), &scales[b]);
      }
    }
    if (needs_x)
      add_rows<kGradientSumRows, true>(
          rows, whole, number, features, mean, [&](Index b) { return scales[b]; }, sums);
  });

  for (Index b = 0; b < count; ++b) {
    if (io.moments) io.moments[first + b] = moments[b];
    const Totals total =
        law.totals(states[b].nearest, rows.radius(b), io.grad_logsumexp[first + b], moments[b]);
    if (io.grad_radius) io.grad_radius[first + b] = total.grad_radius;
    if (!io.grad_x) continue;
    float* out = static_cast<float*>(io.grad_x) + (first + b) * features;
    for (Index k = 0; k < features; ++k) {
      const double offset = static_cast<double>(rows.query(b)[k]) - static_cast<double>(mean(b)[k]);
      out[k] = static_cast<float>(total.c * offset - sums[b * features + k]);
    }
  }
  return failed;
}

inline Status dense_backward(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<float>(problem, kGradientCutoff);
  if (const Status status = check_singular(problem, law, io); status.failure != Failure::none)
    return status;
  return by_rows(problem, [&](Index first, Index count, DenseWork& work, int thread) {
    return gradients_of_block(problem, law, io, first, count, work, thread);
  });
}

// The pulls of all ill-conditioned rows, over one part of the references.
inline Status dense_pulls(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<float>(problem, kGradientCutoff);
  return by_rows(problem, [&](Index first, Index count, DenseWork& work, int thread) {
    Index ill_conditioned[kMaxRows], ill_conditioned_count = 0;
    for (Index b = 0; b < count; ++b)
      if (query_is_ill_conditioned<float>(problem, io, law, first + b))
        ill_conditioned[ill_conditioned_count++] = b;
    if (ill_conditioned_count == 0) return Status();
    return add_pulls_of_rows(problem, law, io, first, ill_conditioned, ill_conditioned_count,
                             work.rows.at(thread * work.space), work.lists[thread],
                             io.pulls + 2 * first);
  });
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
