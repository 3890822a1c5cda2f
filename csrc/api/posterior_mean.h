// Posterior mean of a batch of points over weighted references, and its gradients.
//
// For query x_b (N features), references y_j, r = radius_b:
//     s_j = |x_b − y_j|² + r²,   l_j = −(N + D)/2 log s_j         D finite
//                                l_j = −|x_b − y_j|² / (2 r²)     D = ∞ (radius is σ)
//     logsumexp_b = log Σ_j exp l_j,  p_j = exp(l_j − logsumexp_b),  mean_b = Σ_j p_j y_j
// (PFGM++, arXiv 2302.04265, equation 4 and section 3). l_j is the score of reference j, exp l_j
// its weight. Arguments are raw pointers: the caller, in Python, has checked shapes and types and
// owns all memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "api/cuda_stream.h"

namespace pfgm {

enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, uint8 = 4 };

// x, the mean and their gradients have one type, float32 or float64, in which the kernels compute.
// Features are contiguous. A stride is the distance between rows, in elements. A uint8 value u
// means u/127.5 − 1.
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
  const void* sketch = nullptr;  // summary of the references, in the type of x; may be null
  // References of all calls that continue one result, see below; 0 if it takes one call.
  std::int64_t all_references = 0;
  // Whether the forward pass returns x − mean in place of the mean. Near the mean it has digits
  // that a rounded mean has lost. `sums` are then of y_j − x. Backward passes ignore it.
  bool difference = false;
};

// Memory for what a forward pass keeps for its backward pass, on an 8-byte boundary on the CPU
// (cpu/kept_distances.h), on a 16-byte boundary on CUDA devices. Null if nothing is kept.
struct Kept {
  void* at = nullptr;
  std::int64_t bytes = 0;
};

// On the CPU, a null result is not written, and a result may take several calls, for references
// that are not in memory at once. With `sums`, a call adds its references to those of the calls
// before: `sums`, `nearest` and `total` begin as 0, infinity and 0. The last call, which has a
// mean, may be without references. If each call but the last has a multiple of chunk_rows()
// references, the result is to the bit that of one call.
struct Forward {
  void* mean;              // (queries, features), or x − mean
  double* logsumexp;       // (queries)
  double* nearest;         // (queries): squared distance of the nearest reference
  double* total;           // (queries): Σ_j exp(l_j − l of the nearest reference)
  double* sums = nullptr;  // (queries, features): Σ_j exp(l_j − l of the nearest reference) y_j
  Kept kept = {};
};

// A null gradient is neither read nor written. On the CPU, gradients of x and radius may take
// several calls in the same way. They add to `sums` (null if x needs no gradient) and `moments`,
// which begin as 0. The last call, which has the gradients, may be without references. `pulls` must
// be complete before: it begins as 0, and if any_ill_conditioned(), posterior_mean_pulls() adds
// each part of the references to it. cpu/gradients.h defines c_j and the moment,
// cpu/ill_conditioned_rows.h ill-conditioned rows.
struct Backward {
  const void* grad_mean;         // (queries, features)
  const double* grad_logsumexp;  // (queries)
  const void* mean;              // (queries, features), from the forward pass
  const double* nearest;         // (queries), from the forward pass
  const double* total;           // (queries), from the forward pass
  void* grad_x;                  // (queries, features)
  double* grad_radius;           // (queries)
  void* grad_y;                  // (references, features)
  double* sums = nullptr;        // (queries, features): Σ_j c_j (y_j − mean)
  double* moments = nullptr;     // (queries)
  double* pulls = nullptr;       // (queries, 2): Σ_j p_j and Σ_j p_j G·(y_j − mean)
  Kept kept = {};                // from the forward pass; on the CPU its used part
};

