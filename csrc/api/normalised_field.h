// PFGM's normalised field from x, z and the posterior mean:
//     v = −√N E/(|E| + γ),   E = (x − mean, z),   and 0 at E = 0
// Arguments are raw pointers, as in ode_step.h.
#pragma once
#include <cstdint>

#include "api/cuda_place.h"

namespace pfgm {

// Features are contiguous. A stride is the distance between rows, in elements. field_x may be x or
// mean itself, but must not overlap them otherwise.
struct NormalisedField {
  std::int64_t rows, features;
  const float* x;
  std::int64_t x_stride;
  const double* z;  // (rows)
  const float* mean;
  std::int64_t mean_stride;
  double gamma;
  float* field_x;
  std::int64_t field_x_stride;
  float* field_z;  // (rows)
};

void normalised_field_cuda(const NormalisedField& field, const CudaPlace& place);

}  // namespace pfgm
