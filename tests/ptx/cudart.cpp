// The functions of the CUDA runtime that the project calls, over the executor; and the executor for
// other languages (ptx_…).
//
// Programs that are compiled with nvcc -cudart shared find these in place of NVIDIA's runtime.
// Their PTX is in the fat binary that they register. Device memory is host memory.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "machine.h"

using namespace ptx;

namespace {

// The PTX of a program's fat binary, for one architecture or several.
struct Binary {
  std::vector<int> modules;
};
// A kernel as the host knows it.
struct Function {
  const Binary* binary = nullptr;
  std::string name;
  u32 allowed_shared = 48 << 10;
};

std::vector<std::unique_ptr<Module>> modules;
std::map<const void*, Function> functions;
cudaError_t last_error = cudaSuccess;
int current = -1;
int context;
std::vector<std::string> log_lines;
int skip;  // whether kernels are launched, but do not run

// The kernel that the device runs: of the newest PTX that is not newer than it.
Kernel* kernel_of(const Function& f) {
  const Module* best = nullptr;
  for (const int n : f.binary->modules) {
    const Module& m = *modules[static_cast<size_t>(n)];
    if (m.target <= device.capability && (!best || m.target > best->target)) best = &m;
  }
  if (!best) return nullptr;
  const auto k = best->kernels.find(f.name);
  return k == best->kernels.end() ? nullptr : k->second.get();
}

cudaError_t fail(cudaError_t e) { return last_error = e; }

CUresult get_current(CUcontext* to) {
  *to = current >= 0 ? reinterpret_cast<CUcontext>(&context) : nullptr;
  return CUDA_SUCCESS;
}
CUresult set_current(CUcontext to) {
  if (!to)
    current = -1;
  else if (current < 0)
    current = 0;
  return CUDA_SUCCESS;
}

cudaError_t launch(Kernel* k, dim3 grid, dim3 block, void** args, size_t shared,
                   u32 allowed_shared) {
  if (!k) return fail(cudaErrorInvalidDeviceFunction);
  try {
    parse_kernel(*k);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n  in %s\n", e.what(), k->name.c_str());
    report("cannot be parsed", nullptr, nullptr, 0, "%s in %s", e.what(), k->name.c_str());
    return fail(cudaErrorInvalidPtx);
  }
  const u32 threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    report("launch configuration", nullptr, nullptr, 0, "%s: grid %u %u %u, block %u",
           k->name.c_str(), grid.x, grid.y, grid.z, threads);
    return fail(cudaErrorInvalidConfiguration);
  }
  const int most =
      k->max_threads[0] * std::max(1, k->max_threads[1]) * std::max(1, k->max_threads[2]);
  if (most && threads > static_cast<u32>(most)) {
    report("launch: too many threads", nullptr, nullptr, 0, "%s", k->name.c_str());
    return fail(cudaErrorInvalidValue);
  }
  if (k->required_threads && threads != static_cast<u32>(k->required_threads)) {
    report("launch: threads differ from reqntid", nullptr, nullptr, 0, "%s", k->name.c_str());
    return fail(cudaErrorInvalidValue);
  }
  const u32 total = k->dynamic_at - kReserved + static_cast<u32>(shared);
  if (shared > allowed_shared || total > static_cast<u32>(device.shared)) {
    report("launch: too much shared memory", nullptr, nullptr, 0,
           "%s: %zu dynamic, %u allowed, %u in all", k->name.c_str(), shared, allowed_shared,
           total);
    return fail(cudaErrorInvalidValue);
  }
  Launch l;
  l.kernel = k;
  l.grid[0] = grid.x, l.grid[1] = grid.y, l.grid[2] = grid.z;
  l.block[0] = block.x, l.block[1] = block.y, l.block[2] = block.z;
  l.shared = static_cast<u32>(shared);
  l.params.resize(k->params_size);
  for (size_t p = 0; p < k->params.size(); ++p)
    std::memcpy(l.params.data() + k->params[p].offset, args[p], k->params[p].size);
  try {
    if (skip == 0) run_launch(l);
  } catch (const std::exception& e) {
    report("executor", nullptr, nullptr, 0, "%s in %s", e.what(), k->name.c_str());
    std::fprintf(stderr, "%s in %s\n", e.what(), k->name.c_str());
    return fail(cudaErrorUnknown);
  }
  std::string text = k->name;
  for (const u64 number : {u64{grid.x}, u64{grid.y}, u64{grid.z}, u64{threads}, u64{shared}})
    text += " " + std::to_string(number);
  for (int kind = kOthers + 1; kind < kCounted; ++kind) text += " " + std::to_string(counts[kind]);
  log_lines.push_back(text);
  return cudaSuccess;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** args, size_t shared) {
  const auto f = functions.find(host);
  if (f == functions.end()) return fail(cudaErrorInvalidDeviceFunction);
  return launch(kernel_of(f->second), grid, block, args, shared, f->second.allowed_shared);
}

}  // namespace

