// Levels (z, r or sigma) of the rows of a batch, and what a step of the ODE computes from them.
#pragma once
#include <cmath>
#include <cstdint>

#include "api/cuda_stream.h"
#include "api/posterior_mean.h"

#ifdef __CUDACC__
#define PFGM_HOST_AND_DEVICE __host__ __device__
#else
#define PFGM_HOST_AND_DEVICE
#endif

namespace pfgm {

// One level for each row: a number for all of them, or values in float32 or float64.
struct Level {
  double number;
  const void* values;  // null where the level is a number
  Type type;
  std::int64_t stride;  // between rows, in elements; 0 if they share one value
};

enum class Method : int { euler = 0, heun = 1, multistep = 2 };

// z, toward and blend of api/ode_step.h.
struct StepLevels {
  double z, toward, blend;
};

// As in pfgm/functional/steps.py. Only multistep uses z_previous.
PFGM_HOST_AND_DEVICE inline StepLevels step_levels(Method method, double z, double z_next,
                                                   double z_previous) {
  if (method == Method::euler) return {z, (z - z_next) / z, 0};
  if (method == Method::heun) return {z_next, (z - z_next) / (2 * z_next), 0.5};
  const double w = std::log(z / z_next) / (2 * std::log(z_previous / z));
  const double length = (z - z_next) / z;
  return {z, length * (1 + w), -length * w};
}

// Enqueue CUDA kernels. All values are device memory and none is checked.
// out[row] = level × factor
void expand_level_cuda(const Level& level, double factor, std::int64_t rows, double* out,
                       const CudaStream& stream);
// z, toward and blend of each row, (3, rows), as OdeStep takes them.
void step_levels_cuda(Method method, const Level& z, const Level& z_next, const Level& z_previous,
                      std::int64_t rows, double* out, const CudaStream& stream);

}  // namespace pfgm
