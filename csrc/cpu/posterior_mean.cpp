// The posterior mean and its gradients on the CPU, compiled once per instruction set (PFGM_ISA).
//
// Queries are split into blocks and references into chunks, which bounds the workspace. Each pair
// of a block and a chunk takes three steps:
//   1. squared distances (cpu/distances.h);
//   2. weights relative to the nearest reference so far, merged into a float64 state
//      (cpu/weights.h);
//   3. the weighted sum over the references that count (cpu/weighted_sums.h).
// With few features all that is one pass over rows of float32 (cpu/dense_rows.h), except for
// float64, few queries and the gradients of the references.
#include "api/posterior_mean.h"

#include <vector>

#include "cpu/dense_gradients.h"
#include "cpu/weighted_sums.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kMaxBlock = 384;   // queries in a block; a multiple of every kTileQueries
constexpr Index kSmallBlock = 64;  // queries in a block if features are few: every thread gets one
constexpr Index kMaxStateBytes = 24 << 20;

template <class T>
Index block_size(const Problem& problem) {
  if (problem.features < kListedFeatures) return smaller(problem.queries, kSmallBlock);
  const Index fitting = kMaxStateBytes / (problem.features * (sizeof(double) + sizeof(T)));
  const Index whole = fitting / kTileQueries * kTileQueries;
  return smaller(problem.queries, smaller(kMaxBlock, larger(whole, kTileQueries)));
}

// Fails with the first query that has no nearest distance, after the first chunk or later.
Status check_states(const QueryState* states, Index count, Index first) {
  for (Index b = 0; b < count; ++b)
    if (!(is_distance(states[b].nearest) && states[b].nearest < kSkipped))
      return {failure_of(states[b].nearest), first + b};
  return {};
}

// Fails with the first query whose result is not allowed (check_result).
template <class T, class R>
Status check_results(const Problem& problem, const Forward& out, const QueryState* states,
                     Index count, Index first) {
  const T* mean = static_cast<const T*>(out.mean);
  for (Index b = first; b < first + count && (mean || out.logsumexp); ++b) {
    const Status status = check_result<T, R>(problem, states[b - first], problem.radius[b],
                                             mean ? mean + b * problem.features : nullptr, b);
    if (status.failure != Failure::none) return status;
  }
  return {};
}

// Rows of a register tile of the weighted sum. Few rows share a short list of references, but only
// the wide tile of AVX-512 keeps the multipliers busy with so few.
constexpr int kSumRows = kVectorBytes == 64 ? 3 : kTileQueries;

constexpr auto counts = [](double weight) { return weight != 0; };

// The squared distance up to which a reference of a chunk may count, under `law`.
double visible_distance(const WeightLaw& law, QueryState state, double radius,
                        double chunk_nearest) {
  rebase(law, state, radius, chunk_nearest);
  return state.nearest + law.excess_at(visible_fall(law, state), state.nearest, radius);
}

// ---- forward --------------------------------------------------------------------------------

// Up to so many references of a chunk are added in float64, which takes no longer than a group.
constexpr Index kFewSummed = 2;

// Whether Σ w (y − x) over a chunk is a sum of differences in float64. Elsewhere it is the sum of
// references in T less their weight times x, with an error of the size of ε |y|: that loses no
// digits of x − mean where x is far from all references.
template <class T>
bool sums_differences(const T* x, Index features, const QueryState& state) {
  return sizeof(T) == sizeof(float) &&
         (state.live <= kFewSummed || is_close(x, features, state.nearest));
}

