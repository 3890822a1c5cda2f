#include "api/devices.h"

namespace pfgm {

CudaDevices cuda_devices() { return {{}, "the extension was built without CUDA"}; }

CudaVersions cuda_versions() { return {}; }

}  // namespace pfgm
