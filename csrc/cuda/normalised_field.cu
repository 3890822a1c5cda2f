// PFGM's normalised field in one launch. It computes in float64: |E|² may overflow or underflow
// float32.
#include <cmath>
#include <cstdint>

#include "api/normalised_field.h"
#include "cuda/rows.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// Values of x − mean.
struct Difference {
  float values[kHeldValues];
};

template <int WIDTH>
__device__ void load(Difference& held, const NormalisedField& field, Index row,
                     const RowTile& tile) {
  load_tile<WIDTH>(held.values, static_cast<const float*>(field.difference) + row * field.stride,
                   tile);
}

__device__ double squared_norm(const Difference& held) {
  double sum = 0;
  for (const double value : held.values) sum += value * value;
  return sum;
}

template <int WIDTH>
__device__ void write(const Difference& held, const NormalisedField& field, Index row,
                      const RowTile& tile, double scale) {
  float out[kHeldValues];
  for (int i = 0; i < kHeldValues; ++i)
    out[i] = static_cast<float>(scale * static_cast<double>(held.values[i]));
  store_tile<WIDTH>(static_cast<float*>(field.field_x) + row * field.field_x_stride, tile, out);
}

// WHOLE: a row is one tile.
template <int WIDTH, bool WHOLE>
__global__ void __launch_bounds__(most_threads(WIDTH, WHOLE))
    normalised_field_kernel(NormalisedField field, int lanes) {
  const RowLane at = row_lane(field.rows, lanes);
  const double z = field.z[at.row];
  Difference held = {};
  double squared = 0;
  if constexpr (WHOLE) {
    load<WIDTH>(held, field, at.row, row_tile(at, 0, field.features));
    squared = squared_norm(held);
  } else {
    for (Index start = 0; start < field.features; start += kHeldValues * lanes) {
      held = {};
      load<WIDTH>(held, field, at.row, row_tile(at, start, field.features));
      squared += squared_norm(held);
    }
  }

  const double scale = row_result<double>(squared, lanes, [&](double sum) {
    const double norm = sqrt(sum + z * z) + field.gamma;
    // The norm is 0 at E = 0 and γ = 0. There any finite scale gives v = 0.
    return -sqrt(static_cast<double>(field.features)) / (norm == 0 ? 1 : norm);
  });

  if constexpr (WHOLE) {
    write<WIDTH>(held, field, at.row, row_tile(at, 0, field.features), scale);
  } else {
    for (Index start = 0; start < field.features; start += kHeldValues * lanes) {
      const RowTile tile = row_tile(at, start, field.features);
      load<WIDTH>(held, field, at.row, tile);
      write<WIDTH>(held, field, at.row, tile, scale);
    }
  }
  if (at.inside && at.lane == 0)
    static_cast<float*>(field.field_z)[at.row] = static_cast<float>(scale * z);
}

}  // namespace

void normalised_field_cuda(const NormalisedField& field, const CudaStream& caller_stream) {
  if (field.rows == 0) return;
  const bool wide = field.features % 4 == 0 && aligned_rows(field.difference, field.stride) &&
                    aligned_rows(field.field_x, field.field_x_stride);
  const RowCut cut = cut_rows(field.rows, field.features, wide ? 4 : 1, true);
  const auto kernel =
      wide ? (cut.whole ? normalised_field_kernel<4, true> : normalised_field_kernel<4, false>)
           : (cut.whole ? normalised_field_kernel<1, true> : normalised_field_kernel<1, false>);
  Stream stream(caller_stream);
  stream.launch({"normalised_field", cut.grid, cut.threads, kSumBytes}, kernel, field, cut.lanes);
}

}  // namespace pfgm
