// The CUDA devices that the statically linked runtime of the extension sees.
#pragma once
#include <string>
#include <vector>

namespace pfgm {

struct CudaDevices {
  std::vector<std::string> names;  // "NVIDIA H100 (sm_90)"
  std::string error;               // why there are none; empty if the runtime answered
};

CudaDevices cuda_devices();

}  // namespace pfgm
