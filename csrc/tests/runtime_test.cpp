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
int driver = 0, compiled_for = 0, asked_kernels = 0;
int major = 9;  // of the compute capability
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
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++asked;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? major : 100 + device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++asked_kernels;
  attributes->ptxVersion = compiled_for;
  attributes->binaryVersion = 90;
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

// Each case has a device of its own, because the answer for a device is kept.
void check_overlap() {
  const char kernels[2] = {};
  const auto overlaps = [&](int device, int kernel = 0) {
    return may_overlap("kernel", &kernels[kernel], device);
  };
  const bool can = CUDART_VERSION >= 12030;
  driver = 13000, compiled_for = 90;
  for (int i = 0; i < 3; ++i) require(overlaps(0, i % 2) == can, "code for sm_90 does not overlap");
  require(asked_kernels == (can ? 1 : 0), "more than one kernel was asked on a device");
  compiled_for = 120;
  require(overlaps(1) == can, "code for sm_120 does not overlap");
  compiled_for = 80;
  require(!overlaps(2) && !overlaps(2), "code for sm_80 overlaps, and never waits");
  require(overlaps(0) == can, "another device changed the answer");
  require(!overlaps(1000), "the answer for a high number is that of another device");
  compiled_for = 90, driver = 12020;
  require(!overlaps(3), "a driver that cannot capture overlapping launches gets them");
  driver = 12030, refuses = true;
  require(throws([&] { overlaps(4); }) == can, "a kernel without code for the device is no error");
  refuses = false;
  require(overlaps(4) == can, "a refused question was kept");
}

// The build has code for sm_90a. Each case has a device of its own.
void check_warpgroups() {
  const char kernel = 0;
  const auto has = [&](int device) { return has_warpgroups("kernel", &kernel, device); };
  major = 9, compiled_for = 90;
  require(has(0) && has(0), "an sm_90 has no warpgroups");
  compiled_for = 80;
  require(!has(1), "code for sm_80, whose kernels of warpgroups are empty, has warpgroups");
  major = 10, compiled_for = 100;
  require(!has(2), "an sm_100 has warpgroups");
  require(has(0), "another device changed the answer");
}

// Each case has a device of its own.
void check_switches() {
  const char kernel = 0;
  driver = 13000, compiled_for = 90, major = 9;
  setenv("PFGM_CUDA_OVERLAP", "0", 1);
  setenv("PFGM_CUDA_WARPGROUPS", "0", 1);
  require(!takes_warpgroups(), "warpgroups multiply that were told not to");
  require(!may_overlap("kernel", &kernel, 10), "launches overlap that were told not to");
  setenv("PFGM_CUDA_OVERLAP", "graphs", 1);
  setenv("PFGM_CUDA_WARPGROUPS", "", 1);
  require(may_overlap("kernel", &kernel, 11) == (CUDART_VERSION >= 12030), "no launches overlap");
  require(takes_warpgroups(), "an empty variable turns warpgroups off");
  require(!is_capturing(nullptr), "a stream is captured that is not");
  require(is_capturing(reinterpret_cast<cudaStream_t>(&driver)), "a captured stream is not");
  refuses = true;
  require(throws([] { is_capturing(nullptr); }), "a stream that may not be asked is no error");
  refuses = false;
}

}  // namespace

int main() {
  check_current_device();
  check_attributes();
  check_overlap();
  check_warpgroups();
  check_switches();
  std::printf("devices and attributes are as they should be\n");
}
