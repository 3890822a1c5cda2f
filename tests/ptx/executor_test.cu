// Tests of the executor: what kernels compute in it, and that it finds what is wrong with a kernel.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"

extern "C" {  // cudart.cpp
int ptx_set(const char* name, int value);
int ptx_errors();
const char* ptx_error(int n);
void ptx_clear_errors();
}

namespace {

using namespace pfgm;

constexpr unsigned kEveryLane = 0xffffffff;
const CudaStream kStream{100, 0};  // the host keeps what it asked devices up to 63

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

void expect(bool good, const std::string& what) {
  if (!good) fail(what);
}

void set_order(int order) {
  ptx_set("order", order);
  ptx_set("preempt", order > 1 ? 40 : 0);
}

template <class... Parameters, class... Arguments>
void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  Stream(kStream).launch(shape, kernel, arguments...);
}

// ---- indices and orders ---------------------------------------------------------------------

__global__ void __launch_bounds__(64) indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] += static_cast<int>(1 + block * blockDim.x + threadIdx.x);
}

void check_indices() {
  for (int order = 0; order < 4; ++order) {
    set_order(order);
    std::vector<int> out(6 * 5 * 3 * 64);
    launch({"indices", {6, 5, 3}, 64}, indices, out.data());
    for (std::size_t i = 0; i < out.size(); ++i)
      expect(out[i] == static_cast<int>(i) + 1, "indices");
  }
}

// The order in which warps and blocks begin.
__global__ void logging(int* entries, int* count) {
  if (threadIdx.x % 32 == 0) {
    entries[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * 2 + threadIdx.x / 32);
    __threadfence();
  }
}

void check_orders() {
  const auto logged = [](int order) {
    std::vector<int> entries(6);
    int count = 0;
    set_order(order);
    launch({"logging", {3}, 64}, logging, entries.data(), &count);
    return entries;
  };
  expect(logged(0) == std::vector<int>{0, 1, 2, 3, 4, 5}, "ascending order");
  expect(logged(1) == std::vector<int>{5, 4, 3, 2, 1, 0}, "descending order");
  expect(logged(7) != logged(0) && logged(7) != logged(8), "random orders");
}

__global__ void __launch_bounds__(128) sum_in_tree(const float* in, float* out) {
  auto* part = reinterpret_cast<float*>(shared_memory());
  const unsigned i = threadIdx.x;
  part[i] = in[blockIdx.x * blockDim.x + i];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) part[i] += part[i + half];
  }
  if (i == 0) out[blockIdx.x] = part[0];
}

void check_equal_bits() {
  std::vector<float> in(5 * 128), first;
  std::mt19937 engine(3);
  for (float& v : in) v = std::normal_distribution<float>()(engine);
  for (int order = 0; order < 6; ++order) {
    std::vector<float> out(5);
    set_order(order);
    launch({"sum_in_tree", {5}, 128, 512}, sum_in_tree, in.data(), out.data());
    if (order == 0) first = out;
    expect(out == first, "the sum depends on the order");
  }
}

// ---- copies ---------------------------------------------------------------------------------

__global__ void deferred(const float* from, float* changing, float* out) {
  auto* memory = reinterpret_cast<volatile float*>(shared_memory());
  auto* places = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 14; ++i) *out++ = memory[i];
  copy_async<16>(places, from);
  commit_copies();
  copy_async<16>(places + 4, from + 4, 8);
  copy_async<4>(places + 8, changing);
  copy_async<16>(places + 12, from, 0);
  commit_copies();
  wait_copies<1>();
  for (int i = 0; i < 4; ++i) *out++ = memory[i];
  *changing = 77;
  commit_copies();
  wait_copies<1>();
  for (int i = 4; i < 9; ++i) *out++ = memory[i];
  *out++ = memory[12];
}

void check_copies() {
  alignas(16) float from[] = {1, 2, 3, 4, 5, 6};
  float changing = 9;
  std::vector<float> out(24);
  launch({"deferred", {1}, 32, 64}, deferred, from, &changing, out.data());
  const float expected[] = {1, 2, 3, 4, 5, 6, 0, 0, 77, 0};
  for (int i = 0; i < 14; ++i) expect(std::isnan(out[i]), "shared memory is NaN at first");
  for (int i = 0; i < 10; ++i) expect(out[14 + i] == expected[i], "deferred copies");
}

