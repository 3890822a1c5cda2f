// The ODE step on the CPU, compiled once per instruction set (PFGM_ISA).
//
// If a row's norm is needed, it is computed just before the row is updated, so that the second read
// of the row hits the cache. Memory sees each input and each output once. A few long rows are split
// into panels: a first round of tasks computes the panels' norms, a second one updates them.
#include "api/ode_step.h"

#include "cpu/simd.h"

namespace pfgm {
namespace PFGM_ISA {

// Called by cpu/dispatch.cpp.
void ode_step(const OdeStep& step);

namespace {

constexpr Index kMinTaskValues = 1 << 15;  // fewer values in a task do not repay starting a thread
constexpr Index kMaxPanels = 64;           // of one row

// Σ v². A lane adds about eight values before the total in float64 takes over, because 1 − n²
// magnifies an error of the norm.
template <class T>
double squared_norm(const T* v, Index n) {
  constexpr Index lanes = Simd<T>::lanes, block = 32 * lanes;
  const Index whole = n / lanes * lanes;
  double total[lanes] = {};
  Index k = 0;
  while (k < whole) {
    const Index end = smaller(k + block, whole);
    typename Simd<T>::Vector sum[4] = {};
    for (; k + 4 * lanes <= end; k += 4 * lanes)
      for (int i = 0; i < 4; ++i)
        sum[i] += load_unaligned(v + k + i * lanes) * load_unaligned(v + k + i * lanes);
    for (; k < end; k += lanes) sum[0] += load_unaligned(v + k) * load_unaligned(v + k);
    T merged[lanes];
    store_unaligned(merged, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (Index lane = 0; lane < lanes; ++lane) total[lane] += merged[lane];
  }
  double result = 0;
  for (; k < n; ++k) result += static_cast<double>(v[k]) * static_cast<double>(v[k]);
  for (Index lane = 0; lane < lanes; ++lane) result += total[lane];
  return result;
}

// t = −z/v_z with the v_z computed from |v_x|². It does not divide by v_z, which is 0 at z = 0.
double implied_mean_factor(const OdeStep& step, double squared, double z) {
  const double root = std::sqrt(static_cast<double>(step.features)), gamma = step.gamma;
  double n = std::sqrt(squared) / root;
  if (n > kLargestNorm) n = kLargestNorm;  // NaN stays NaN
  double e;
  if (step.exact) {
    const double rest = 1 - n * n;
    e = n * (gamma + std::sqrt(n * n * gamma * gamma + rest * z * z)) / rest;
  } else {
    e = gamma * n / (1 - n);
  }
  return (std::sqrt(e * e + z * z) + gamma) / root;
}

// Factors of one row: next = x_factor x + slope_factor slope + history_factor history, mean = x +
// mean_factor slope.
template <class T>
struct StepFactors {
  T x_factor, slope_factor, history_factor, mean_factor;
};

bool needs_norm(const OdeStep& step, Index row) {
  return step.field_z != nullptr && step.levels[row * step.level_stride] < step.z_exp;
}

template <class T>
StepFactors<T> step_factors(const OdeStep& step, Index row, double squared) {
  const double* level = step.levels + row * step.level_stride;
  const Index next_level = step.level_stride == 0 ? 1 : step.rows;
  const double z = level[0], toward = level[next_level], blend = level[2 * next_level];
  if (step.field_z == nullptr)
    return {static_cast<T>(1 - toward - blend), static_cast<T>(toward), static_cast<T>(blend), 0};
  double mean_factor;
  if (needs_norm(step, row)) {
    mean_factor = implied_mean_factor(step, squared, z);
  } else {
    const double field_z = static_cast<double>(static_cast<const T*>(step.field_z)[row]);
    mean_factor = -z / (field_z > -kSmallestFieldZ ? -kSmallestFieldZ : field_z);
  }
  return {static_cast<T>(1 - blend), static_cast<T>(toward * mean_factor), static_cast<T>(blend),
          static_cast<T>(mean_factor)};
}

// The features of one row, or of a panel of it.
template <class T>
struct Span {
  const T *x, *slope, *history;
  T *next, *mean;
};

template <class T, bool kHistory, bool kMean>
void update_vector(const Span<T>& span, Index k, const StepFactors<T>& factors) {
  const auto x = load_unaligned(span.x + k), slope = load_unaligned(span.slope + k);
  auto next = factors.x_factor * x + factors.slope_factor * slope;
  if (kHistory) next += factors.history_factor * load_unaligned(span.history + k);
  store_unaligned(span.next + k, next);
  if (kMean) store_unaligned(span.mean + k, x + factors.mean_factor * slope);
}

template <class T, bool kHistory, bool kMean>
void update(const Span<T>& span, Index n, const StepFactors<T>& factors) {
  constexpr Index lanes = Simd<T>::lanes;
  Index k = 0;
  for (; k + lanes <= n; k += lanes) update_vector<T, kHistory, kMean>(span, k, factors);
  if (k == n) return;
  // The rest runs the same instructions, so that rounding does not depend on where a row is split.
  const std::size_t bytes = static_cast<std::size_t>(n - k) * sizeof(T);
  T x[lanes] = {}, slope[lanes] = {}, history[lanes] = {}, next[lanes], mean[lanes];
  std::memcpy(x, span.x + k, bytes);
  std::memcpy(slope, span.slope + k, bytes);
  if (kHistory) std::memcpy(history, span.history + k, bytes);
  update_vector<T, kHistory, kMean>({x, slope, history, next, mean}, 0, factors);
  std::memcpy(span.next + k, next, bytes);
  if (kMean) std::memcpy(span.mean + k, mean, bytes);
}

template <class T>
void update(const OdeStep& step, Index row, Index begin, Index count,
            const StepFactors<T>& factors) {
  const auto in = [&](const void* data, Index stride) {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + row * stride + begin;
  };
  const auto out = [&](void* data, Index stride) {
    return data == nullptr ? nullptr : static_cast<T*>(data) + row * stride + begin;
  };
  const Span<T> span = {in(step.x, step.x_stride), in(step.slope, step.slope_stride),
                        in(step.history, step.history_stride), out(step.next, step.next_stride),
                        out(step.mean, step.mean_stride)};
  if (span.history != nullptr) {
    if (span.mean != nullptr)
      update<T, true, true>(span, count, factors);
    else
      update<T, true, false>(span, count, factors);
  } else {
    if (span.mean != nullptr)
      update<T, false, true>(span, count, factors);
    else
      update<T, false, false>(span, count, factors);
  }
}

template <class T>
const T* slope_row(const OdeStep& step, Index row) {
  return static_cast<const T*>(step.slope) + row * step.slope_stride;
}

template <class T>
void step_rows(const OdeStep& step) {
  // Each thread takes one range of rows, as in torch's own operators: the rows are still in the
  // cache of the core that used them last.
  const Index group =
      larger(divide_up(step.rows, step.threads), larger(1, kMinTaskValues / step.features));
  parallel(divide_up(step.rows, group), step.threads, [&](Index task, int) {
    const Index end = smaller((task + 1) * group, step.rows);
    for (Index row = task * group; row < end; ++row) {
      const double squared =
          needs_norm(step, row) ? squared_norm(slope_row<T>(step, row), step.features) : 0;
      update(step, row, 0, step.features, step_factors<T>(step, row, squared));
    }
  });
}

template <class T>
void step_panels(const OdeStep& step, Index panels) {
  const Index width = divide_up(step.features, panels);
  const auto length = [&](Index panel) {
    return smaller(width, larger(0, step.features - panel * width));
  };
  for (Index row = 0; row < step.rows; ++row) {
    double part[kMaxPanels], squared = 0;
    if (needs_norm(step, row)) {
      parallel(panels, step.threads, [&](Index panel, int) {
        part[panel] = squared_norm(slope_row<T>(step, row) + panel * width, length(panel));
      });
      for (Index panel = 0; panel < panels; ++panel) squared += part[panel];
    }
    const StepFactors<T> factors = step_factors<T>(step, row, squared);
    parallel(panels, step.threads,
             [&](Index panel, int) { update(step, row, panel * width, length(panel), factors); });
  }
}

template <class T>
void run(const OdeStep& step) {
  const Index panels = smaller(kMaxPanels, step.features / kMinTaskValues);
  if (step.threads > 1 && step.rows < 4 * step.threads && panels > 1)
    step_panels<T>(step, panels);
  else
    step_rows<T>(step);
}

}  // namespace

void ode_step(const OdeStep& step) {
  step.type == Type::float64 ? run<double>(step) : run<float>(step);
}

}  // namespace PFGM_ISA
}  // namespace pfgm