template <class T, class R>
Status forward(const Problem& problem, const Forward& out) {
  if (const Status status = check_radius(problem); status.failure != Failure::none) return status;
  const Index features = problem.features, block = block_size<T>(problem);
  const Index chunk = chunk_size<R>(problem);
  const WeightLaw law = weight_law<T>(problem);
  KeptDistances kept(problem, out.kept.at, out.kept.bytes, chunk);
  const WeightLaw kept_law = weight_law<T>(problem, kept ? kGradientCutoff : 0);
  Distances<T, R> distances(problem, kept_law, block);
  typename Distances<T, R>::Lists lists(block);
  Groups<T, kSumRows> groups(block);
  WeightedSums<T, R, kSumRows, false> weighted(problem);
  Buffer<double> own_sums(out.sums ? 0 : block * features);
  Buffer<QueryState> states(block);
  if (!distances || !lists || !groups || !weighted || !own_sums || !states)
    return {Failure::memory, 0};
  const auto weights = [&](Index b) { return distances.row(b); };
  kept.start();

  for (Index first = 0; first < problem.queries; first += block) {
    const Index count = smaller(block, problem.queries - first);
    distances.set_queries(first, count);
    double* sums = out.sums ? out.sums + first * features : own_sums.data();
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
        if (!problem.difference || states[b].live == 0) return;
        const T* x = distances.query(b);
        if (sums_differences(x, features, states[b])) {
          add_row(distances, x, features, distances.row(b), distances.row(b), sum);
          states[b].live = 0;
        } else {
          for (Index k = 0; k < features; ++k) sum[k] -= weight * static_cast<double>(x[k]);
        }
      });
      if (const Status status = check_states(states.data(), count, first);
          status.failure != Failure::none)
        return status;
      groups.arrange(
          count, distances.count(), problem.threads, [&](Index b) { return states[b].live; },
          weights, counts);
      groups.weigh(problem.threads, weights, [&](Index b) { return states[b].total; });
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
    if (const Status status = check_results<T, R>(problem, out, states.data(), count, first);
        status.failure != Failure::none)
      return status;
  }
  kept.finish();
  return {};
}

// ---- backward (cpu/gradients.h has the formulas) ----------------------------------------------

constexpr int kGradientRows = 3;  // rows of a register tile that also holds their means

// out[q][c] = g_q · (y_c − m_q) over n features. y is padded with zeros to whole vectors.
template <class T>
void project_pairs(const T* const* g, const T* const* m, const T* const* y, Index n,
                   double (*out)[kPairColumns]) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes;
  Vector sum[kGradientRows][kPairColumns];
  set_zero(sum);
  Index k = 0;
  for (; k + lanes <= n; k += lanes) {
    Vector reference[kPairColumns];
    for (int c = 0; c < kPairColumns; ++c) reference[c] = vector_at(y[c] + k);
    for (int q = 0; q < kGradientRows; ++q) {
      const Vector upstream = load_unaligned(g[q] + k);
      const Vector mean = load_unaligned(m[q] + k);
      for (int c = 0; c < kPairColumns; ++c) sum[q][c] += upstream * (reference[c] - mean);
    }
  }
  for (int q = 0; q < kGradientRows; ++q) {
    sum_lanes<T, kPairColumns>(sum[q], out[q]);
    for (int c = 0; c < kPairColumns; ++c)
      for (Index i = k; i < n; ++i) out[q][c] += g[q][i] * (y[c][i] - m[q][i]);
  }
}

constexpr Index kGradientPanel = 1024;  // features in a task

// Adds Σ_b [p_bj G_b − c_bj (x_b − y_j)] to grad_y[j, :] for the references of the chunk.
template <class T, class R>
void reference_gradients(const Problem& problem, const Backward& io,
                         const Distances<T, R>& distances, Index first_query, Index queries,
                         Index first_reference, const double* probabilities,
                         const double* coefficients) {
  const Index features = problem.features;
  const Index panels = (features + kGradientPanel - 1) / kGradientPanel;
  parallel(distances.count() * panels, problem.threads, [&](Index task, int) {
    const Index j = task / panels, k0 = task % panels * kGradientPanel;
    const Index n = smaller(kGradientPanel, features - k0);
    const R* y = distances.reference(j) + k0;
    double sum[kGradientPanel] = {};
    for (Index b = 0; b < queries; ++b) {
      const double p = probabilities[b * kStride + j], coefficient = coefficients[b * kStride + j];
      if (p == 0) continue;
      const T* grad = static_cast<const T*>(io.grad_mean) + (first_query + b) * features + k0;
      const T* x = distances.query(b) + k0;
      for (Index k = 0; k < n; ++k)
        sum[k] += p * static_cast<double>(grad[k]) -
                  coefficient * (static_cast<double>(x[k]) - load<double>(y[k]));
    }
    T* out = static_cast<T*>(io.grad_y) + (first_reference + j) * features + k0;
    for (Index k = 0; k < n; ++k) out[k] += static_cast<T>(sum[k]);
  });
}

