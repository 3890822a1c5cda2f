// x − mean where it nearly vanishes, as midway between references.
//
// x − mean = Σ p_j (x − y_j) has the rounding errors of its terms. In rows where it is much smaller
// than they are, it is computed again in float64, from the distances on.
#pragma once
#include "cpu/dense_mean.h"
#include "cpu/forward.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// A row is computed again if the length of (x − mean, r) is below this fraction of the distance of
// the nearest reference. Errors of 2e-7 of that distance stay below 1e-6 of the field.
constexpr double kCancelledFraction = 0.2;
constexpr Index kCancelledBlock = 64;  // rows computed again at a time

template <class T>
Status forward_pass(const Problem& problem, const Forward& out) {
  if (is_dense(problem)) return dense_forward(problem, out);
  return by_blocks(problem, true, [&](const Problem& block, Index first) {
    return forward<T>(block, outputs_from(first, problem, out));
  });
}

// Whether |difference|² + r² is below kCancelledFraction² times the squared distance.
inline bool is_cancelled(const float* difference, Index features, double radius, double nearest) {
  const double limit = kCancelledFraction * kCancelledFraction * nearest;
  double sum = radius * radius;
  for (Index k = 0; k < features && sum < limit; ++k)
    sum += static_cast<double>(difference[k]) * difference[k];
  return sum < limit;
}

// Computes x − mean and the log-sum-exp of some rows again.
inline Status compute_again(const Problem& problem, const Forward& out, const Index* rows,
                            Index count) {
  const Index features = problem.features;
  Buffer<double> x(count * features), difference(count * features), radius(count),
      logsumexps(count);
  if (!x || !difference || !radius || !logsumexps) return {Failure::memory, 0};
  for (Index i = 0; i < count; ++i) {
    radius[i] = problem.radius[rows[i]];
    const float* from = static_cast<const float*>(problem.x) + rows[i] * problem.x_stride;
    for (Index k = 0; k < features; ++k) x[i * features + k] = static_cast<double>(from[k]);
  }
  Problem wide = problem;
  wide.type = Type::float64;
  wide.queries = count;
  wide.x = x.data();
  wide.x_stride = features;
  wide.radius = radius.data();
  wide.sketch = nullptr;  // it is in the type of x
  const Status status =
      forward_pass<double>(wide, {difference.data(), logsumexps.data(), nullptr, nullptr});
  if (status.failure != Failure::none) return {status.failure, rows[status.row]};
  for (Index i = 0; i < count; ++i) {
    float* to = static_cast<float*>(out.mean) + rows[i] * features;
    for (Index k = 0; k < features; ++k) to[k] = static_cast<float>(difference[i * features + k]);
    if (out.logsumexp) out.logsumexp[rows[i]] = logsumexps[i];
  }
  return {};
}

// The forward pass of x − mean, in one call.
inline Status difference_pass(const Problem& problem, Forward out) {
  Buffer<double> nearest(out.nearest ? 0 : problem.queries);
  if (!nearest) return {Failure::memory, 0};
  if (!out.nearest) out.nearest = nearest.data();
  const Status status = forward_pass<float>(problem, out);
  if (status.failure != Failure::none) return status;
  Index rows[kCancelledBlock], count = 0;
  for (Index b = 0; b < problem.queries; ++b) {
    const float* difference = static_cast<const float*>(out.mean) + b * problem.features;
    if (is_cancelled(difference, problem.features, problem.radius[b], out.nearest[b]))
      rows[count++] = b;
    if (count == 0 || (count < kCancelledBlock && b + 1 < problem.queries)) continue;
    const Status again = compute_again(problem, out, rows, count);
    if (again.failure != Failure::none) return again;
    count = 0;
  }
  return {};
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
