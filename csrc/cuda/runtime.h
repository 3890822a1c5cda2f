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

// An attribute of a device that is never 0. The runtime is asked once for each device.
template <cudaDeviceAttr ATTRIBUTE>
inline int attribute_of(int device) {
  static std::array<std::atomic<int>, 64> known;  // 0 where the runtime was not asked yet
  const bool kept = device >= 0 && device < static_cast<int>(known.size());
  int value = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (value > 0) return value;
  check_runtime("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
  if (kept) known[device].store(value, std::memory_order_relaxed);
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