// The pulls of all steep rows, over one part of the references.
template <class T, class R>
Status all_pulls(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<T>(problem, kGradientCutoff);
  Buffer<Index> steep(problem.queries);
  if (!steep) return {Failure::memory, 0};
  Index count = 0;
  for (Index b = 0; b < problem.queries; ++b)
    if (query_is_steep<T, R>(problem, io, law, b)) steep[count++] = b;
  return count == 0 ? Status()
                    : add_pulls<T, R>(problem, io, law, 0, steep.data(), count, io.pulls);
}

template <class T, class R>
bool all_finite(const R* values, Index n) {
  for (Index k = 0; k < n; ++k)
    if (!std::isfinite(load<T>(values[k]))) return false;
  return true;
}

// Whether a reference holds a value that T cannot hold.
template <class T, class R>
bool exceeds(const Problem& problem) {
  for (Index j = 0; j < problem.references; ++j)
    if (!all_finite<T>(static_cast<const R*>(problem.y) + j * problem.y_stride, problem.features))
      return true;
  return false;
}

// Fails with the first query for which a reference counts that holds a value that T cannot hold.
// Such a reference gives a moment that is not finite, and so do upstream gradients of that kind.
template <class T, class R>
Status check_moments(const Problem& problem, const Backward& io, const double* moments, Index count,
                     Index first) {
  if constexpr (kMayExceed<T, R>)
    for (Index b = 0; b < count; ++b) {
      if (std::isfinite(moments[b])) continue;
      const T* grad = static_cast<const T*>(io.grad_mean) + (first + b) * problem.features;
      if (std::isfinite(io.grad_logsumexp[first + b]) && all_finite<T>(grad, problem.features) &&
          exceeds<T, R>(problem))
        return {Failure::range, first + b};
    }
  return {};
}

