// Checked launches on a stream of a device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/cuda_stream.h"
#include "cuda/current_device.h"
#include "cuda/intrinsics.h"
#include "cuda/runtime.h"

namespace pfgm {

struct Grid {
  std::int64_t x, y = 1, z = 1;
};

struct Launch {
  const char* kernel;      // for errors
  Grid grid;               // in blocks; an empty grid is not launched
  int threads;             // in a block
  std::size_t shared = 0;  // bytes of dynamic shared memory
};

// A stream. Its device is current while this object lives. Launching may load a kernel; the relaxed
// capture mode allows this while a CUDA graph is captured.
class Stream {
 public:
  explicit Stream(const CudaStream& caller_stream)
      : current_(caller_stream.device),
        stream_(reinterpret_cast<cudaStream_t>(caller_stream.handle)),
        device_(caller_stream.device) {
    capturing_ = is_capturing(stream_);
    check_runtime("cudaThreadExchangeStreamCaptureMode",
                  cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  ~Stream() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int multiprocessors() const { return multiprocessors_of(device_); }
  // See check_code.
  template <class... Parameters>
  void check(const char* name, void (*kernel)(Parameters...)) const {
    check_code(name, reinterpret_cast<const void*>(kernel));
  }
  int major() const { return attribute_of<cudaDevAttrComputeCapabilityMajor>(device_); }

  template <class... Parameters, class... Arguments>
  void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
    if (shape.shared > kUnasked)
      allow_shared_memory(shape.kernel, reinterpret_cast<const void*>(kernel), device_,
                          shape.shared);
    const cudaLaunchConfig_t config = configuration(shape);
    check_runtime(shape.kernel,
                  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    if (checks_launches() && !capturing_)
      check_runtime(shape.kernel, cudaStreamSynchronize(stream_));
  }

 private:
  static constexpr std::size_t kUnasked = 48 << 10;  // bytes that a kernel may have without asking

  cudaLaunchConfig_t configuration(const Launch& shape) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid.x), static_cast<unsigned>(shape.grid.y),
                          static_cast<unsigned>(shape.grid.z));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream_;
    return config;
  }

  const CurrentDevice current_;
  const cudaStream_t stream_;
  const int device_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool capturing_ = false;
};

}  // namespace pfgm