// ---- warps ----------------------------------------------------------------------------------

template <class T>
__device__ bool shuffles(T base) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool good = true;
  for (int mask = 0; mask < 32; ++mask)
    good &= __shfl_xor_sync(kEveryLane, static_cast<T>(base + lane), mask) == base + (lane ^ mask);
  for (int source = 0; source < 32; ++source)
    good &= __shfl_sync(kEveryLane, static_cast<T>(base + lane), source) == base + source;
  return good;
}

__global__ void warps(int* bad) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool good = shuffles<float>(0.5f) && shuffles<double>(1e15 + 0.5) && shuffles<int>(-7) &&
              shuffles<unsigned>(4000000000u) && shuffles<long long>(-(1ll << 60));
  good &= __ballot_sync(kEveryLane, lane % 3 == warp) == (0x49249249u << warp);
  good &= __any_sync(kEveryLane, 0) == 0 && __any_sync(kEveryLane, lane == 31) == 1;
  good &= __all_sync(kEveryLane, 1) == 1 && __all_sync(kEveryLane, lane != 9) == 0;
  good &= __reduce_min_sync(kEveryLane, static_cast<int>(lane ^ 21) - 7) == -7;
  good &= __reduce_min_sync(kEveryLane, 4000000000u + (lane ^ 9)) == 4000000000u;
  good &= __reduce_add_sync(kEveryLane, static_cast<int>(lane) - 20) == 496 - 640;
  const int number = static_cast<int>(lane);
  good &=
      __popc(0xf0f0u + (lane & 0)) == 8 && __ffs(number & 0) == 0 && __ffs(8 + (number & 0)) == 4;
  good &= __clz(number & 0) == 32 && __clz(1 + (number & 0)) == 31;
  bad[threadIdx.x] = !good;
}

// Every thread of the grid takes a place in a list, and lowers a minimum.
__global__ void atomics(unsigned* length, unsigned* list, int* least) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  list[atomicAdd(length, 1u)] = thread;
  atomicMin(least + thread % 2, 1 + static_cast<int>(thread ^ 77));
}

void check_warps_and_atomics() {
  std::vector<int> bad(64, 1);
  launch({"warps", {1}, 64}, warps, bad.data());
  expect(bad == std::vector<int>(64), "shuffles, votes, reductions and bits");
  unsigned length = 0;
  std::vector<unsigned> list(5 * 64);
  int least[2] = {1000, 1000};
  launch({"atomics", {5}, 64}, atomics, &length, list.data(), least);
  expect(length == list.size(), "additions");
  std::sort(list.begin(), list.end());
  for (unsigned i = 0; i < list.size(); ++i) expect(list[i] == i, "places");
  expect(least[0] == 2 && least[1] == 1, "minima");
}

// ---- products -------------------------------------------------------------------------------

__global__ void multiply_in_halves(const __half* left, const __half* right, float* out) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto two = [](__half first, __half second) {
    return __half_as_ushort(first) | static_cast<std::uint32_t>(__half_as_ushort(second)) << 16;
  };
  std::uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const __half* at = left + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    a[i] = two(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __half* at = right + (2 * t + 8 * i) * 8 + g;
    b[i] = two(at[0], at[8]);
  }
  float* rows[2] = {out + g * 8 + 2 * t, out + (g + 8) * 8 + 2 * t};
  float d[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  multiply_add_halves(d, a, b);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = d[i];
}

std::vector<__half> random_halves(std::size_t count, std::mt19937& engine) {
  std::normal_distribution<float> normal;
  std::vector<__half> values(count);
  for (__half& v : values) v = __float2half(normal(engine));
  return values;
}

// The sum is rounded once.
void check_products() {
  constexpr int kRows = 16, kDepth = 16, kColumns = 8;
  std::mt19937 engine(6);
  const auto a = random_halves(kRows * kDepth, engine),
             b = random_halves(kDepth * kColumns, engine);
  std::vector<float> d(kRows * kColumns), expected;
  for (float& v : d) v = std::normal_distribution<float>()(engine);
  for (int i = 0; i < kRows * kColumns; ++i) {
    double sum = d[i];
    for (int k = 0; k < kDepth; ++k)
      sum += static_cast<double>(__half2float(a[i / kColumns * kDepth + k])) *
             __half2float(b[k * kColumns + i % kColumns]);
    expected.push_back(static_cast<float>(sum));
  }
  launch({"multiply_in_halves", {1}, 32}, multiply_in_halves, a.data(), b.data(), d.data());
  expect(d == expected, "a product");
}

