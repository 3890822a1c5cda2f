#include "api/devices.h"

namespace pfgm {

CudaDevices cuda_devices() { return {{}, "not built: " PFGM_WITHOUT_CUDA}; }

CudaVersions cuda_versions() { return {}; }

}  // namespace pfgm
