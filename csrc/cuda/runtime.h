// Errors of the CUDA runtime, and what it need be asked or told only once.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>
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

// An attribute of a device that is not negative. The runtime is asked once for each device.
template <cudaDeviceAttr ATTRIBUTE>
inline int attribute_of(int device) {
  static std::array<std::atomic<int>, 64> known;  // one more; 0 where it was not asked yet
  const bool kept = device >= 0 && device < static_cast<int>(known.size());
  int value = kept ? known[device].load(std::memory_order_relaxed) - 1 : -1;
  if (value >= 0) return value;
  check_runtime("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
  if (kept) known[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

inline int multiprocessors_of(int device) {
  return attribute_of<cudaDevAttrMultiProcessorCount>(device);
}

// Whether kernels may multiply with warpgroups: the device is an sm_90 and the build has code for
// sm_90a.
inline bool has_warpgroups([[maybe_unused]] int device) {
#ifdef PFGM_WARPGROUPS
  return attribute_of<cudaDevAttrComputeCapabilityMajor>(device) == 9;
#else
  return false;
#endif
}

// The architecture that the code of a kernel was compiled for, 90 for sm_90. It is older than the
// device if the build has no code for the device's own architecture. All kernels were compiled for
// the same ones, so the runtime is asked once for each device, which is the current one.
inline int code_architecture(const char* name, const void* kernel, int device) {
  static std::array<std::atomic<int>, 64> known;  // 0 where it was not asked yet
  const bool kept = device >= 0 && device < static_cast<int>(known.size());
  if (const int found = kept ? known[device].load(std::memory_order_relaxed) : 0; found > 0)
    return found;
  cudaFuncAttributes attributes;
  check_runtime(name, cudaFuncGetAttributes(&attributes, kernel));
  if (kept) known[device].store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

// Whether a device has a GeForce card's chip, and code of this architecture has kernels for these
// (`unused` in cuda/distances.h). Their matrix units multiply twice as fast where they add up in
// float16, and float64 runs at 1/64 of the rate of float32.
inline bool is_geforce(int device, int architecture) {
  const int major = attribute_of<cudaDevAttrComputeCapabilityMajor>(device);
  const int minor = attribute_of<cudaDevAttrComputeCapabilityMinor>(device);
  const bool chip = major >= 12 || (major == 8 && (minor == 6 || minor == 9));
  return chip && (architecture < 90 || architecture >= 120);
}

// Lets a kernel have so many bytes of dynamic shared memory on the device, which is the current
// one. The runtime takes as long for this as for a launch, and keeps it for later launches.
inline void allow_shared_memory(const char* name, const void* kernel, int device,
                                std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check_runtime(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes)));
  most = bytes;
}

}  // namespace pfgm