// Addends of a matrix unit that are cut: 2^-24 beside 1 is lost until sm_89, and kept on later
// units until the sum is cut to float32, which two of them fill.
void check_cuts() {
  ptx_set("truncate", 1);
  for (const int capability : {80, 89, 90}) {
    ptx_set("capability", capability);
    std::vector<__half> a(256, __float2half(0)), b(128, __float2half(0));
    a[0] = __float2half(1), b[0] = __float2half(1);
    for (int k = 1; k < 5; ++k) a[k] = __float2half(0x1p-13f), b[8 * k] = __float2half(0x1p-12f);
    std::vector<float> d(128);
    launch({"multiply_in_halves", {1}, 32}, multiply_in_halves, a.data(), b.data(), d.data());
    expect(d[0] == (capability < 90 ? 1 : 1 + 0x1p-23f), "addends are cut as on the device");
  }
  ptx_set("truncate", 0);
}

// ---- launches -------------------------------------------------------------------------------

std::string errors() {
  std::string found;
  for (int n = 0; n < ptx_errors(); ++n) found += std::string(ptx_error(n)) + "\n";
  ptx_clear_errors();
  return found;
}

void expect_refusal(const Launch& shape, const std::string& what) {
  int unused[64] = {};
  try {
    launch(shape, indices, unused);
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find(shape.kernel) == 0, "a refusal names the kernel");
    expect(!errors().empty(), "the executor says what is refused");
    return;
  }
  fail("launched in spite of " + what);
}

void check_launches() {
  expect_refusal({"shared", {1}, 32, (227 << 10) + 1}, "its shared memory");
  expect_refusal({"threads", {1}, 1056}, "its threads");
  expect_refusal({"threads", {1}, 96}, "the kernel's largest number of threads");
  expect_refusal({"grid", {1, 65536}, 32}, "its grid's y");
  expect_refusal({"grid", {1, 1, 65536}, 32}, "its grid's z");
}

// ---- what is found --------------------------------------------------------------------------

