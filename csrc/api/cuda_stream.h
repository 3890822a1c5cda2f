// Where a CUDA kernel runs. Kernels are enqueued; nothing waits for them.
#pragma once
#include <cstdint>

namespace pfgm {

// A stream of the caller on a device. Pointers passed with it are addresses on this device. The
// caller keeps them alive until the stream has run the kernels.
struct CudaStream {
  int device;
  std::uintptr_t handle;
};

}  // namespace pfgm
