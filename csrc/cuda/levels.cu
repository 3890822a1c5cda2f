// Levels of rows in float64. Values stay on the device, so nothing waits for it.
#include "api/levels.h"
#include "cuda/launch.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

constexpr int kLevelThreads = 128;

Launch one_thread_a_row(const char* kernel, Index rows) {
  return {kernel, {(rows + kLevelThreads - 1) / kLevelThreads}, kLevelThreads};
}

__device__ Index this_row() {
  return static_cast<Index>(blockIdx.x) * kLevelThreads + static_cast<Index>(threadIdx.x);
}

__device__ double level_of(const Level& level, Index row) {
  if (level.values == nullptr) return level.number;
  const Index at = row * level.stride;
  if (level.type == Type::float64) return static_cast<const double*>(level.values)[at];
  return static_cast<double>(static_cast<const float*>(level.values)[at]);
}

__global__ void __launch_bounds__(kLevelThreads)
    expand_level(const Level level, double factor, Index rows, double* out) {
  const Index row = this_row();
  if (row < rows) out[row] = level_of(level, row) * factor;
}

// out (3, rows): z, toward and blend of StepLevels.
__global__ void __launch_bounds__(kLevelThreads)
    find_step_levels(Method method, const Level z, const Level z_next, const Level z_previous,
                     Index rows, double* out) {
  const Index row = this_row();
  if (row >= rows) return;
  const StepLevels result =
      step_levels(method, level_of(z, row), level_of(z_next, row), level_of(z_previous, row));
  out[row] = result.z;
  out[rows + row] = result.toward;
  out[2 * rows + row] = result.blend;
}

}  // namespace

void expand_level_cuda(const Level& level, double factor, Index rows, double* out,
                       const CudaStream& caller_stream) {
  const Stream stream(caller_stream);
  stream.launch(one_thread_a_row("expand_level", rows), expand_level, level, factor, rows, out);
}

void step_levels_cuda(Method method, const Level& z, const Level& z_next, const Level& z_previous,
                      Index rows, double* out, const CudaStream& caller_stream) {
  const Stream stream(caller_stream);
  stream.launch(one_thread_a_row("find_step_levels", rows), find_step_levels, method, z, z_next,
                z_previous, rows, out);
}

}  // namespace pfgm
