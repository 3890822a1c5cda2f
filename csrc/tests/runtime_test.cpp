// cuda/current_device.h and cuda/runtime.h with a CUDA runtime and a driver of this file, which
// note what they are asked. It is compiled against the headers of CUDA alone and needs no GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "cuda/current_device.h"

namespace {

// As in CUDA from version 12 on: setting a device makes its context, and a thread without a context
// counts as being on device 0.
CUcontext current = nullptr;
std::set<int> with_context;
int sets = 0, asked = 0, allowed = 0, preferred = 0;
bool refuses = false;

CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(static_cast<std::uintptr_t>(device) + 1);
}
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(context)) - 1;
}

CUresult get_context(CUcontext* out) {
  *out = current;
  return CUDA_SUCCESS;
}
CUresult set_context(CUcontext to) {
  current = to;
  return CUDA_SUCCESS;
}

cudaError_t driver_function(const char* name, void** out, cudaDriverEntryPointQueryResult* result) {
  *result = cudaDriverEntryPointSuccess;
  if (std::strcmp(name, "cuCtxGetCurrent") == 0) *out = reinterpret_cast<void*>(&get_context);
  if (std::strcmp(name, "cuCtxSetCurrent") == 0) *out = reinterpret_cast<void*>(&set_context);
  return cudaSuccess;
}

}  // namespace

extern "C" {
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  return driver_function(name, out, result);
}
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** out, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  return driver_function(name, out, result);
}
#endif
cudaError_t cudaGetDevice(int* device) {
  *device = current == nullptr ? 0 : device_of(current);
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  ++sets;
  if (refuses) return cudaErrorInvalidDevice;
  with_context.insert(device);
  current = context_of(device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  ++asked;
  *value = 100 + device;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return refuses ? cudaErrorInvalidDeviceFunction : cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int) {
  ++(attribute == cudaFuncAttributePreferredSharedMemoryCarveout ? preferred : allowed);
  return refuses ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return refuses ? cudaErrorStreamCaptureImplicit : cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
}

namespace {

using namespace pfgm;

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

template <class Run>
bool throws(const Run& run) {
  try {
    run();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

void check_current_device() {
  {
    const CurrentDevice device(1);
    require(device_of(current) == 1, "the device is not current");
  }
  require(current == nullptr, "a thread without a context has one afterwards");
  require(with_context == std::set<int>{1}, "another device than the one in use has a context");

  current = context_of(2);
  {
    const CurrentDevice outer(1);
    const CurrentDevice inner(3);
    require(device_of(current) == 3, "the inner device is not current");
  }
  require(current == context_of(2), "the context before is not current again");

  const CUcontext other = context_of(2);
  sets = 0;
  {
    const CurrentDevice same(2);
    require(current == other && sets == 0, "the current device was set");
  }
  require(current == other, "the context of the same device changed");

  refuses = true;
  require(throws([] { const CurrentDevice device(5); }), "a refused device is not an error");
  refuses = false;
  require(current == other, "a refused device changed the context");
}

void check_attributes() {
  for (int i = 0; i < 3; ++i)
    for (const int device : {0, 7}) require(multiprocessors_of(device) == 100 + device, "wrong");
  require(asked == 2, "a device was asked more than once");
  require(multiprocessors_of(1000) == 1100 && multiprocessors_of(1000) == 1100, "a high number");

  const char kernels[2] = {};
  const auto allow = [&](int kernel, int device, std::size_t bytes) {
    allow_shared_memory("kernel", &kernels[kernel], device, bytes);
  };
  refuses = true;
  require(throws([&] { allow(0, 0, 1000); }), "a refused size is not an error");
  refuses = false;
  allowed = preferred = 0;
  for (int i = 0; i < 3; ++i) allow(0, 0, 1000);
  require(allowed == 1, "the same size was set again, or a refused one counts as set");
  allow(0, 0, 999);
  require(allowed == 1, "a smaller size was set");
  allow(0, 0, 1001);
  allow(1, 0, 1000);
  allow(0, 1, 1000);
  require(allowed == 4, "a larger size, another kernel or another device was not set");
  require(preferred == 4, "a kernel does not prefer shared memory");
}

void check_refusals() {
  const char kernel = 0;
  check_code("kernel", &kernel);
  require(!is_capturing(nullptr), "a stream is captured that is not");
  require(is_capturing(reinterpret_cast<cudaStream_t>(&sets)), "a captured stream is not");
  refuses = true;
  require(throws([] { is_capturing(nullptr); }), "a stream that may not be asked is no error");
  require(throws([&] { check_code("kernel", &kernel); }), "a kernel without code is no error");
  refuses = false;
}

}  // namespace

int main() {
  check_current_device();
  check_attributes();
  check_refusals();
  std::printf("devices and attributes are as they should be\n");
}
