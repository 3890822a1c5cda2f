// The posterior mean with few features (cpu/dense_rows.h).
#pragma once
#include <vector>

#include "cpu/dense_rows.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// Sums over packed references, with references as lanes: rows × features in a register tile. The
// lanes of all sums of a tile are added together.
constexpr int kSumFeatures = kVectorBytes == 64 ? 4 : 2;

// sums[q][k] = Σ_j weights[q][j] (y_j[k] − origin[q][k]) over the tiles of references begin … end −
// 1 and the kSumFeatures features k[c], which may repeat. Without kOrigin, origin is 0.
template <int kRows, bool kOrigin>
void sum_rows(const float* const* weights, const float* const* origin, const float* packed,
              const Index* k, Index stride, Index begin, Index end,
              double (&sums)[kRows * kSumFeatures]) {
  constexpr Index tile = Simd<float>::tile;
  constexpr int count = kRows * kSumFeatures, together = count < kFloats ? count : kFloats;
  Floats sum[1][count];
  set_zero(sum);
  for (Index j = begin; j < end; j += tile)
    for (Index v = 0; v < tile; v += kFloats) {
      Floats reference[kSumFeatures];
      for (int c = 0; c < kSumFeatures; ++c)
        reference[c] = vector_at(packed + j * stride + k[c] * tile + v);
      for (int q = 0; q < kRows; ++q) {
        const Floats weight = vector_at(weights[q] + j + v);
        for (int c = 0; c < kSumFeatures; ++c)
          if constexpr (kOrigin)
            sum[0][q * kSumFeatures + c] += weight * (reference[c] - origin[q][k[c]]);
          else
            sum[0][q * kSumFeatures + c] += weight * reference[c];
      }
    }
  for (int i = 0; i < count; i += together) sum_lanes<float, together>(sum[0] + i, sums + i);
}

// Adds scale_of(row) Σ_j weights of the row (y_j − origin of the row) to the sums of the rows.
template <int kRows, bool kOrigin, class Origin, class ScaleOf>
void add_rows(const DenseRows& rows, const Index* row, Index number, Index features,
              const Origin& origin_of, const ScaleOf& scale_of, double* sums) {
  const Index parts = divide_up(rows.padded(), kSumSegment);
  const Index part = round_up(divide_up(rows.padded(), parts), Simd<float>::tile);
  for (Index begin = 0; begin < rows.padded(); begin += part)
    for (Index k = 0; k < features; k += kSumFeatures)
      for (Index i = 0; i < number; i += kRows) {
        const float *weights[kRows], *origin[kRows];
        for (Index q = 0; q < kRows; ++q) {
          const Index b = row[smaller(i + q, number - 1)];
          weights[q] = rows.row(b);
          origin[q] = origin_of(b);
        }
        Index each[kSumFeatures];
        for (Index c = 0; c < kSumFeatures; ++c) each[c] = smaller(k + c, features - 1);
        double part_sums[kRows * kSumFeatures];
        sum_rows<kRows, kOrigin>(weights, origin, rows.packed(0), each, packed_features(features),
                                 begin, smaller(begin + part, rows.padded()), part_sums);
        for (Index q = 0; q < smaller(kRows, number - i); ++q) {
          const Index b = row[i + q];
          for (Index c = 0; c < smaller(kSumFeatures, features - k); ++c)
            sums[b * features + k + c] += scale_of(b) * part_sums[q * kSumFeatures + c];
        }
      }
}

// Weights in a row are multiplied by this, so that sums over large references do not overflow.
constexpr float kWeightScale = 1.0f / kChunk;

// Replaces the distances of a row by weights. Returns their sum.
inline double weigh_row(const FloatWeights& law, float* row, const float* low, Index padded) {
  Doubles total = {};
  law.weigh(
      row, low, padded,
      [&](Index j, const Floats&, const Floats& w) {
        add_lanes(w, total);
        vector_at(row + j) = w * kWeightScale;
      },
      [&](Index j) { vector_at(row + j) = Floats{}; });
  return sum_of(total);
}

// Adds Σ_j weights (y_j − origin) over a list to sum, in float64.
inline void add_list(const DenseRows& rows, const List& list, const double* weight,
                     const float* origin, Index features, double* sum) {
  for (Index i = 0; i < list.length; ++i) {
    const double w = weight[i];
    if (w == 0) continue;
    with_values(rows.reference(list.index[i]), [&](const auto* y) {
      for (Index k = 0; k < features; ++k) {
        const double from = origin ? static_cast<double>(origin[k]) : 0;
        sum[k] += w * (load<double>(y[k]) - from);
      }
    });
  }
}

// What threads work in.
struct DenseWork {
  DenseWork(const Problem& problem, Index threads)
      : space(DenseRows::space(problem)),
        rows(threads * space),
        terms(threads * kTileQueries * kFloatStride),
        lists(threads),
        sums(threads * kMaxRows * problem.features) {}

  explicit operator bool() const { return rows && terms && lists && sums; }

  const Index space;
  Buffer<float> rows, terms;
  Buffer<List> lists;
  Buffer<double> sums;
};

constexpr Index kMaxDenseThreads = 32;  // bounds the workspace

// Of two statuses, the failure of the earlier query.
inline Status first_of(const Status& a, const Status& b) {
  if (a.failure == Failure::none || b.failure == Failure::none)
    return a.failure == Failure::none ? b : a;
  return b.row < a.row ? b : a;
}

