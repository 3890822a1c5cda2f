// The ODE step in one launch. Factors are computed in float64, once per row. Values are combined in
// float32 by explicit fmaf, so that the result does not depend on how rows are split.
//
// An output may be an input. Each thread reads what it overwrites before it writes, and other
// threads read it only for the norm, before a barrier.
#include <cmath>
#include <cstdint>

#include "api/ode_step.h"
#include "cuda/rows.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

struct Levels {
  double z, toward, blend;
};

// The factors of x, slope and history in the next row, and of slope in mean = x + mean_factor ·
// slope.
struct StepFactors {
  float x, slope, history, mean_factor;
};

// t = −z/v_z with the v_z computed from |v_x|². It does not divide by v_z, which is 0 at z = 0.
__device__ double implied_mean_factor(const OdeStep& step, double squared, double z) {
  const double root = sqrt(static_cast<double>(step.features)), gamma = step.gamma;
  double n = sqrt(squared) / root;
  if (n > kLargestNorm) n = kLargestNorm;  // NaN stays NaN
  double e;
  if (step.exact) {
    const double rest = 1 - n * n;
    e = n * (gamma + sqrt(n * n * gamma * gamma + rest * z * z)) / rest;
  } else {
    e = gamma * n / (1 - n);
  }
  return (sqrt(e * e + z * z) + gamma) / root;
}

__device__ StepFactors step_factors(const OdeStep& step, Index row, const Levels& level,
                                    double squared) {
  if (step.field_z == nullptr)
    return {static_cast<float>(1 - level.toward - level.blend), static_cast<float>(level.toward),
            static_cast<float>(level.blend), 0};
  double mean_factor;
  if (level.z < step.z_exp) {
    mean_factor = implied_mean_factor(step, squared, level.z);
  } else {
    const double field_z = static_cast<const float*>(step.field_z)[row];
    mean_factor = -level.z / (field_z > -kSmallestFieldZ ? -kSmallestFieldZ : field_z);
  }
  return {static_cast<float>(1 - level.blend), static_cast<float>(level.toward * mean_factor),
          static_cast<float>(level.blend), static_cast<float>(mean_factor)};
}

__device__ const float* row_of(const void* data, Index row, Index stride) {
  return static_cast<const float*>(data) + row * stride;
}

__device__ float* row_of(void* data, Index row, Index stride) {
  return static_cast<float*>(data) + row * stride;
}

struct Held {
  float x[kHeldValues], slope[kHeldValues], history[kHeldValues];
};

template <int WIDTH>
__device__ void load(Held& held, const OdeStep& step, Index row, const RowTile& tile) {
  load_tile<WIDTH>(held.slope, row_of(step.slope, row, step.slope_stride), tile);
  load_tile<WIDTH>(held.x, row_of(step.x, row, step.x_stride), tile);
  if (step.history != nullptr)
    load_tile<WIDTH>(held.history, row_of(step.history, row, step.history_stride), tile);
}

template <int WIDTH>
__device__ void write(const Held& held, const OdeStep& step, Index row, const RowTile& tile,
                      const StepFactors& factors) {
  float out[kHeldValues];
  for (int i = 0; i < kHeldValues; ++i)
    out[i] = fmaf(factors.slope, held.slope[i], factors.x * held.x[i]);
  if (step.history != nullptr)
    for (int i = 0; i < kHeldValues; ++i) out[i] = fmaf(factors.history, held.history[i], out[i]);
  store_tile<WIDTH>(row_of(step.next, row, step.next_stride), tile, out);
  if (step.mean == nullptr) return;
  for (int i = 0; i < kHeldValues; ++i)
    out[i] = fmaf(factors.mean_factor, held.slope[i], held.x[i]);
  store_tile<WIDTH>(row_of(step.mean, row, step.mean_stride), tile, out);
}

__device__ double squared_norm(const float (&values)[kHeldValues]) {
  double sum = 0;
  for (int i = 0; i < kHeldValues; ++i) {
    const double v = values[i];
    sum += v * v;
  }
  return sum;
}

// One lane's part of |slope|², for a row that is read twice.
template <int WIDTH>
__device__ double squared_norm(const OdeStep& step, const RowLane& at) {
  double sum = 0;
  for (Index start = 0; start < step.features; start += kHeldValues * at.lanes) {
    float slope[kHeldValues] = {};
    load_tile<WIDTH>(slope, row_of(step.slope, at.row, step.slope_stride),
                     row_tile(at, start, step.features));
    sum += squared_norm(slope);
  }
  return sum;
}

// `common` holds the levels if all rows share them. `summed` says whether any row may need its
// norm. WHOLE: a row, or a panel of it, is one tile.
template <int WIDTH, bool WHOLE>
__global__ void __launch_bounds__(most_threads(WIDTH, WHOLE))
    ode_step_kernel(OdeStep step, Levels common, bool summed, int lanes) {
  const RowLane at = row_lane(step.rows, lanes);
  Levels level = common;
  if (step.level_stride != 0)
    level = {step.levels[at.row], step.levels[step.rows + at.row],
             step.levels[2 * step.rows + at.row]};
  const bool needs_norm = summed && level.z < step.z_exp;

  Held held = {};
  const Index first = WHOLE ? static_cast<Index>(blockIdx.y) * kHeldValues * lanes : 0;
  const RowTile tile = row_tile(at, first, step.features);
  double squared = 0;
  if constexpr (WHOLE) {
    load<WIDTH>(held, step, at.row, tile);
    if (needs_norm) squared = squared_norm(held.slope);
  } else {
    if (needs_norm) squared = squared_norm<WIDTH>(step, at);
  }
  const StepFactors factors = row_result<StepFactors>(squared, summed ? lanes : 1, [&](double sum) {
    return step_factors(step, at.row, level, sum);
  });

  if constexpr (WHOLE) {
    write<WIDTH>(held, step, at.row, tile, factors);
  } else {
    for (Index start = 0; start < step.features; start += kHeldValues * lanes) {
      const RowTile turn = row_tile(at, start, step.features);
      load<WIDTH>(held, step, at.row, turn);
      write<WIDTH>(held, step, at.row, turn, factors);
    }
  }
}

}  // namespace

void ode_step_cuda(const OdeStep& step, const CudaStream& caller_stream) {
  if (step.rows == 0) return;
  const bool by_row = step.level_stride != 0;
  Levels common = {};
  if (!by_row) common = {step.levels[0], step.levels[1], step.levels[2]};
  const bool summed = step.field_z != nullptr && (by_row || common.z < step.z_exp);
  const bool wide = step.features % 4 == 0 && aligned_rows(step.x, step.x_stride) &&
                    aligned_rows(step.slope, step.slope_stride) &&
                    aligned_rows(step.history, step.history_stride) &&
                    aligned_rows(step.next, step.next_stride) &&
                    aligned_rows(step.mean, step.mean_stride);
  const RowCut cut = cut_rows(step.rows, step.features, wide ? 4 : 1, summed);
  const auto kernel = wide ? (cut.whole ? ode_step_kernel<4, true> : ode_step_kernel<4, false>)
                           : (cut.whole ? ode_step_kernel<1, true> : ode_step_kernel<1, false>);
  Stream stream(caller_stream);
  stream.launch({"ode_step", cut.grid, cut.threads, kSumBytes}, kernel, step, common, summed,
                cut.lanes);
}

}  // namespace pfgm
