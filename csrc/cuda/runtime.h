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

// Caches a number of each device, which is not negative.
class DeviceNumber {
 public:
  template <class Ask>
  int get(int device, const Ask& ask) {
    const bool kept = device >= 0 && device < static_cast<int>(cached_.size());
    int value = kept ? cached_[device].load(std::memory_order_relaxed) - 1 : -1;
    if (value >= 0) return value;
    value = ask();
    if (kept) cached_[device].store(value + 1, std::memory_order_relaxed);
    return value;
  }

 private:
  std::array<std::atomic<int>, 64> cached_{};  // the number + 1; 0 if not known yet
};

template <cudaDeviceAttr ATTRIBUTE>
inline int attribute_of(int device) {
  static DeviceNumber cache;
  return cache.get(device, [=] {
    int value = 0;
    check_runtime("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, ATTRIBUTE, device));
    return value;
  });
}

inline int multiprocessors_of(int device) {
  return attribute_of<cudaDevAttrMultiProcessorCount>(device);
}

// Throws if the build has no code of a kernel that the current device runs.
inline void check_code(const char* name, const void* kernel) {
  cudaFuncAttributes attributes;
  check_runtime(name, cudaFuncGetAttributes(&attributes, kernel));
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
