#include <cuda_runtime_api.h>

#include "api/devices.h"

namespace pfgm {

CudaDevices cuda_devices() {
  CudaDevices found;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int device = 0; error == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess)
      found.names.push_back(std::string(properties.name) + " (sm_" +
                            std::to_string(properties.major) + std::to_string(properties.minor) +
                            ")");
  }
  if (error != cudaSuccess) {
    found.error = cudaGetErrorString(error);
    cudaGetLastError();  // the runtime keeps the last error; a later launch must not report it
  }
  return found;
}

CudaVersions cuda_versions() {
  CudaVersions found;
  if (cudaRuntimeGetVersion(&found.runtime) != cudaSuccess) found.runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
  cudaGetLastError();  // as above
  return found;
}

}  // namespace pfgm