extern "C" {

// ---- registration -----------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
    void* other;
  };
  const char* data = static_cast<Wrapper*>(wrapper)->data;
  struct Header {
    u32 magic;
    u16 version, header;
    u64 size;
  };
  const Header* h = reinterpret_cast<const Header*>(data);
  auto* const binary = new Binary;
  const char* end = data + h->header + h->size;
  static const char mark[] = ".version ";
  for (const char* p = data; p + sizeof mark < end; ++p)
    if (std::memcmp(p, mark, sizeof mark - 1) == 0) {
      const std::string text(p, strnlen(p, static_cast<size_t>(end - p)));
      p += text.size();
      if (text.find(".entry") == std::string::npos) continue;
      binary->modules.push_back(static_cast<int>(modules.size()));
      modules.push_back(load_module(text));
    }
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  functions[host] = {reinterpret_cast<Binary*>(handle), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* entry) {
  *to = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t) {
  return launch(reinterpret_cast<const void*>(k), grid, block, args, shared);
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }

// ---- the runtime --------------------------------------------------------------------------------

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* func, void** args) {
  return launch(func, c->gridDim, c->blockDim, args, c->dynamicSmemBytes);
}
cudaError_t cudaLaunchKernel(const void* func, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t) {
  return launch(func, grid, block, args, shared);
}
cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { return *d = current < 0 ? 0 : current, cudaSuccess; }
cudaError_t cudaSetDevice(int d) {
  return current = d, cudaSuccess;
}  // there are as many as one asks for
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "the executor of PTX");
  p->major = device.capability / 10, p->minor = device.capability % 10,
  p->multiProcessorCount = device.multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount:
      *v = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = device.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = device.shared;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 48 << 10;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    default:
      report("cudaDeviceGetAttribute", nullptr, nullptr, 0, "%d", a);
      return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void* func) {
  const auto f = functions.find(func);
  const Kernel* k = f == functions.end() ? nullptr : kernel_of(f->second);
  if (!k) return fail(cudaErrorInvalidDeviceFunction);
  std::memset(to, 0, sizeof *to);
  to->ptxVersion = k->module->target;
  to->binaryVersion = device.capability;
  to->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* func, cudaFuncAttribute a, int v) {
  const auto f = functions.find(func);
  if (f == functions.end()) return fail(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (v > device.shared) {
      report("cudaFuncSetAttribute: too much shared memory", nullptr, nullptr, 0, "%s: %d",
             f->second.name.c_str(), v);
      return fail(cudaErrorInvalidValue);
    }
    f->second.allowed_shared = static_cast<u32>(std::max(v, 48 << 10));
  }
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** to, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *to = !std::strcmp(name, "cuCtxGetCurrent")   ? reinterpret_cast<void*>(get_current)
        : !std::strcmp(name, "cuCtxSetCurrent") ? reinterpret_cast<void*>(set_current)
                                                : nullptr;
  if (result) *result = *to ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t e) {
  static char text[40];
  std::snprintf(text, sizeof text, "error %d of the executor", static_cast<int>(e));
  return text;
}
cudaError_t cudaGetLastError(void) {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(*mode, now);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaGetLastError(); }
cudaError_t cudaMemsetAsync(void* at, int v, size_t n, cudaStream_t) {
  std::memset(at, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, n);
  return cudaSuccess;
}

