// Checked launches on a stream of a device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/cuda_place.h"
#include "cuda/intrinsics.h"

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

#ifdef PFGM_CUDA_SHIM
}  // namespace pfgm
#include "host_shim/stream.h"
#else

// A stream. Its device is current while this object lives, for torch as well, because runtimes
// share the thread's context. Launching may load a kernel; the relaxed capture mode allows this
// while a CUDA graph is captured.
class Stream {
 public:
  explicit Stream(const CudaPlace& place)
      : stream_(reinterpret_cast<cudaStream_t>(place.stream)), device_(place.device) {
    check("cudaGetDevice", cudaGetDevice(&before_));
    if (before_ != device_) check("cudaSetDevice", cudaSetDevice(device_));
    check("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  ~Stream() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    if (before_ != device_) cudaSetDevice(before_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // The architecture that the kernel's code was compiled for, 90 for sm_90. It is older than the
  // device if the build has no code for the device's own architecture.
  template <class... Parameters>
  int architecture(const char* name, void (*kernel)(Parameters...)) const {
    cudaFuncAttributes attributes;
    check(name, cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion;
  }

  template <class... Parameters, class... Arguments>
  void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
    prepare(shape, kernel);
    const cudaLaunchConfig_t config = configuration(shape);
    check(shape.kernel, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

 private:
  static void check(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps it; a later launch must not report it
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  template <class Kernel>
  static void prepare(const Launch& shape, Kernel* kernel) {
    if (shape.shared > 48 * 1024)
      check(shape.kernel, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shape.shared)));
  }

  cudaLaunchConfig_t configuration(const Launch& shape) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid.x), static_cast<unsigned>(shape.grid.y),
                          static_cast<unsigned>(shape.grid.z));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream_;
    return config;
  }

  cudaStream_t stream_;
  int device_, before_ = 0;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace pfgm
#endif