// Calls run(first, count, work, thread) for blocks of queries. No result depends on where blocks
// begin.
template <class Run>
Status by_rows(const Problem& problem, const Run& run) {
  const Index threads = smaller(problem.threads, kMaxDenseThreads);
  const Index each = round_up(divide_up(problem.queries, threads), kTileQueries);
  const Index block = smaller(each, kMaxRows), blocks = divide_up(problem.queries, block);
  DenseWork work(problem, threads);
  if (!work) return {Failure::memory, 0};
  std::vector<Status> statuses(blocks);
  parallel(blocks, static_cast<int>(threads), [&](Index task, int thread) {
    const Index first = task * block, count = smaller(block, problem.queries - first);
    statuses[task] = run(first, count, work, thread);
  });
  for (const Status& status : statuses)
    if (status.failure != Failure::none) return status;
  return {};
}

// Calls run(first, count) for each chunk of references in turn. The call can be interrupted between
// chunks (api/watch.h).
template <class Run>
void by_chunks(const Problem& problem, const Run& run) {
  const Index chunk = dense_chunk(problem);
  parallel(divide_up(problem.references, chunk), 1, [&](Index task, int) {
    run(task * chunk, smaller(chunk, problem.references - task * chunk));
  });
}

// The mean of a block of queries. Fails with the first query that has no nearest distance or no
// result.
inline Status mean_of_block(const Problem& problem, const WeightLaw& law, const Forward& out,
                            Index first, Index count, DenseWork& work, int thread) {
  const Index features = problem.features;
  const bool difference = problem.difference;
  DenseRows rows(problem, law, first, count, work.rows.at(thread * work.space));
  List& list = work.lists[thread];
  double* sums =
      out.sums ? out.sums + first * features : work.sums.at(thread * kMaxRows * features);
  QueryState states[kMaxRows];
  Status failed;
  if (!out.sums) std::memset(sums, 0, count * features * sizeof(double));
  for (Index b = 0; b < count && out.sums; ++b) states[b] = state_of(out, first + b);

  by_chunks(problem, [&](Index begin, Index references) {
    rows.set_chunk(begin, references);
    // Rows whose rest is summed: y_j, or y_j − x if x is close to its nearest reference.
    Index whole[kMaxRows], number = 0, close[kMaxRows], close_number = 0;
    for (Index b = 0; b < count; ++b) {
      QueryState& state = states[b];
      double* sum = sums + b * features;
      const double radius = rows.radius(b);
      const bool rest = rows.split(b, state, true, list);
      if (!is_distance(list.nearest)) {
        failed = first_of(failed, {failure_of(list.nearest), first + b});
        continue;
      }
      if (list.length == 0 && !rest) continue;
      rebase(law, state, radius, list.nearest);
      if (state.scale != 1)
        for (Index k = 0; k < features; ++k) sum[k] *= state.scale;
      const double fall = visible_fall(law, state);
      if (list.length > 0) {
        state.total +=
            weigh(law, state.nearest, radius, fall, list.squared, list.weight, list.length);
        add_list(rows, list, list.weight, difference ? rows.query(b) : nullptr, features, sum);
      }
      if (rest) {
        const FloatWeights weights(law, state.nearest, radius, fall);
        const double weight = weigh_row(weights, rows.row(b), rows.low_row(b), rows.padded());
        state.total += weight;
        if (difference && is_close(rows.query(b), features, state.nearest)) {
          close[close_number++] = b;
          continue;
        }
        whole[number++] = b;
        if (difference)
          for (Index k = 0; k < features; ++k)
            sum[k] -= weight * static_cast<double>(rows.query(b)[k]);
      }
    }
    const auto scale = [](Index) { return static_cast<double>(kChunk); };
    add_rows<4, false>(rows, whole, number, features, [](Index) { return nullptr; }, scale, sums);
    add_rows<2, true>(
        rows, close, close_number, features, [&](Index b) { return rows.query(b); }, scale, sums);
  });

  for (Index b = 0; b < count; ++b) {
    const QueryState& state = states[b];
    const double inverse = (difference ? -1 : 1) / state.total;
    if (float* mean = static_cast<float*>(out.mean))
      for (Index k = 0; k < features; ++k)
        mean[(first + b) * features + k] = static_cast<float>(sums[b * features + k] * inverse);
    if (out.logsumexp) out.logsumexp[first + b] = logsumexp(law, state, rows.radius(b));
    if (out.nearest) out.nearest[first + b] = state.nearest;
    if (out.total) out.total[first + b] = state.total;
    if (!out.mean && !out.logsumexp) continue;
    const float* mean = static_cast<const float*>(out.mean);
    const Status status = check_result<float>(
        problem, state, rows.radius(b), mean ? mean + (first + b) * features : nullptr, first + b);
    failed = first_of(failed, status);
  }
  return failed;
}

inline Status dense_forward(const Problem& problem, const Forward& out) {
  if (const Status status = check_radius(problem); status.failure != Failure::none) return status;
  const WeightLaw law = weight_law<float>(problem);
  return by_rows(problem, [&](Index first, Index count, DenseWork& work, int thread) {
    return mean_of_block(problem, law, out, first, count, work, thread);
  });
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