__global__ void never_waits(const float* from) {
  copy_async<4>(shared_memory() + 4 * threadIdx.x, from);
  commit_copies();
}
__global__ void off_boundary(const float* from) {
  copy_async<16>(shared_memory(), from + 1);
  commit_copies();
  wait_copies<0>();
}
__global__ void ends_early() {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) asm volatile("bar.sync 1, 64;" ::: "memory");
}
__global__ void overrun() { shared_memory()[4 * threadIdx.x + 3] = 0; }
__global__ void runs_on(const int* from, int* out) { out[threadIdx.x] = from[threadIdx.x]; }
__global__ void never_ends(volatile int* from) {
  while (*from == 0) {
  }
}
__global__ void neighbours(int* out, int barrier) {
  auto* memory = reinterpret_cast<volatile int*>(shared_memory());
  if (barrier == 5)
    for (int i = 0; i < 4; ++i) __syncthreads();
  memory[threadIdx.x] = 1;
  if (barrier == 1) __syncthreads();
  if (barrier == 2) __syncwarp();
  if (barrier == 3) __shfl_sync(kEveryLane, 1, 0);
  if (barrier == 4) __ballot_sync(kEveryLane, 1);
  out[threadIdx.x] = memory[threadIdx.x ^ 1];
}
__global__ void warps_apart(int* out, bool barrier) {
  auto* memory = reinterpret_cast<volatile int*>(shared_memory());
  memory[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x ^ 32];
}
// The blocks in between do not write.
__global__ void ends_of_grid(int* out) {
  if (blockIdx.x % 11 == 0) out[threadIdx.x] = static_cast<int>(blockIdx.x);
}
__global__ void exchange(int* memory, bool barrier) {
  auto* shared = static_cast<volatile int*>(memory);
  shared[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  shared[128 + threadIdx.x] = shared[threadIdx.x ^ (threadIdx.x < 32 ? 1 : 32)];
}
__global__ void early_read(const int* from, int* out) {
  auto* memory = reinterpret_cast<int*>(shared_memory());
  copy_async<4>(memory + threadIdx.x, from + threadIdx.x);
  commit_copies();
  __syncthreads();
  wait_copies<0>();
  out[threadIdx.x] = reinterpret_cast<volatile int*>(memory)[threadIdx.x ^ 1];
}

alignas(16) float some_floats[256];
int some_ints[1024];

void check_mistakes() {
  const auto side_by_side = [](int barrier) {
    launch({"neighbours", {1}, 32, 128}, neighbours, some_ints, barrier);
  };
  struct Scenario {
    const char *name, *message;  // the message is empty if nothing is wrong
    std::function<void()> body;
  };
  const Scenario scenarios[] = {
      {"unwaited copy", "ends before its copies",
       [] { launch({"never_waits", {1}, 32, 128}, never_waits, some_floats); }},
      {"misaligned copy", "misaligned",
       [] { launch({"off_boundary", {1}, 32, 128}, off_boundary, some_floats); }},
      {"different barriers", "deadlock", [] { launch({"ends_early", {1}, 64}, ends_early); }},
      {"shared memory", "shared memory out of bounds",
       [] { launch({"overrun", {1}, 32, 124}, overrun); }},
      {"no end", "runs too long",
       [] { launch({"never_ends", {1}, 32}, never_ends, some_ints + 512); }},
      {"no barrier", "within a warp", [&] { side_by_side(0); }},
      {"__syncthreads", "", [&] { side_by_side(1); }},
      {"__syncwarp", "", [&] { side_by_side(2); }},
      {"shuffle only", "within a warp", [&] { side_by_side(3); }},
      {"vote only", "within a warp", [&] { side_by_side(4); }},
      {"barriers before", "within a warp", [&] { side_by_side(5); }},
      {"warps", "shared", [] { launch({"warps", {1}, 64, 256}, warps_apart, some_ints, false); }},
      {"warps and a barrier", "",
       [] { launch({"warps", {1}, 64, 256}, warps_apart, some_ints, true); }},
      {"early read", "whose copy or product has not ended|within a warp",
       [] { launch({"early", {1}, 32, 128}, early_read, some_ints, some_ints + 32); }},
  };
  for (const Scenario& scenario : scenarios)
    for (int order = 0; order < 3; ++order) {
      set_order(order);
      scenario.body();
      const std::string found = errors(), message = scenario.message;
      const std::size_t bar = message.find('|');
      const bool good = message.empty()
                            ? found.empty()
                            : found.find(message.substr(0, bar)) != std::string::npos ||
                                  (bar != std::string::npos &&
                                   found.find(message.substr(bar + 1)) != std::string::npos);
      expect(good, std::string("scenario ") + scenario.name + ":\n" + found);
    }
}

// Memory of the heap, whose bounds memory.cpp knows, if it is preloaded.
void check_global_memory() {
  ptx_set("anywhere", 0);
  void *in = nullptr, *out = nullptr;
  expect(posix_memalign(&in, 64, 31 * sizeof(int)) == 0, "memory");
  expect(posix_memalign(&out, 64, 256 * sizeof(int)) == 0, "memory");
  launch({"runs_on", {1}, 32}, runs_on, static_cast<const int*>(in), static_cast<int*>(out));
  expect(errors().find("global memory out of bounds") != std::string::npos, "a read out of bounds");
  launch({"ends_of_grid", {12}, 256}, ends_of_grid, static_cast<int*>(out));
  expect(errors().find("global write after write") != std::string::npos, "a race of blocks");
  launch({"ends_of_grid", {11}, 256}, ends_of_grid, static_cast<int*>(out));
  expect(errors().empty(), "one block writes");
  launch({"exchange", {1}, 64}, exchange, static_cast<int*>(out), false);
  expect(errors().find("global read after write in a block") != std::string::npos, "no barrier");
  launch({"exchange", {1}, 64}, exchange, static_cast<int*>(out), true);
  expect(errors().empty(), "a barrier");
  std::free(in), std::free(out);
}

}  // namespace

int main() {
  ptx_set("anywhere", 1);
  check_indices();
  check_orders();
  check_equal_bits();
  set_order(0);
  check_copies();
  check_warps_and_atomics();
  check_products();
  expect(errors().empty(), "nothing is wrong");
  check_cuts();
  check_launches();
  check_mistakes();
  set_order(0);
  check_global_memory();
  std::puts("the executor computes, and finds mistakes");
}