// ---- the executor -------------------------------------------------------------------------------

// Returns whether there is such an option.
int ptx_set(const char* name, int value) {
  static const std::map<std::string, int*> all = {{"order", &options.order},
                                                  {"preempt", &options.preempt},
                                                  {"late", &options.late},
                                                  {"truncate", &options.truncate},
                                                  {"noise", &options.noise},
                                                  {"anywhere", &options.anywhere},
                                                  {"skip", &skip},
                                                  {"multiprocessors", &device.multiprocessors},
                                                  {"capability", &device.capability},
                                                  {"shared", &device.shared}};
  const auto f = all.find(name);
  if (f != all.end()) *f->second = value;
  return f != all.end();
}
int ptx_errors(void) { return static_cast<int>(errors.size()); }
const char* ptx_error(int n) {
  static std::string text;
  text = errors[static_cast<size_t>(n)].kind + " (" +
         std::to_string(errors[static_cast<size_t>(n)].count) +
         " times): " + errors[static_cast<size_t>(n)].text;
  return text.c_str();
}
void ptx_clear_errors(void) { errors.clear(); }
int ptx_log_size(void) { return static_cast<int>(log_lines.size()); }
const char* ptx_log(int n) { return log_lines[static_cast<size_t>(n)].c_str(); }
void ptx_clear_log(void) { log_lines.clear(); }
int ptx_load(const char* ptx) {
  try {
    modules.push_back(load_module(ptx));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return -1;
  }
  return static_cast<int>(modules.size()) - 1;
}
// The texts of modules, and other texts in their place, to see what a change does.
int ptx_modules(void) { return static_cast<int>(modules.size()); }
const char* ptx_text(int module) { return modules.at(static_cast<size_t>(module))->text.c_str(); }
// The numbers of the lines of a kernel's instructions that warps have executed.
const char* ptx_reached(int module, const char* name) {
  static std::string text;
  text.clear();
  const Module& m = *modules.at(static_cast<size_t>(module));
  const auto f = m.kernels.find(name);
  if (f == m.kernels.end()) return "";
  const auto before =
      std::count(m.text.begin(), m.text.begin() + static_cast<s64>(f->second->header), '\n');
  for (const Ins& i : f->second->code)
    if (i.reached) text += std::to_string(before + i.line) + " ";
  return text.c_str();
}
void ptx_reload(int module, const char* ptx) {
  static std::vector<std::unique_ptr<Module>> replaced;  // kernels may still use their memory
  replaced.push_back(load_module(ptx));
  std::swap(replaced.back(), modules.at(static_cast<size_t>(module)));
}
// Sizes of a kernel's parameters; returns their number, or −1.
int ptx_params(int module, const char* name, u64* sizes, int most) {
  const auto f = modules.at(static_cast<size_t>(module))->kernels.find(name);
  if (f == modules[static_cast<size_t>(module)]->kernels.end()) return -1;
  try {
    parse_kernel(*f->second);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return -1;
  }
  int n = 0;
  for (const Param& p : f->second->params) {
    if (n < most) sizes[n] = p.size;
    ++n;
  }
  return n;
}
int ptx_launch(int module, const char* name, const u32* grid, const u32* block, u32 shared,
               void** args) {
  const auto f = modules.at(static_cast<size_t>(module))->kernels.find(name);
  if (f == modules[static_cast<size_t>(module)]->kernels.end()) return -1;
  return launch(f->second.get(), dim3(grid[0], grid[1], grid[2]),
                dim3(block[0], block[1], block[2]), args, shared, 1 << 20);
}

}  // extern "C"
