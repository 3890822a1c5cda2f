// One step of the flow's ODE dx/dz = (x − mean)/z, from a network's output to the next point.
//
// Every solver takes the same kind of step: it combines the point x, its posterior mean and one
// more point, the history, with two weights per row:
//     next = x + toward (mean − x) + blend (history − x)
// A denoiser gives the mean itself. A field (v_x, v_z) gives mean = x + t v_x with t = −z/v_z.
// Where z < z_exp, v_z is computed from |v_x| (PFGM, arXiv 2209.11178, appendix B.2.3). With N
// features and n = |v_x|/√N, clamped below 1,
//     e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²)       exact
//     e_x = γ n / (1 − n)                                  published
//     t = (√(e_x² + z²) + γ)/√N
// Elsewhere v_z is clamped below 0. Arguments are raw pointers: the caller, in Python, has checked
// shapes and types and owns all memory.
#pragma once
#include <cstdint>

#include "api/cuda_stream.h"
#include "api/posterior_mean.h"

namespace pfgm {

constexpr double kSmallestFieldZ = 1e-5;   // v_z is clamped to at most −kSmallestFieldZ
constexpr double kLargestNorm = 1 - 1e-6;  // |v_x|/√N is below 1 for a field, not for any network

// All tensors have one type, float32 or float64. Features are contiguous. A stride is the distance
// between rows, in elements. An output may be an input itself, but must not overlap one otherwise.
struct OdeStep {
  Type type;
  std::int64_t rows, features;
  const void* x;
  std::int64_t x_stride;
  const void* slope;  // v_x, or the mean
  std::int64_t slope_stride;
  const void* field_z;  // v_z, (rows); null if slope is the mean
  const void* history;  // may be null
  std::int64_t history_stride;
  const double* levels;       // z, toward and blend: (3), or (3, rows)
  std::int64_t level_stride;  // between rows: 0 or 1
  double gamma, z_exp;
  bool exact;  // the exact formula for e_x, else the published one
  void* next;
  std::int64_t next_stride;
  void* mean;  // x + t v_x; may be null
  std::int64_t mean_stride;
  int threads;
};

// Runs the kernel for the instruction set that cpu_kernels() chooses.
void ode_step(const OdeStep& step);

// Enqueues the CUDA kernel. All tensors are float32. Where level_stride is 0, levels is host memory
// and is read before this returns; otherwise it is device memory, like all other pointers.
void ode_step_cuda(const OdeStep& step, const CudaStream& stream);

}  // namespace pfgm
