#include <cuda_runtime_api.h>

#include "api/devices.h"

namespace pfgm {

CudaDevices cuda_devices() {
  CudaDevices result;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int device = 0; error == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess)
      result.names.push_back(std::string(properties.name) + " (sm_" +
                             std::to_string(properties.major) + std::to_string(properties.minor) +
                             ")");
  }
  if (error != cudaSuccess) {
    result.error = cudaGetErrorString(error);
    cudaGetLastError();  // the runtime keeps the last error; a later launch must not report it
  }
  return result;
}

CudaVersions cuda_versions() {
  CudaVersions result;
  if (cudaRuntimeGetVersion(&result.runtime) != cudaSuccess) result.runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(&result.driver) != cudaSuccess) result.driver = 0;
  cudaGetLastError();  // as above
  return result;
}

}  // namespace pfgm
