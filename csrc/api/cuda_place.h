// Where the kernels for CUDA devices run. They are only enqueued; nothing waits for them.
#pragma once
#include <cstdint>

namespace pfgm {

// Pointers of a problem are addresses of this device; the caller keeps them alive until the stream
// has come past.
struct CudaPlace {
  int device;
  std::uintptr_t stream;
};

}  // namespace pfgm
