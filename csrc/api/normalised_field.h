// PFGM's normalised field from x − mean and z, and its gradients:
//     v = −√N E/(|E| + γ),   E = (x − mean, z),   and 0 at E = 0
// Arguments are raw pointers, as in ode_step.h.
#pragma once
#include <cstdint>

#include "api/cuda_stream.h"
#include "api/posterior_mean.h"

namespace pfgm {

// All tensors but z have one type, float32 or float64. Features are contiguous. A stride is the
// distance between rows, in elements. field_x may be the difference itself, but must not overlap
// it otherwise.
struct NormalisedField {
  Type type;
  std::int64_t rows, features;
  const void* difference;  // x − mean
  std::int64_t stride;
  const double* z;  // (rows)
  double gamma;
  void* field_x;
  std::int64_t field_x_stride;
  void* field_z;  // (rows)
  int threads;
};

// Gradients of a function of the field. Rows of grad_difference are `features` apart.
struct NormalisedFieldBackward {
  const void* grad_field_x;
  std::int64_t grad_field_x_stride;
  const void* grad_field_z;  // (rows)
  void* grad_difference;
  double* grad_z;  // (rows)
};

// Run the kernels for the instruction set that cpu_kernels() chooses. The second does not use
// field_x and field_z of its first argument.
void normalised_field(const NormalisedField& field);
void normalised_field_backward(const NormalisedField& field, const NormalisedFieldBackward& io);

// Enqueues the CUDA kernel. All tensors but z are float32.
void normalised_field_cuda(const NormalisedField& field, const CudaStream& stream);

}  // namespace pfgm
