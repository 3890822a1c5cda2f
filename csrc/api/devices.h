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

// Versions of CUDA as 1000 × major + 10 × minor.
struct CudaVersions {
  int runtime = 0;  // of the runtime in the extension; 0 if it was built without CUDA
  int driver = 0;   // the newest that the driver supports; 0 without a driver
};

CudaVersions cuda_versions();

}  // namespace pfgm
