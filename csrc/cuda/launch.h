// Checked launches on a stream of a device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/cuda_place.h"
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
  explicit Stream(const CudaPlace& place)
      : current_(place.device),
        stream_(reinterpret_cast<cudaStream_t>(place.stream)),
        device_(place.device) {
    capturing_ = is_capturing(stream_);
    check_runtime("cudaThreadExchangeStreamCaptureMode",
                  cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  ~Stream() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int multiprocessors() const { return multiprocessors_of(device_); }
  int major() const { return attribute_of<cudaDevAttrComputeCapabilityMajor>(device_); }
  int l2_cache() const { return attribute_of<cudaDevAttrL2CacheSize>(device_); }  // bytes
  // See architecture_of.
  template <class... Parameters>
  int architecture(const char* name, void (*kernel)(Parameters...)) const {
    return architecture_of(name, reinterpret_cast<const void*>(kernel));
  }
  // See has_warpgroups. `kernel` may be any kernel.
  template <class... Parameters>
  bool warpgroups(void (*kernel)(Parameters...)) const {
    return has_warpgroups("warpgroups", reinterpret_cast<const void*>(kernel), device_);
  }
  // See is_geforce. `kernel` may be any kernel.
  template <class... Parameters>
  bool geforce(void (*kernel)(Parameters...)) const {
    return is_geforce("geforce", reinterpret_cast<const void*>(kernel), device_);
  }

  template <class... Parameters, class... Arguments>
  void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
    const void* const code = reinterpret_cast<const void*>(kernel);
    if (shape.shared > kUnasked) allow_shared_memory(shape.kernel, code, device_, shape.shared);
    cudaLaunchConfig_t config = configuration(shape);
    cudaLaunchAttribute overlap = overlapping();
    if ((!capturing_ || may_overlap_in_graphs()) && may_overlap(shape.kernel, code, device_))
      config.attrs = &overlap, config.numAttrs = 1;
    check_runtime(shape.kernel,
                  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    if (checks_launches() && !capturing_)
      check_runtime(shape.kernel, cudaStreamSynchronize(stream_));
  }

 private:
  static constexpr std::size_t kUnasked = 48 << 10;  // bytes that every kernel may have

  cudaLaunchConfig_t configuration(const Launch& shape) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid.x), static_cast<unsigned>(shape.grid.y),
                          static_cast<unsigned>(shape.grid.z));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream_;
    return config;
  }

  // The launch may start before the one before it in the stream has ended, if that is of a kernel:
  // when all its blocks have let it (let_next_launch_start) or have ended. The launch waits for the
  // rest, and for what was written, itself. In a graph that is captured the two kernels get a
  // programmatic edge. Nothing else changes: copies, events and launches of others that follow wait
  // for the end of this one.
  static cudaLaunchAttribute overlapping() {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
  }

  const CurrentDevice current_;
  const cudaStream_t stream_;
  const int device_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool capturing_ = false;
};

}  // namespace pfgm
