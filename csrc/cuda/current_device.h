// The current device of a thread.
#pragma once
#include <cudaTypedefs.h>

#include "cuda/runtime.h"

namespace pfgm {

// Functions of the driver. They are found through the runtime, because the extension is not linked
// to the driver: it can be imported where there is none.
struct ContextFunctions {
  PFN_cuCtxGetCurrent_v4000 get;
  PFN_cuCtxSetCurrent_v4000 set;

  static const ContextFunctions& instance() {
    static const ContextFunctions functions = {find<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent"),
                                               find<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent")};
    return functions;
  }

  static void check(const char* what, CUresult result) {
    if (result != CUDA_SUCCESS)
      throw std::runtime_error(std::string(what) + ": error " + std::to_string(result));
  }

 private:
  template <class Function>
  static Function find(const char* name) {
    void* at = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check_runtime(name,
                  cudaGetDriverEntryPointByVersion(name, &at, 12000, cudaEnableDefault, &result));
#else
    check_runtime(name, cudaGetDriverEntryPoint(name, &at, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess || at == nullptr)
      throw std::runtime_error(std::string(name) + ": the driver does not have this function");
    return reinterpret_cast<Function>(at);
  }
};

// Makes a device the current one of this thread while it lives, for torch as well, because runtimes
// share the thread's context. Afterwards the thread has the context that it had before, or none.
//
// Restoring the previous device with cudaSetDevice would do more. A thread without a context counts
// as being on device 0, and from CUDA 12 on cudaSetDevice makes a context there: hundreds of
// megabytes on a GPU that may never be used.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : driver_(ContextFunctions::instance()) {
    ContextFunctions::check("cuCtxGetCurrent", driver_.get(&before_));
    int now = -1;
    if (before_ != nullptr) check_runtime("cudaGetDevice", cudaGetDevice(&now));
    changed_ = now != device;
    if (changed_) check_runtime("cudaSetDevice", cudaSetDevice(device));
  }
  ~CurrentDevice() {
    if (changed_) driver_.set(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const ContextFunctions& driver_;
  CUcontext before_ = nullptr;
  bool changed_ = false;
};

}  // namespace pfgm
