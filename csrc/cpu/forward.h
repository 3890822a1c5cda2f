// The posterior mean of blocks of queries, or x less it.
//
// Each pair of a block and a chunk of references takes three steps:
//   1. squared distances (cpu/distances.h);
//   2. weights relative to the nearest reference so far, merged into a float64 state
//      (cpu/weights.h);
//   3. the weighted sum over the references that count (cpu/weighted_sums.h).
#pragma once
#include "cpu/blocks.h"
#include "cpu/gradients.h"
#include "cpu/weighted_sums.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// Rows of a register tile of the weighted sum. Few rows share a short list of references, but only
// the wide tile of AVX-512 keeps the multipliers busy with so few.
constexpr int kSumRows = kVectorBytes == 64 ? 3 : kTileQueries;

// The squared distance up to which a reference of a chunk may count, under `law`.
double visible_distance(const WeightLaw& law, QueryState state, double radius,
                        double chunk_nearest) {
  rebase(law, state, radius, chunk_nearest);
  return state.nearest + law.excess_at(visible_fall(law, state), state.nearest, radius);
}

// Fails with the first query whose result is not allowed (check_result).
template <class T>
Status check_results(const Problem& problem, const Forward& out, const QueryState* states,
                     Index count, Index first) {
  const T* mean = static_cast<const T*>(out.mean);
  for (Index b = first; b < first + count && (mean || out.logsumexp); ++b) {
    const Status status = check_result<T>(problem, states[b - first], problem.radius[b],
                                          mean ? mean + b * problem.features : nullptr, b);
    if (status.failure != Failure::none) return status;
  }
  return {};
}

// Up to this many references of a chunk are added in float64, which takes no longer than a group.
constexpr Index kFewSummed = 2;

// Whether Σ w (y − x) over a chunk is a sum of differences in float64. Elsewhere it is the sum of
// references in T less their weight times x, with an error of the size of ε |y|: that loses no
// digits of x − mean where x is far from all references.
template <class T>
bool sums_differences(const T* x, Index features, const QueryState& state) {
  return sizeof(T) == sizeof(float) &&
         (state.nonzero <= kFewSummed || is_close(x, features, state.nearest));
}

template <class T>
Status forward(const Problem& problem, const Forward& out) {
  if (const Status status = check_radius(problem); status.failure != Failure::none) return status;
  const Index features = problem.features, block = block_size<T>(problem);
  const Index chunk = chunk_size(problem);
  const WeightLaw law = weight_law<T>(problem);
  KeptDistances kept(problem, out.kept.at, out.kept.bytes, chunk);
  const WeightLaw kept_law = weight_law<T>(problem, kept ? kGradientCutoff : 0);
  Distances<T> distances(problem, kept_law, block);
  typename Distances<T>::Lists lists(block);
  Groups<T, kSumRows> groups(block);
  WeightedSums<T, kSumRows, false> weighted(problem);
  Buffer<double> local_sums(out.sums ? 0 : block * features);
  Buffer<QueryState> states(block);
  if (!distances || !lists || !groups || !weighted || !local_sums || !states)
    return {Failure::memory, 0};
  const auto weights = [&](Index b) { return distances.row(b); };
  kept.start();

  for (Index first = 0; first < problem.queries; first += block) {
    const Index count = smaller(block, problem.queries - first);
    distances.set_queries(first, count);
    double* sums = out.sums ? out.sums + first * features : local_sums.data();
    if (!out.sums) std::memset(sums, 0, count * features * sizeof(double));
    for (Index b = 0; b < count; ++b)
      states[b] = out.sums ? state_of(out, first + b) : QueryState();

    for (Index begin = 0; begin < problem.references; begin += chunk) {
      distances.set_chunk(begin, smaller(chunk, problem.references - begin), states.data(), lists);
      parallel(count, problem.threads, [&](Index b, int) {
        const double nearest = distances.refine(b, states[b]);
        if (!is_distance(nearest)) {
          states[b].nearest = nearest;
          return;
        }
        if (kept)
          kept.add(first + b, begin, distances.row(b), distances.count(),
                   visible_distance(kept_law, states[b], distances.radius(b), nearest));
        const double weight = merge<T>(law, states[b], distances.radius(b), nearest,
                                       distances.row(b), distances.count());
        double* sum = sums + b * features;
        if (states[b].scale != 1)
          for (Index k = 0; k < features; ++k) sum[k] *= states[b].scale;
        const T* x = distances.query(b);
        const bool is_summed = problem.difference && sums_differences(x, features, states[b]);
        const bool is_listed = !is_summed && states[b].nonzero > 0;
        groups.note(b, distances.row(b), distances.count(),
                    [is_listed](double weight) { return is_listed && weight != 0; });
        if (!problem.difference || states[b].nonzero == 0) return;
        if (is_summed)
          add_row(distances, x, features, distances.row(b), distances.row(b), sum);
        else
          for (Index k = 0; k < features; ++k) sum[k] -= weight * static_cast<double>(x[k]);
      });
      if (const Status status = check_states(states.data(), count, first);
          status.failure != Failure::none)
        return status;
      groups.arrange(count, distances.count(), problem.threads);
      groups.set_weights(problem.threads, weights, [&](Index b) { return states[b].total; });
      weighted.add(distances, groups, nullptr, sums);
    }

    parallel(count, problem.threads, [&](Index b, int) {
      const double total = problem.difference ? -states[b].total : states[b].total;
      if (T* mean = static_cast<T*>(out.mean))
        for (Index k = 0; k < features; ++k)
          mean[(first + b) * features + k] = static_cast<T>(sums[b * features + k] / total);
      if (out.logsumexp) out.logsumexp[first + b] = logsumexp(law, states[b], distances.radius(b));
      if (out.nearest) out.nearest[first + b] = states[b].nearest;
      if (out.total) out.total[first + b] = states[b].total;
    });
    if (const Status status = check_results<T>(problem, out, states.data(), count, first);
        status.failure != Failure::none)
      return status;
  }
  kept.finish();
  return {};
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
