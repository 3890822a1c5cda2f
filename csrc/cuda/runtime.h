// Errors of the CUDA runtime, and what it need be asked or told only once.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pfgm {

inline void check_runtime(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps it; a later launch must not report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline bool environment_is(const char* name, const char* value) {
  const char* const set = std::getenv(name);
  return set != nullptr && std::strcmp(set, value) == 0;
}

// A number of each device that is not negative, asked for once.
class DeviceNumber {
 public:
  template <class Ask>
  int get(int device, const Ask& ask) {
    const bool kept = device >= 0 && device < static_cast<int>(known_.size());
    int value = kept ? known_[device].load(std::memory_order_relaxed) - 1 : -1;
    if (value >= 0) return value;
    value = ask();
    if (kept) known_[device].store(value + 1, std::memory_order_relaxed);
    return value;
  }

 private:
  std::array<std::atomic<int>, 64> known_{};  // one more; 0 where it was not asked for yet
};

template <cudaDeviceAttr ATTRIBUTE>
inline int attribute_of(int device) {
  static DeviceNumber known;
  return known.get(device, [=] {
    int value = 0;
    check_runtime("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
    return value;
  });
}

inline int multiprocessors_of(int device) {
  return attribute_of<cudaDevAttrMultiProcessorCount>(device);
}

// The architecture that a kernel's code on the current device was compiled for, 90 for sm_90. It is
// older than the device if the build has no code for the device's own architecture.
inline int architecture_of(const char* name, const void* kernel) {
  cudaFuncAttributes attributes;
  check_runtime(name, cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion;
}

// Whether kernels may multiply with warpgroups: the device, which is the current one, runs a
// kernel's code for sm_90a. In other code these kernels trap. A driver that is told to compile
// older code itself takes that in place of the code for the device.
inline bool has_warpgroups([[maybe_unused]] const char* name, [[maybe_unused]] const void* kernel,
                           [[maybe_unused]] int device) {
#ifdef PFGM_WARPGROUPS
  static DeviceNumber known;
  return known.get(device, [=] {
    if (attribute_of<cudaDevAttrComputeCapabilityMajor>(device) != 9) return 0;
    return architecture_of(name, kernel) == 90 ? 1 : 0;
  }) != 0;
#else
  return false;
#endif
}

// Whether a device has a GeForce card's chip, and a kernel's code on it, which is the current
// device, has instances for these (`is_unused` in cuda/warp_products.h). Their matrix units
// multiply twice as fast where they add up in float16, and float64 runs at 1/64 of the rate of
// float32.
inline bool is_geforce(const char* name, const void* kernel, int device) {
  static DeviceNumber known;
  return known.get(device, [=] {
    const int major = attribute_of<cudaDevAttrComputeCapabilityMajor>(device);
    const int minor = attribute_of<cudaDevAttrComputeCapabilityMinor>(device);
    if (major < 12 && !(major == 8 && (minor == 6 || minor == 9))) return 0;
    const int architecture = architecture_of(name, kernel);
    return architecture < 90 || architecture >= 120 ? 1 : 0;
  }) != 0;
}

// Whether kernels may start before the launch before them has ended, because their code waits for
// it (wait_for_earlier_launches) and the driver can capture such launches in a graph. The device
// alone does not decide it: code for sm_80 never waits, also where the driver compiles it for a
// newer device. All kernels of a build have code for the same architectures, so the first one that
// is launched on a device, which is the current one, answers for all.
inline bool may_overlap([[maybe_unused]] const char* name, [[maybe_unused]] const void* kernel,
                        [[maybe_unused]] int device) {
#if CUDART_VERSION >= 12030
  static DeviceNumber known;
  return known.get(device, [=] {
    if (environment_is("PFGM_CUDA_OVERLAP", "0")) return false;
    int driver = 0;
    check_runtime("cudaDriverGetVersion", cudaDriverGetVersion(&driver));
    return driver >= 12030 && architecture_of(name, kernel) >= 90;
  }) != 0;
#else
  return false;
#endif
}

// Whether warpgroups multiply where they can. Where not, tiles are as small as for references that
// are not aligned: code for sm_90a has large tiles for warpgroups alone.
inline bool takes_warpgroups() { return !environment_is("PFGM_CUDA_WARPGROUPS", "0"); }

// Whether launches may overlap in graphs, too. No GPU has shown yet that they may.
inline bool may_overlap_in_graphs() {
  static const bool may = environment_is("PFGM_CUDA_OVERLAP", "graphs");
  return may;
}

// Whether each launch is waited for, so that an error names its kernel.
inline bool checks_launches() {
  static const bool checks = environment_is("PFGM_CUDA_CHECK", "1");
  return checks;
}

// Whether a graph captures the launches on a stream.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_runtime("cudaStreamIsCapturing", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Lets a kernel have so many bytes of dynamic shared memory on the device, which is the current
// one, and prefers shared memory to the L1 cache, so that as many blocks as fit run at once. The
// runtime takes as long for this as for a launch, and keeps it for later launches.
inline void allow_shared_memory(const char* name, const void* kernel, int device,
                                std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check_runtime(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes)));
  check_runtime(name, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared));
  most = bytes;
}

}  // namespace pfgm
