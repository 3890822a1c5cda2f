// Where a CUDA kernel runs. Kernels are enqueued; nothing waits for them.
#pragma once
#include <cstdint>

namespace pfgm {

// Pointers passed with a place are addresses on this device. The caller keeps them alive until the
// stream has run the kernels.
struct CudaPlace {
  int device;
  std::uintptr_t stream;
};

}  // namespace pfgm
