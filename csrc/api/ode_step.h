// One step of the flow's ODE dx/dz = (x − mean)/z, from a network's output to the next point.
//
// Every solver's step is the same combination of the point x, its posterior mean and one more
// point, the history, with two weights a row:
//     next = x + toward (mean − x) + blend (history − x)
// A denoiser gives the mean itself. A field (v_x, v_z) gives mean = x + t v_x, t = −z/v_z; where
// z < z_exp, v_z is what v_x implies (PFGM, arXiv 2209.11178, appendix B.2.3). With N features and
// n = |v_x|/√N, kept below 1,
//     e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²)       exact
//     e_x = γ n / (1 − n)                                  published
//     t = (√(e_x² + z²) + γ)/√N
// and elsewhere v_z is kept negative. Raw pointers only: the caller, in Python, has checked shapes
// and types and owns all memory.
#pragma once
#include <cstdint>

#include "api/cuda_place.h"
#include "api/posterior_mean.h"

namespace pfgm {

// All tensors share one type, float32 or float64; features are contiguous and a stride is the
// distance between rows, in elements. An output may be an input itself, but not overlap it.
struct OdeStep {
  Type type;
  std::int64_t rows, features;
  const void* x;
  std::int64_t x_stride;
  const void* slope;  // v_x, or the mean
  std::int64_t slope_stride;
  const void* field_z;  // v_z, (rows); null: slope is the mean
  const void* history;  // or null
  std::int64_t history_stride;
  const double* levels;       // z, toward and blend: (3), or (3, rows)
  std::int64_t level_stride;  // between rows: 0 or 1
  double gamma, z_exp;
  bool exact;  // or published
  void* next;
  std::int64_t next_stride;
  void* mean;  // x + t v_x; or null
  std::int64_t mean_stride;
  int threads;
};

// Runs the kernel that cpu_kernels() would choose.
void ode_step(const OdeStep& step);

// Enqueues the CUDA kernel, which computes in float32 only. Where level_stride is 0, levels is host
// memory, read before this returns; elsewhere it is the device's, as all other pointers are.
void ode_step_cuda(const OdeStep& step, const CudaPlace& place);

}  // namespace pfgm
