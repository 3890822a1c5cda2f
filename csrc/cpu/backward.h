// The gradients of blocks of queries (cpu/gradients.h has the formulas).
#pragma once
#include "cpu/blocks.h"
#include "cpu/gradients.h"
#include "cpu/weighted_sums.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

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
template <class T>
void reference_gradients(const Problem& problem, const Backward& io, const Distances<T>& distances,
                         Index first_query, Index queries, Index first_reference,
                         const double* probabilities, const double* coefficients) {
  const Index features = problem.features;
  const Index panels = (features + kGradientPanel - 1) / kGradientPanel;
  parallel(distances.count() * panels, problem.threads, [&](Index task, int) {
    const Index j = task / panels, k0 = task % panels * kGradientPanel;
    const Index n = smaller(kGradientPanel, features - k0);
    double sum[kGradientPanel] = {};
    with_values(distances.reference(j) + k0, [&](const auto* y) {
      for (Index b = 0; b < queries; ++b) {
        const double p = probabilities[b * kStride + j], c = coefficients[b * kStride + j];
        if (p == 0) continue;
        const T* grad = static_cast<const T*>(io.grad_mean) + (first_query + b) * features + k0;
        const T* x = distances.query(b) + k0;
        for (Index k = 0; k < n; ++k)
          sum[k] += p * static_cast<double>(grad[k]) -
                    c * (static_cast<double>(x[k]) - load<double>(y[k]));
      }
    });
    T* out = static_cast<T*>(io.grad_y) + (first_reference + j) * features + k0;
    for (Index k = 0; k < n; ++k) out[k] += static_cast<T>(sum[k]);
  });
}

// The pulls of all ill-conditioned rows, over one part of the references.
template <class T>
Status all_pulls(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<T>(problem, kGradientCutoff);
  Buffer<Index> ill_conditioned(problem.queries);
  if (!ill_conditioned) return {Failure::memory, 0};
  Index count = 0;
  for (Index b = 0; b < problem.queries; ++b)
    if (query_is_ill_conditioned<T>(problem, io, law, b)) ill_conditioned[count++] = b;
  return count == 0 ? Status()
                    : add_pulls<T>(problem, io, law, 0, ill_conditioned.data(), count, io.pulls);
}

template <class T>
bool all_finite(const Row& row, Index n) {
  return with_values(row, [&](const auto* values) {
    for (Index k = 0; k < n; ++k)
      if (!std::isfinite(load<T>(values[k]))) return false;
    return true;
  });
}

// Whether a reference holds a value that T cannot hold.
template <class T>
bool exceeds(const Problem& problem) {
  for (Index j = 0; j < problem.references; ++j)
    if (!all_finite<T>(references_of(problem)(j), problem.features)) return true;
  return false;
}

// Fails with the first query for which a reference counts that T cannot hold. Its moment is not
// finite, although its upstream gradients are.
template <class T>
Status check_moments(const Problem& problem, const Backward& io, const double* moments, Index count,
                     Index first) {
  if (may_exceed<T>(problem))
    for (Index b = 0; b < count; ++b) {
      if (std::isfinite(moments[b])) continue;
      const T* grad = static_cast<const T*>(io.grad_mean) + (first + b) * problem.features;
      if (std::isfinite(io.grad_logsumexp[first + b]) && all_finite<T>(grad, problem.features) &&
          exceeds<T>(problem))
        return {Failure::range, first + b};
    }
  return {};
}

// A pass over all blocks. In the names of steps, t, p and c are those of cpu/gradients.h.
template <class T>
class BackwardPass {
 public:
  BackwardPass(const Problem& problem, const Backward& io, const WeightLaw& law)
      : problem_(problem),
        io_(io),
        law_(law),
        features_(problem.features),
        block_(block_size<T>(problem)),
        chunk_(chunk_size(problem)),
        needs_sums_(io.grad_x || io.sums),
        one_chunk_(problem.references <= chunk_ && !io.pulls),
        kept_(problem, io.kept.at, io.kept.bytes, chunk_),
        distances_(problem, law, block_),
        lists_(block_),
        groups_(block_),
        dense_(problem.threads),
        projections_(problem.threads),
        weighted_(problem),
        local_sums_(needs_sums_ && !io.sums ? block_ * features_ : 0),
        p_(block_ * kStride),
        c_(block_ * kStride),
        moments_(block_),
        bounds_(block_),
        averages_(block_),
        local_pulls_(2 * block_),
        states_(block_),
        ill_conditioned_(block_),
        is_ill_conditioned_(block_) {}