template <class T, class R>
Status backward(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<T>(problem, kGradientCutoff);
  if (const Status status = check_singular(problem, law, io); status.failure != Failure::none)
    return status;
  const Index features = problem.features, block = block_size<T>(problem);
  const Index chunk = chunk_size<R>(problem);
  const KeptDistances kept(problem, io.kept.at, io.kept.bytes, chunk);
  if (kept && !kept.is_of(problem)) return {Failure::kept, 0};
  Distances<T, R> distances(problem, law, block);
  typename Distances<T, R>::Lists lists(block);
  Groups<T, kGradientRows> groups(block);
  DenseTiles<T> dense(problem.threads);
  PairTiles<T, R, kGradientRows> projections(problem.threads);
  WeightedSums<T, R, kGradientRows, true> weighted(problem);
  const bool of_x = io.grad_x || io.sums;
  Buffer<double> own_sums(of_x && !io.sums ? block * features : 0);
  Buffer<double> p(block * kStride), c(block * kStride);
  Buffer<double> moments(block), bounds(block), averages(block), own_pulls(2 * block);
  Buffer<QueryState> states(block);
  Buffer<Index> steep(block);
  Buffer<bool> row_is_steep(block);  // whether the row is steep
  if (!distances || !lists || !groups || !dense || !projections || !weighted || !own_sums || !p ||
      !c || !moments || !bounds || !averages || !own_pulls || !states || !steep || !row_is_steep)
    return {Failure::memory, 0};
  if (io.grad_y)
    parallel(divide_up(problem.references, chunk), problem.threads, [&](Index task, int) {
      const Index rows = smaller(chunk, problem.references - task * chunk);
      std::memset(static_cast<T*>(io.grad_y) + task * chunk * features, 0,
                  rows * features * sizeof(T));
    });
  // Whether the one chunk gives the averages of steep rows itself.
  const bool whole = problem.references <= chunk && !io.pulls;
  const auto each = [](const Buffer<double>& values) {
    return [&values](Index b) { return values.at(b * kStride); };
  };

  for (Index first = 0; first < problem.queries; first += block) {
    const Index count = smaller(block, problem.queries - first);
    const T* mean = static_cast<const T*>(io.mean) + first * features;
    const T* grad = static_cast<const T*>(io.grad_mean) + first * features;
    const auto project = [&](const Index* b, Index k, Index n, const T* const* y,
                             double (*sums)[kPairColumns]) {
      const T *g[kGradientRows], *m[kGradientRows];
      for (int q = 0; q < kGradientRows; ++q) {
        g[q] = grad + b[q] * features + k;
        m[q] = mean + b[q] * features + k;
      }
      project_pairs<T>(g, m, y, n, sums);
    };
    distances.set_queries(first, count);
    double* sums = io.sums ? io.sums + first * features : own_sums.data();
    if (of_x && !io.sums) std::memset(sums, 0, count * features * sizeof(double));
    Index steep_count = 0;
    for (Index b = 0; b < count; ++b) {
      moments[b] = io.moments ? io.moments[first + b] : 0;
      own_pulls[2 * b] = own_pulls[2 * b + 1] = 0;
      states[b] = state_of(io, first + b);
      row_is_steep[b] = query_is_steep<T, R>(problem, io, law, first + b);
      if (row_is_steep[b]) steep[steep_count++] = b;
    }
    if (steep_count > 0 && !whole && !io.pulls) {
      const Status status =
          add_pulls<T, R>(problem, io, law, first, steep.data(), steep_count, own_pulls.data());
      if (status.failure != Failure::none) return status;
    }
    const double* pulls = io.pulls ? io.pulls + 2 * first : own_pulls.data();
    for (Index b = 0; b < count; ++b) averages[b] = row_is_steep[b] ? average(pulls + 2 * b) : 0;

    for (Index begin = 0; begin < problem.references; begin += chunk) {
      const Index references = smaller(chunk, problem.references - begin);
      if (kept)
        distances.read_chunk(begin, references, kept);
      else
        distances.set_chunk(begin, references, states.data(), lists);
      parallel(count, problem.threads, [&](Index b, int) {
        if (!kept) {
          const double nearest = distances.refine(b, states[b]);
          if (!is_distance(nearest)) {
            states[b].nearest = nearest;
            return;
          }
        }
        if (row_is_steep[b])
          probabilities<double>(law, states[b], distances.radius(b), distances.row(b),
                                p.at(b * kStride), distances.count());
        else
          probabilities<T>(law, states[b], distances.radius(b), distances.row(b), p.at(b * kStride),
                           distances.count());
        if (!distances.dense())  // where all pairs are computed, they are assigned
          std::memset(c.at(b * kStride), 0, padded_count(distances.count()) * sizeof(double));
      });
      if (const Status status = check_states(states.data(), count, first);
          status.failure != Failure::none)
        return status;
      groups.arrange(
          count, distances.count(), problem.threads,
          [&](Index b) { return row_is_steep[b] ? 0 : states[b].live; }, each(p), counts);
      const auto y = [&](Index j) { return distances.reference(j); };
      if (distances.dense())
        dense.template sum<Projection>(
            count, distances.count(), features, [&](Index b) { return mean + b * features; },
            [&](Index b) { return grad + b * features; }, y, each(c));
      else
        projections.add(groups, distances.count(), features, y, project, each(c));
      parallel(count, problem.threads, [&](Index b, int) {
        double *of_p = p.at(b * kStride), *of_c = c.at(b * kStride);
        if (row_is_steep[b]) {
          double found[2] = {};
          project_row(distances, grad + b * features, mean + b * features, features, of_p, of_c,
                      found);
          if (whole) averages[b] = average(found);
        }
        moments[b] += coefficients(law, states[b], distances.radius(b),
                                   io.grad_logsumexp[first + b] - averages[b], distances.row(b),
                                   of_p, of_c, distances.count(), bounds.at(b));
        if (row_is_steep[b] && of_x)
          add_row(distances, mean + b * features, features, of_p, of_c, sums + b * features);
      });
      if (of_x) {
        groups.weigh(problem.threads, each(c), [&](Index b) { return bounds[b]; });
        weighted.add(distances, groups, mean, sums);
      }
      if (io.grad_y)
        reference_gradients(problem, io, distances, first, count, begin, p.data(), c.data());
    }
    if (const Status status = check_moments<T, R>(problem, io, moments.data(), count, first);
        status.failure != Failure::none)
      return status;

    parallel(count, problem.threads, [&](Index b, int) {
      const Index query = first + b;
      if (io.moments) io.moments[query] = moments[b];
      const Totals total =
          totals(law, states[b], moments[b], io.grad_logsumexp[query], distances.radius(b));
      if (io.grad_radius) io.grad_radius[query] = total.grad_radius;
      if (!io.grad_x) return;
      const T* x = distances.query(b);
      T* out = static_cast<T*>(io.grad_x) + query * features;
      for (Index k = 0; k < features; ++k) {
        const double offset =
            static_cast<double>(x[k]) - static_cast<double>(mean[b * features + k]);
        out[k] = static_cast<T>(total.c * offset - sums[b * features + k]);
      }
    });
  }
  return {};
}