enum class Failure : int {
  none = 0,
  radius = 1,    // a radius is negative, not finite or too large
  value = 2,     // a distance is not finite, even in float64
  singular = 3,  // logsumexp is infinite and has no gradient
  memory = 4,
  sketch = 5,  // the sketch is that of other references
  kept = 6,    // what was kept is of another problem
  range = 7,   // a reference that counts holds a value that the type of x cannot hold
  // A query and a reference that differ are so close, at so small a radius, that the square of
  // their distance loses digits even in float64.
  underflow = 8,
};

struct Status {
  Failure failure = Failure::none;
  std::int64_t row = -1;  // the first query that failed
};

// A sketch is a summary of references, reusable while they do not change (cpu/line_screen.h,
// cpu/byte_screen.h). sketch_bytes is its size; 0 if the kernels have no use for a sketch. `sketch`
// writes it to memory on a 64-byte boundary. Both ignore the queries and radius of their problem.
// kept_bytes is the size of the memory that a forward pass may need to keep all it can; 0 if it
// keeps nothing. The first 8 bytes then say how many bytes it used; 0 if it kept nothing.
struct Kernels {
  const char* isa;
  Status (*posterior_mean)(const Problem&, const Forward&);
  Status (*posterior_mean_backward)(const Problem&, const Backward&);
  Status (*posterior_mean_pulls)(const Problem&, const Backward&);
  bool (*any_ill_conditioned)(const Problem&, const Backward&);
  std::int64_t (*chunk_rows)(std::int64_t features, Type reference_type);
  std::int64_t (*sketch_bytes)(const Problem&);
  Status (*sketch)(const Problem&, void* out);
  std::int64_t (*kept_bytes)(const Problem&);
};

// The kernels for the best instruction set of this machine, or for the one that PFGM_CPU_ISA names.
// Throws std::invalid_argument if that one is unknown or cannot run here.
const Kernels& cpu_kernels();

// The same on a CUDA device. x, the mean and their gradients are float32; references are float32,
// bfloat16, float16 or uint8. Values are not checked: a value that is not finite gives NaN. The
// workspace must have at least posterior_mean_workspace_cuda() bytes, where `kept` is the number of
// bytes that the pass keeps or takes from the forward pass. Throws std::runtime_error if the device
// refuses a launch, std::invalid_argument if what is kept has the size of another problem.
//
// posterior_mean_kept_cuda() is the number of bytes that a forward pass keeps if it is given the
// memory: all squared distances, in float64. It is 0 if the backward pass takes several blocks or
// chunks. With what is kept the backward pass has the same results to the bit.
struct CudaWorkspace {
  void* at = nullptr;
  std::size_t bytes = 0;
};
std::int64_t posterior_mean_kept_cuda(const Problem&);
std::size_t posterior_mean_workspace_cuda(const Problem&, const CudaStream&, bool backward,
                                          std::int64_t kept = 0);
void posterior_mean_cuda(const Problem&, const Forward&, const CudaStream&, const CudaWorkspace&);
void posterior_mean_backward_cuda(const Problem&, const Backward&, const CudaStream&,
                                  const CudaWorkspace&);

// Why a device cannot run the kernels of this build; empty if it can. The driver may be older than
// the runtime, or the build may hold no code for the device.
std::string cuda_problem(int device);

// Limits of the blocks and chunks that a problem is split into on a CUDA device. They bound the
// workspace. Tests lower them.
struct CudaLimits {
  // Queries × references. A pair takes 12 bytes, in the backward pass 24: 192 and 384 MiB. Of a
  // quarter as many 8 bytes each may be kept from the forward pass: 32 MiB.
  std::int64_t pairs = 1 << 24;
  std::int64_t parts = 3 << 22;       // values in sums of parts of a chunk or of features
  std::int64_t queries = 4096;        // in a block
  std::int64_t references = 1 << 16;  // in a chunk
  std::int64_t halved = 1 << 20;      // of all references, where sums have weights in halves
};
void limit_cuda(const CudaLimits& to);

}  // namespace pfgm