  Status run() {
    if (kept_ && !kept_.is_of(problem_)) return {Failure::kept, 0};
    if (!distances_ || !lists_ || !groups_ || !dense_ || !projections_ || !weighted_ ||
        !local_sums_ || !p_ || !c_ || !moments_ || !bounds_ || !averages_ || !local_pulls_ ||
        !states_ || !ill_conditioned_ || !is_ill_conditioned_)
      return {Failure::memory, 0};
    if (io_.grad_y) clear_reference_gradients();
    for (first_ = 0; first_ < problem_.queries; first_ += block_) {
      if (const Status status = run_block(); status.failure != Failure::none) return status;
    }
    return {};
  }

 private:
  Status run_block() {
    if (const Status status = start(); status.failure != Failure::none) return status;
    for (Index begin = 0; begin < problem_.references; begin += chunk_) {
      measure(begin);
      if (const Status status = check_states(states_.data(), count_, first_);
          status.failure != Failure::none)
        return status;
      project();
      find_coefficients();
      if (needs_sums_) {
        groups_.set_weights(problem_.threads, each(c_), [&](Index b) { return bounds_[b]; });
        weighted_.add(distances_, groups_, mean_, sums_);
      }
      if (io_.grad_y)
        reference_gradients(problem_, io_, distances_, first_, count_, begin, p_.data(), c_.data());
    }
    if (const Status status = check_moments<T>(problem_, io_, moments_.data(), count_, first_);
        status.failure != Failure::none)
      return status;
    finish();
    return {};
  }

  void clear_reference_gradients() {
    parallel(divide_up(problem_.references, chunk_), problem_.threads, [&](Index task, int) {
      const Index rows = smaller(chunk_, problem_.references - task * chunk_);
      std::memset(static_cast<T*>(io_.grad_y) + task * chunk_ * features_, 0,
                  rows * features_ * sizeof(T));
    });
  }

  // Takes the queries from first_ on. Finds the averages of ill-conditioned rows, unless there is
  // one chunk: then find_coefficients does.
  Status start() {
    count_ = smaller(block_, problem_.queries - first_);
    mean_ = static_cast<const T*>(io_.mean) + first_ * features_;
    grad_ = static_cast<const T*>(io_.grad_mean) + first_ * features_;
    distances_.set_queries(first_, count_);
    sums_ = io_.sums ? io_.sums + first_ * features_ : local_sums_.data();
    if (needs_sums_ && !io_.sums) std::memset(sums_, 0, count_ * features_ * sizeof(double));
    Index ill_conditioned_count = 0;
    for (Index b = 0; b < count_; ++b) {
      moments_[b] = io_.moments ? io_.moments[first_ + b] : 0;
      local_pulls_[2 * b] = local_pulls_[2 * b + 1] = 0;
      states_[b] = state_of(io_, first_ + b);
      is_ill_conditioned_[b] = query_is_ill_conditioned<T>(problem_, io_, law_, first_ + b);
      if (is_ill_conditioned_[b]) ill_conditioned_[ill_conditioned_count++] = b;
    }
    if (ill_conditioned_count > 0 && !one_chunk_ && !io_.pulls) {
      const Status status = add_pulls<T>(problem_, io_, law_, first_, ill_conditioned_.data(),
                                         ill_conditioned_count, local_pulls_.data());
      if (status.failure != Failure::none) return status;
    }
    const double* pulls = io_.pulls ? io_.pulls + 2 * first_ : local_pulls_.data();
    for (Index b = 0; b < count_; ++b)
      averages_[b] = is_ill_conditioned_[b] ? average(pulls + 2 * b) : 0;
    return {};
  }

  // Squared distances to a chunk, and p.
  void measure(Index begin) {
    const Index references = smaller(chunk_, problem_.references - begin);
    if (kept_)
      distances_.read_chunk(begin, references, kept_);
    else
      distances_.set_chunk(begin, references, states_.data(), lists_);
    parallel(count_, problem_.threads, [&](Index b, int) {
      if (!kept_) {
        const double nearest = distances_.refine(b, states_[b]);
        if (!is_distance(nearest)) {
          states_[b].nearest = nearest;
          return;
        }
      }
      if (is_ill_conditioned_[b])
        probabilities<double>(law_, states_[b], distances_.radius(b), distances_.row(b),
                              p_.at(b * kStride), distances_.count());
      else
        probabilities<T>(law_, states_[b], distances_.radius(b), distances_.row(b),
                         p_.at(b * kStride), distances_.count());
      const bool is_listed = !is_ill_conditioned_[b] && states_[b].nonzero > 0;
      groups_.note(b, p_.at(b * kStride), distances_.count(),
                   [is_listed](double p) { return is_listed && p != 0; });
      if (!distances_.takes_all_pairs())  // PairTiles adds to c, DenseTiles assigns it
        std::memset(c_.at(b * kStride), 0, padded_count(distances_.count()) * sizeof(double));
    });
  }