// ---- entry points ---------------------------------------------------------------------------

template <class T, class F>
auto with_reference_type(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(T(), float());
    case Type::float64:
      return f(T(), double());
    case Type::bfloat16:
      return f(T(), BFloat16());
    case Type::float16:
      return f(T(), Float16());
    case Type::uint8:
      return f(T(), std::uint8_t());
  }
  std::abort();
}

template <class F>
auto with_types(const Problem& problem, const F& f) {
  return problem.type == Type::float64 ? with_reference_type<double>(problem.reference_type, f)
                                       : with_reference_type<float>(problem.reference_type, f);
}

// Address of the index-th element of a float32 or float64 array.
template <class Void>
Void* at(Void* array, Index index, Type type) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  const Index size = type == Type::float64 ? sizeof(double) : sizeof(float);
  return static_cast<Byte*>(array) + index * size;
}

// The most threads with a workspace of their own, at most 6 MB each.
constexpr int kMaxIndependentThreads = 8;

// Below this many queries × references × features a second thread costs more than it saves: it may
// have to be woken.
constexpr Index kThreaded = 1 << 20;

// The problem with one thread if it is that small. Threads wait for each other after at most
// `queries` and `references`.
Problem with_threads(Problem problem, Index queries, Index references) {
  const double size = static_cast<double>(smaller(queries, problem.queries)) *
                      static_cast<double>(smaller(references, problem.references)) *
                      static_cast<double>(problem.features);
  if (size < kThreaded) problem.threads = 1;
  return problem;
}

// With few features most steps are too short to share between threads. Instead each thread takes
// whole blocks of queries through all steps. The blocks are the same either way, so the results are
// the same to the bit.
template <class F>
Status by_blocks(const Problem& problem, bool independent, const F& run) {
  const Index blocks = divide_up(problem.queries, kSmallBlock);
  const bool few =
      problem.threads > 1 && problem.threads <= kMaxIndependentThreads && problem.threads <= blocks;
  if (problem.features >= kListedFeatures) return run(problem, 0);
  if (!independent || !few) return run(with_threads(problem, kSmallBlock, kChunk), 0);
  std::vector<Status> found(blocks);
  parallel(blocks, problem.threads, [&](Index task, int) {
    Problem block = problem;
    const Index first = task * kSmallBlock;
    block.threads = 1;
    block.queries = smaller(kSmallBlock, problem.queries - first);
    block.x = at(problem.x, first * problem.x_stride, problem.type);
    block.radius += first;
    found[task] = run(block, first);
    found[task].row += first;
  });
  for (const Status& status : found)
    if (status.failure != Failure::none) return status;
  return {};
}

Forward outputs_from(Index first, const Problem& problem, Forward out) {
  if (out.mean) out.mean = at(out.mean, first * problem.features, problem.type);
  if (out.logsumexp) out.logsumexp += first;
  if (out.nearest) out.nearest += first;
  if (out.total) out.total += first;
  if (out.sums) out.sums += first * problem.features;
  return out;
}

Backward outputs_from(Index first, const Problem& problem, Backward io) {
  io.grad_mean = at(io.grad_mean, first * problem.features, problem.type);
  io.grad_logsumexp += first;
  io.mean = at(io.mean, first * problem.features, problem.type);
  io.nearest += first;
  io.total += first;
  if (io.grad_x) io.grad_x = at(io.grad_x, first * problem.features, problem.type);
  if (io.grad_radius) io.grad_radius += first;
  if (io.sums) io.sums += first * problem.features;
  if (io.moments) io.moments += first;
  if (io.pulls) io.pulls += 2 * first;
  return io;
}

