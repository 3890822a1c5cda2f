// Posterior mean of a batch of points over weighted references, and its gradients.
//
// For query x_b (N features), references y_j, r = radius_b:
//     s_j = |x_b − y_j|² + r²,   l_j = −(N + D)/2 log s_j         D finite
//                                l_j = −|x_b − y_j|² / (2 r²)     D = ∞ (radius is σ)
//     logsumexp_b = log Σ_j exp l_j,  p_j = exp(l_j − logsumexp_b),  mean_b = Σ_j p_j y_j
// (PFGM++, arXiv 2302.04265, equation 4 and section 3). Raw pointers only: the caller, in Python,
// has checked shapes and types and owns all memory.
#pragma once
#include <cstdint>

namespace pfgm {

enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, uint8 = 4 };

// x, mean and their gradients share one type (float32 or float64), the type computed in. Features
// are contiguous; a stride is the distance between rows, in elements. uint8 means u/127.5 − 1.
struct Problem {
  Type type;
  Type reference_type;
  std::int64_t queries, references, features;
  const void* x;
  std::int64_t x_stride;
  const void* y;
  std::int64_t y_stride;
  const double* radius;  // (queries)
  double dimensions;     // D, infinity for diffusion
  int threads;
};

struct Forward {
  void* mean;         // (queries, features)
  double* logsumexp;  // (queries)
  double* nearest;    // (queries): squared distance of the nearest reference
  double* total;      // (queries): Σ_j exp(l_j − l of the nearest)
};

// A null gradient is neither read nor written.
struct Backward {
  const void* grad_mean;         // (queries, features)
  const double* grad_logsumexp;  // (queries)
  const void* mean;              // (queries, features), from the forward pass, and so are
  const double* nearest;         // (queries)
  const double* total;           // (queries)
  void* grad_x;                  // (queries, features)
  double* grad_radius;           // (queries)
  void* grad_y;                  // (references, features)
};

enum class Failure : int {
  none = 0,
  radius = 1,      // radius is negative or not finite
  value = 2,       // a distance is not finite, even in float64
  singular = 3,    // logsumexp has no gradient (it is infinite)
  memory = 4,
};

struct Status {
  Failure failure = Failure::none;
  std::int64_t row = -1;  // first query that failed
};

struct Kernels {
  const char* isa;
  Status (*posterior_mean)(const Problem&, const Forward&);
  Status (*posterior_mean_backward)(const Problem&, const Backward&);
};

// The kernels for the best instruction set of this machine, or for the one PFGM_CPU_ISA names;
// throws std::invalid_argument if that one is unknown or cannot run here.
const Kernels& cpu_kernels();

}  // namespace pfgm