  // G·(y − mean) of all well-conditioned rows, in the memory of c.
  void project() {
    groups_.arrange(count_, distances_.count(), problem_.threads);
    const Rows y = distances_.references();
    if (distances_.takes_all_pairs()) {
      dense_.template sum<Projection>(
          count_, distances_.count(), features_, [&](Index b) { return mean_ + b * features_; },
          [&](Index b) { return grad_ + b * features_; }, y, each(c_));
      return;
    }
    const auto project_rows = [&](const Index* b, Index k, Index n, const T* const* references,
                                  double (*sums)[kPairColumns]) {
      const T *g[kGradientRows], *m[kGradientRows];
      for (int q = 0; q < kGradientRows; ++q) {
        g[q] = grad_ + b[q] * features_ + k;
        m[q] = mean_ + b[q] * features_ + k;
      }
      project_pairs<T>(g, m, references, n, sums);
    };
    projections_.add(groups_, distances_.count(), features_, y, project_rows, each(c_));
  }

  // c, and the moments. Ill-conditioned rows are finished here, in float64.
  void find_coefficients() {
    parallel(count_, problem_.threads, [&](Index b, int) {
      double *p = p_.at(b * kStride), *c = c_.at(b * kStride);
      const T* mean = mean_ + b * features_;
      if (is_ill_conditioned_[b]) {
        double pulls[2] = {};
        project_row(distances_, grad_ + b * features_, mean, features_, p, c, pulls);
        if (one_chunk_) averages_[b] = average(pulls);
      }
      moments_[b] += coefficients(law_, states_[b], distances_.radius(b),
                                  io_.grad_logsumexp[first_ + b] - averages_[b], distances_.row(b),
                                  p, c, distances_.count(), bounds_.at(b));
      if (is_ill_conditioned_[b] && needs_sums_)
        add_row(distances_, mean, features_, p, c, sums_ + b * features_);
    });
  }

  // Writes ∂L/∂r and ∂L/∂x of the block, from its sums.
  void finish() {
    parallel(count_, problem_.threads, [&](Index b, int) {
      const Index query = first_ + b;
      if (io_.moments) io_.moments[query] = moments_[b];
      const Totals total = law_.totals(states_[b].nearest, distances_.radius(b),
                                       io_.grad_logsumexp[query], moments_[b]);
      if (io_.grad_radius) io_.grad_radius[query] = total.grad_radius;
      if (!io_.grad_x) return;
      const T* x = distances_.query(b);
      T* out = static_cast<T*>(io_.grad_x) + query * features_;
      for (Index k = 0; k < features_; ++k) {
        const double offset =
            static_cast<double>(x[k]) - static_cast<double>(mean_[b * features_ + k]);
        out[k] = static_cast<T>(total.c * offset - sums_[b * features_ + k]);
      }
    });
  }

  static auto each(const Buffer<double>& rows) {
    return [&rows](Index b) { return rows.at(b * kStride); };
  }

  const Problem& problem_;
  const Backward& io_;
  const WeightLaw& law_;
  const Index features_, block_, chunk_;
  const bool needs_sums_;
  const bool one_chunk_;  // find_coefficients then averages the pulls itself
  const KeptDistances kept_;
  Distances<T> distances_;
  typename Distances<T>::Lists lists_;
  Groups<T, kGradientRows> groups_;
  DenseTiles<T> dense_;
  PairTiles<T, kGradientRows> projections_;
  WeightedSums<T, kGradientRows, true> weighted_;
  Buffer<double> local_sums_, p_, c_, moments_, bounds_, averages_, local_pulls_;
  Buffer<QueryState> states_;
  Buffer<Index> ill_conditioned_;
  Buffer<bool> is_ill_conditioned_;

  // The block at hand.
  Index first_ = 0, count_ = 0;
  const T* mean_ = nullptr;
  const T* grad_ = nullptr;
  double* sums_ = nullptr;
};

template <class T>
Status backward(const Problem& problem, const Backward& io) {
  const WeightLaw law = weight_law<T>(problem, kGradientCutoff);
  if (const Status status = check_singular(problem, law, io); status.failure != Failure::none)
    return status;
  return BackwardPass<T>(problem, io, law).run();
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