// Whether the sketch, if there is one, is of the references.
bool sketch_fits(const Problem& problem) {
  return !problem.sketch || with_types(problem, [&](auto t, auto r) {
    return Screen<decltype(t), decltype(r)>::is_sketch_of(problem);
  });
}

Status run_forward(const Problem& given, const Forward& out) {
  if (!sketch_fits(given)) return {Failure::sketch, 0};
  const Problem problem = with_threads(given, given.queries, given.references);
  return with_types(problem, [&](auto t, auto r) {
    if (is_dense<decltype(t)>(problem)) return dense_forward<decltype(r)>(problem, out);
    return by_blocks(problem, true, [&](const Problem& block, Index first) {
      return forward<decltype(t), decltype(r)>(block, outputs_from(first, problem, out));
    });
  });
}

Status run_backward(const Problem& given, const Backward& io) {
  if (!sketch_fits(given)) return {Failure::sketch, 0};
  const Problem problem = with_threads(given, given.queries, given.references);
  return with_types(problem, [&](auto t, auto r) {
    Backward rest = io;
    if (is_dense<decltype(t)>(problem) && (io.grad_x || io.grad_radius || io.moments)) {
      const Status status = dense_backward<decltype(r)>(problem, io);
      if (status.failure != Failure::none || !io.grad_y) return status;
      rest.grad_x = nullptr;
      rest.grad_radius = nullptr;
    }
    return by_blocks(problem, rest.grad_y == nullptr, [&](const Problem& block, Index first) {
      return backward<decltype(t), decltype(r)>(block, outputs_from(first, problem, rest));
    });
  });
}

Status run_pulls(const Problem& given, const Backward& io) {
  const Problem problem = with_threads(given, given.queries, given.references);
  return with_types(problem, [&](auto t, auto r) {
    if (is_dense<decltype(t)>(problem)) return dense_pulls<decltype(r)>(problem, io);
    return by_blocks(problem, true, [&](const Problem& block, Index first) {
      return all_pulls<decltype(t), decltype(r)>(block, outputs_from(first, problem, io));
    });
  });
}

bool any_steep(const Problem& problem, const Backward& io) {
  bool found = false;
  with_types(problem, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const WeightLaw law = weight_law<T>(problem);
    for (Index b = 0; b < problem.queries && !found; ++b)
      found = query_is_steep<T, R>(problem, io, law, b);
    return Status();
  });
  return found;
}

std::int64_t chunk_rows(std::int64_t features, Type reference_type) {
  Problem problem = {};
  problem.features = features;
  Index rows = 0;
  with_reference_type<float>(reference_type, [&](auto, auto r) {
    const Index chunk = chunk_size<decltype(r)>(problem);
    rows = chunk;
    // The kernels for few features have other chunks.
    while (features < kListedFeatures && rows % dense_chunk(problem) != 0) rows += chunk;
    return Status();
  });
  return rows;
}

std::int64_t sketch_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return with_types(problem, [&](auto t, auto r) {
    return Screen<decltype(t), decltype(r)>::sketch_bytes(problem.references, problem.features);
  });
}

Status run_sketch(const Problem& problem, void* out) {
  return with_types(problem, [&](auto t, auto r) {
    using R = decltype(r);
    const auto y = [&](Index j) { return static_cast<const R*>(problem.y) + j * problem.y_stride; };
    const Screen<decltype(t), R> screen(problem, 0, 0);
    if (!screen) return Status{Failure::memory, 0};
    screen.sketch(y, out);
    return Status();
  });
}

std::int64_t kept_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return with_types(problem, [&](auto, auto r) {
    return KeptDistances::most_bytes(problem, chunk_size<decltype(r)>(problem));
  });
}

}  // namespace

#define PFGM_TEXT_(name) #name
#define PFGM_TEXT(name) PFGM_TEXT_(name)
extern const Kernels kernels;
const Kernels kernels = {PFGM_TEXT(PFGM_ISA), run_forward,  run_backward, run_pulls, any_steep,
                         chunk_rows,          sketch_bytes, run_sketch,   kept_bytes};

}  // namespace PFGM_ISA
}  // namespace pfgm
