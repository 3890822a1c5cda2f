// Tests the host shim of the CUDA kernels. A scenario that must end the program runs in a child,
// which is this program with the name of the scenario. A scenario that a sanitizer must find runs
// only in a build with that sanitizer. The argument "times" measures instead of testing.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>

#include "cuda/launch.h"
#include "host_shim/counts.h"

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace {

using namespace pfgm;

constexpr unsigned kAll = 0xffffffff;
const CudaPlace kPlace{0, 0};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

void expect(bool good, const std::string& what) {
  if (!good) fail(what);
}

template <class... Parameters, class... Arguments>
void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  Stream(kPlace).launch(shape, kernel, arguments...);
}

// ---- indices and orders ---------------------------------------------------------------------

__global__ void __launch_bounds__(64) indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] += static_cast<int>(1 + block * blockDim.x + threadIdx.x);
}

void check_indices() {
  std::vector<int> out(6 * 5 * 3 * 64);
  launch({"indices", {6, 5, 3}, 64}, indices, out.data());
  for (std::size_t i = 0; i < out.size(); ++i) expect(out[i] == static_cast<int>(i) + 1, "indices");
}

struct Log {
  int* entries;
  int* count;
};

__attribute__((no_sanitize("thread"))) void note(Log log) {
  log.entries[(*log.count)++] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void logging(Log log) {
  note(log);
  __syncthreads();
  note(log);
}

std::vector<int> logged(unsigned order) {
  std::vector<int> entries(2 * 3 * 64);
  int count = 0;
  shim::set_order(order);
  launch({"logging", {3}, 64}, logging, Log{entries.data(), &count});
  expect(count == static_cast<int>(entries.size()), "every thread runs once");
  return entries;
}

void check_orders() {
  const std::vector<int> up = logged(0), down = logged(1), some = logged(7), others = logged(8);
  for (int i = 0; i < 384; ++i) {
    const int thread = i / 128 * 64 + i % 64;
    expect(up[i] == thread, "ascending order");
    expect(down[i] == 191 - thread, "descending order");
  }
  expect(some != up && some != others && some == logged(7), "random orders");
}

template <class R>
__global__ void __launch_bounds__(128) sum_in_tree(const R* in, R* out) {
  auto* part = reinterpret_cast<R*>(shared_memory());
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
  for (unsigned order = 0; order < 6; ++order) {
    std::vector<float> out(5);
    shim::set_order(order);
    launch({"sum_in_tree", {5}, 128, 512}, sum_in_tree<float>, in.data(), out.data());
    if (order == 0) first = out;
    expect(out == first, "the sum depends on the order");
  }
}

// ---- copies ---------------------------------------------------------------------------------

struct Deferred {
  const float* from;
  float *changing, *out;
};

__global__ void deferred(Deferred p) {
  auto* memory = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 14; ++i) p.out[i] = memory[i];
  float* out = p.out + 14;
  memory[0] = 5;
  copy_async<16>(memory, p.from);
  *out++ = memory[0];
  commit_copies();
  copy_async<16>(memory + 4, p.from + 4, 8);
  copy_async<4>(memory + 8, p.changing);
  copy_async<16>(memory + 12, nullptr, 0);
  commit_copies();
  wait_copies<1>();
  for (int i = 0; i < 9; ++i) *out++ = memory[i];
  *p.changing = 77;
  commit_copies();
  wait_copies<1>();
  for (int i = 4; i < 9; ++i) *out++ = memory[i];
  *out++ = memory[12];
}

void check_copies() {
  // Exactly as long as what the kernel may read.
  const std::vector<float> from = {1, 2, 3, 4, 5, 6};
  auto* source = static_cast<float*>(std::aligned_alloc(16, 32));
  std::copy(from.begin(), from.end(), source);
  float changing = 9;
  std::vector<float> out(30);
  launch({"deferred", {1}, 32, 64}, deferred, Deferred{source, &changing, out.data()});
  const float expected[] = {NAN, 1, 2, 3, 4, NAN, NAN, NAN, NAN, NAN, 5, 6, 0, 0, 77, 0};
  for (int i = 0; i < 14; ++i) expect(std::isnan(out[i]), "shared memory is NaN at first");
  for (int i = 0; i < 16; ++i) {
    const float actual = out[14 + i];
    expect(std::isnan(expected[i]) ? std::isnan(actual) : actual == expected[i], "deferred copies");
  }
  std::free(source);
}

// ---- warps ----------------------------------------------------------------------------------

template <class T>
__device__ bool shuffles(T base) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  bool good = true;
  for (int mask = 0; mask < 32; ++mask)
    good &= __shfl_xor_sync(kAll, static_cast<T>(base + lane), mask) == base + (lane ^ mask);
  for (int source = 0; source < 32; ++source)
    good &= __shfl_sync(kAll, static_cast<T>(base + lane), source) == base + source;
  return good &&
         __shfl_sync(kAll, static_cast<T>(base + lane), (lane + 5) % 32) == base + (lane + 5) % 32;
}

__global__ void warps(int* bad) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool good = shuffles<float>(0.5f) && shuffles<double>(1e15 + 0.5) && shuffles<int>(-7) &&
              shuffles<unsigned>(4000000000u) && shuffles<long long>(-(1ll << 60));
  good &= __ballot_sync(kAll, lane % 3 == warp) == (0x49249249u << warp);
  good &= __any_sync(kAll, 0) == 0 && __any_sync(kAll, lane == 31) == 1;
  good &= __all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 9) == 0;
  good &= __reduce_min_sync(kAll, static_cast<int>(lane ^ 21) - 7) == -7;
  good &= __reduce_min_sync(kAll, 4000000000u + (lane ^ 9)) == 4000000000u;
  good &= __reduce_add_sync(kAll, static_cast<int>(lane) - 20) == 496 - 640;
  __syncwarp();
  bad[threadIdx.x] = !good;
}

void check_warps() {
  std::vector<int> bad(64, 1);
  launch({"warps", {1}, 64}, warps, bad.data());
  expect(bad == std::vector<int>(64), "shuffles, votes and reductions");
  expect(__popc(0xf0f0u) == 8 && __ffs(0) == 0 && __ffs(8) == 4, "bits");
  expect(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "leading zeros");
}

// Every thread of the grid takes a place in a list, and lowers a minimum.
__global__ void atomics(unsigned* length, unsigned* list, double* least) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  list[atomicAdd(length, 1u)] = thread;
  atomic_least(least + thread % 2, 1 + static_cast<double>(thread ^ 77));
  if (thread == 33) atomic_least(least, -1);
}

void check_atomics() {
  unsigned length = 0;
  std::vector<unsigned> list(5 * 64);
  double least[2] = {INFINITY, INFINITY};
  launch({"atomics", {5}, 64}, atomics, &length, list.data(), least);
  expect(length == list.size(), "additions");
  std::sort(list.begin(), list.end());
  for (unsigned i = 0; i < list.size(); ++i) expect(list[i] == i, "places");
  expect(least[0] == -1 && least[1] == 1, "minima");
}

__global__ void mathematics(float* out) {
  if (threadIdx.x != 0) return;
  const float x = 0.25f;
  static_assert(std::is_same<decltype(exp(x)), float>::value, "");
  static_assert(std::is_same<decltype(::fmax(x, x)), float>::value, "");
  out[0] = exp(x) + log(x) + log1p(x) + expm1(x) + sqrt(x) + fmin(x, x) + fmax(x, x) + fabs(x);
  out[1] = static_cast<float>(::exp(0.0) + ::isnan(x) + ::isinf(x) + isnan(0.0) + isinf(0.0));
  static_assert(alignof(float4) == 16 && alignof(uint4) == 16 && alignof(double2) == 16, "");
  static_assert(alignof(float2) == 8 && alignof(uint2) == 8, "");
}

// ---- products -------------------------------------------------------------------------------

struct Product {
  const float *a, *b;  // 16 × 8, 8 × 8
  float* d;            // 16 × 8
};

__global__ void multiply(Product p) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  auto bits = [](float v) {
    std::uint32_t u;
    std::memcpy(&u, &v, sizeof u);
    return u;
  };
  const std::uint32_t a[4] = {bits(p.a[g * 8 + t]), bits(p.a[(g + 8) * 8 + t]),
                              bits(p.a[g * 8 + t + 4]), bits(p.a[(g + 8) * 8 + t + 4])};
  const std::uint32_t b[2] = {bits(p.b[t * 8 + g]), bits(p.b[(t + 4) * 8 + g])};
  float* rows[2] = {p.d + g * 8 + 2 * t, p.d + (g + 8) * 8 + 2 * t};
  float d[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  multiply_add(d, a, b);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = d[i];
}

float without_low_bits(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return float_of(u >> 13 << 13);
}

void check_product() {
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  std::vector<float> a(128), b(64), d(128);
  for (auto* values : {&a, &b, &d})
    for (float& v : *values) v = normal(engine);
  std::vector<float> expected = d;
  for (int i = 0; i < 128; ++i) {
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += static_cast<double>(without_low_bits(a[i / 8 * 8 + k])) *
             without_low_bits(b[k * 8 + i % 8]);
    expected[i] = static_cast<float>(sum);
    if (std::fabs(expected[i]) > std::fabs(sum)) expected[i] = std::nextafter(expected[i], 0.0f);
  }
  launch({"multiply", {1}, 32}, multiply, Product{a.data(), b.data(), d.data()});
  expect(d == expected, "multiply_add");
}

struct Halves {
  const std::uint16_t *a, *b;  // (16 × 16) and (16 × 8)
  float* d;
};

__global__ void multiply_in_halves(Halves p) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto two = [](std::uint16_t first, std::uint16_t second) {
    return first | static_cast<std::uint32_t>(second) << 16;
  };
  std::uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const std::uint16_t* at = p.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    a[i] = two(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const std::uint16_t* at = p.b + (2 * t + 8 * i) * 8 + g;
    b[i] = two(at[0], at[8]);
  }
  float* rows[2] = {p.d + g * 8 + 2 * t, p.d + (g + 8) * 8 + 2 * t};
  float d[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  multiply_add_halves(d, a, b);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = d[i];
}

void check_product_of_halves() {
  std::mt19937 engine(6);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> a(256), b(128);
  for (auto* values : {&a, &b})
    for (std::uint16_t& v : *values) v = half_of(normal(engine));
  std::vector<float> d(128);
  for (float& v : d) v = normal(engine);
  std::vector<float> expected = d;
  for (int i = 0; i < 128; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum +=
          static_cast<double>(half_to_float(a[i / 8 * 16 + k])) * half_to_float(b[k * 8 + i % 8]);
    expected[i] = static_cast<float>(sum);
    if (std::fabs(expected[i]) > std::fabs(sum)) expected[i] = std::nextafter(expected[i], 0.0f);
  }
  launch({"multiply_in_halves", {1}, 32}, multiply_in_halves, Halves{a.data(), b.data(), d.data()});
  expect(d == expected, "multiply_add_halves");
}

struct WideHalves {
  const std::uint16_t *a, *b;  // (64, 32), (32, 64)
  float* d;                    // (64, 64)
};

// d = a b, or d += a b, by a warpgroup, in two products. If `apart`, d may be used between them.
__global__ void multiply_in_warpgroup(const WideHalves p, bool adds, bool apart) {
  const unsigned thread = threadIdx.x, g = thread % 32 / 4, t = thread % 4;
  auto* const b = reinterpret_cast<std::uint16_t*>(shared_memory());  // piece, column, 8 rows
  for (unsigned i = thread; i < 32 * 64; i += 128)
    b[(i / 64 / 8 * 64 + i % 64) * 8 + i / 64 % 8] = p.b[i];
  publish_shared();
  __syncthreads();
  std::uint32_t a[2][4];
  for (unsigned step = 0; step < 2; ++step)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = 16 * (thread / 32) + g + i % 2 * 8, k = 16 * step + 2 * t + i / 2 * 8;
      a[step][i] = p.a[row * 32 + k] | static_cast<std::uint32_t>(p.a[row * 32 + k + 1]) << 16;
    }
  float d[8][4];
  const auto at = [&](unsigned n, unsigned e) -> float& {
    return p.d[(16 * (thread / 32) + g + e / 2 * 8) * 64 + 8 * n + 2 * t + e % 2];
  };
  for (unsigned n = 0; n < 8; ++n)
    for (unsigned e = 0; e < 4; ++e) d[n][e] = at(n, e);
  keep_in_place(d);
  begin_products();
  begin_product(d, a[0], b, 64 * 16, adds);
  commit_products();
  expect(std::isnan(d[3][2]), "a product that is under way has no result");
  if (apart) wait_products<0>();
  begin_product(d, a[1], b + 2 * 64 * 8, 64 * 16);
  commit_products();
  wait_products<1>();
  wait_products<0>();
  for (unsigned n = 0; n < 8; ++n)
    for (unsigned e = 0; e < 4; ++e) at(n, e) = d[n][e];
}

void check_product_of_warpgroup() {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> a(64 * 32), b(32 * 64);
  for (auto* values : {&a, &b})
    for (std::uint16_t& v : *values) v = half_of(normal(engine));
  std::vector<float> start(64 * 64);
  for (float& v : start) v = normal(engine);
  for (const bool adds : {false, true}) {
    std::vector<float> expected = adds ? start : std::vector<float>(64 * 64);
    for (int i = 0; i < 64 * 64; ++i)
      for (int step = 0; step < 2; ++step) {
        double sum = expected[i];
        for (int k = 16 * step; k < 16 * step + 16; ++k)
          sum += static_cast<double>(half_to_float(a[i / 64 * 32 + k])) *
                 half_to_float(b[k * 64 + i % 64]);
        expected[i] = static_cast<float>(sum);
        if (std::fabs(expected[i]) > std::fabs(sum))
          expected[i] = std::nextafter(expected[i], 0.0f);
      }
    for (const bool apart : {false, true}) {
      std::vector<float> d = start;
      launch({"multiply_in_warpgroup", {1}, 128, 32 * 64 * 2}, multiply_in_warpgroup,
             WideHalves{a.data(), b.data(), d.data()}, adds, apart);
      expect(d == expected, "begin_product");
    }
  }
}

struct TensorProduct {
  const std::uint16_t *a, *b;  // (128, 16), (16, 64)
  float* d;                    // (128, 64)
};

// d = a b in tensor memory, or d = a b + a b, and back through it once more.
__global__ void multiply_in_tensor_memory(const TensorProduct p, bool twice) {
  struct Memory {
    std::uint16_t a[2][128][8], b[2][64][8];
    std::uint64_t done;
    std::uint32_t at;
  };
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (warp == 0) take_tensor_memory<128>(&shared.at);
  if (thread == 0) start_signal(&shared.done);
  for (int i = thread; i < 128 * 16; i += 128) shared.a[i % 16 / 8][i / 16][i % 8] = p.a[i];
  for (int i = thread; i < 16 * 64; i += 128) shared.b[i / 64 / 8][i % 64][i / 64 % 8] = p.b[i];
  publish_shared();
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  const std::uint32_t at = shared.at, own = at + (32u * static_cast<unsigned>(warp) << 16);
  if (warp == 0 && is_elected()) {
    const auto begin = [&](bool adds) {
      begin_product_in_memory<64>(at, shared.a, sizeof shared.a[0], shared.b, sizeof shared.b[0],
                                  adds);
    };
    begin(false);
    if (twice) begin(true);
    signal_products(&shared.done);
  }
  wait_for_signal(&shared.done, 0);
  order_after_barrier();
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned column = 0; column < 64; column += 32) {
      const std::uint32_t place = own + (16 * half << 16) + column;
      float d[4][4];
      load_tensor_memory(d, place);
      expect(std::isnan(d[1][1]), "what is loaded is there after the wait");
      wait_loads();
      store_tensor_memory(place + 64, d);
      wait_stores();
      load_tensor_memory(d, place + 64);
      wait_loads();
      for (int n = 0; n < 4; ++n)
        for (int e = 0; e < 4; ++e) {
          const unsigned row = 32 * warp + 16 * half + lane / 4 + e / 2 * 8;
          p.d[row * 64 + column + 8 * n + 2 * (lane % 4) + e % 2] = d[n][e];
        }
    }
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  if (warp == 0) return_tensor_memory<128>(at);
}

// d = a b with a in tensor memory, too. A lane has a row of a and of d.
__global__ void multiply_what_is_in_tensor_memory(const TensorProduct p, bool twice) {
  struct Memory {
    std::uint16_t b[2][64][8];
    std::uint64_t done;
    std::uint32_t at;
  };
  Memory& shared = *reinterpret_cast<Memory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  if (warp == 0) take_tensor_memory<128>(&shared.at);
  if (thread == 0) start_signal(&shared.done);
  for (int i = thread; i < 16 * 64; i += 128) shared.b[i / 64 / 8][i % 64][i / 64 % 8] = p.b[i];
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  const std::uint32_t at = shared.at, own = at + (32u * static_cast<unsigned>(warp) << 16);
  std::uint32_t words[16] = {};
  for (int k = 0; k < 16; ++k)
    words[8 + k / 2] |= static_cast<std::uint32_t>(p.a[thread * 16 + k]) << 16 * (k % 2);
  store_tensor_memory(own + 64, words);
  wait_stores();
  publish_shared();
  order_before_barrier();
  __syncthreads();
  if (warp == 0 && is_elected()) {
    order_after_barrier();
    for (int turn = 0; turn <= (twice ? 1 : 0); ++turn)
      begin_product_in_memory<64>(at, at + 64 + 8, shared.b, sizeof shared.b[0], turn > 0);
    signal_products(&shared.done);
  }
  wait_for_signal(&shared.done, 0);
  order_after_barrier();
  for (int column = 0; column < 64; column += 32) {
    float d[32];
    load_tensor_memory(d, own + static_cast<unsigned>(column));
    expect(std::isnan(d[31]), "what is loaded is there after the wait");
    wait_loads();
    std::memcpy(p.d + thread * 64 + column, d, sizeof d);
  }
  order_before_barrier();
  __syncthreads();
  order_after_barrier();
  if (warp == 0) return_tensor_memory<128>(at);
}

void check_product_in_tensor_memory() {
  std::mt19937 engine(8);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> a(128 * 16), b(16 * 64);
  for (auto* values : {&a, &b})
    for (std::uint16_t& v : *values) v = half_of(normal(engine));
  for (const bool twice : {false, true}) {
    std::vector<float> expected(128 * 64);
    for (int i = 0; i < 128 * 64; ++i)
      for (int turn = 0; turn <= (twice ? 1 : 0); ++turn) {
        double sum = expected[i];
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(half_to_float(a[i / 64 * 16 + k])) *
                 half_to_float(b[k * 64 + i % 64]);
        expected[i] = static_cast<float>(sum);
        if (std::fabs(expected[i]) > std::fabs(sum))
          expected[i] = std::nextafter(expected[i], 0.0f);
      }
    for (auto* kernel : {multiply_in_tensor_memory, multiply_what_is_in_tensor_memory}) {
      std::vector<float> d(128 * 64);
      launch({"multiply", {1}, 128, 2 * 192 * 16 + 16}, kernel,
             TensorProduct{a.data(), b.data(), d.data()}, twice);
      expect(d == expected, "begin_product_in_memory");
    }
  }
}

void check_rounding_to_halves() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float v = half_to_float(static_cast<std::uint16_t>(bits));
    if (v == v) expect(half_of(v) == bits, "a float16 value stays as it is");
  }
  expect(half_of(65519) == 0x7bff && half_of(65520) == 0x7c00, "the largest half");
  expect(half_of(1 + 0x1p-11f) == 0x3c00 && half_of(1 + 0x1.8p-10f) == 0x3c02, "ties to even");
  expect(half_of(1 + 0x1.1p-11f) == 0x3c01 && half_of(-0x1p-25f) == 0x8000, "to the nearest");
  expect(half_of(0x1.8p-25f) == 1 && half_of(0x1.fffp-15f) == 0x0400, "subnormal halves");
  expect(halves_of(1, -2) == 0xc0003c00, "halves_of");
}

void check_conversions() {
  expect(bits_of(1.0f) == 0x3f800000 && float_of(0xc0400000) == -3, "bits of a float");
  expect(half_to_float(0x3c00) == 1 && half_to_float(0xc500) == -5, "half_to_float");
  expect(half_to_float(1) == 0x1p-24f && half_to_float(0x7bff) == 65504, "half_to_float's range");
  expect(half_to_float(0xfc00) == -INFINITY && std::isnan(half_to_float(0x7e00)), "special halves");
  expect(std::signbit(half_to_float(0x8000)), "half_to_float of -0");
}

// ---- launches -------------------------------------------------------------------------------

void expect_refusal(const Launch& shape, const std::string& what) {
  int unused = 0;
  try {
    launch(shape, indices, &unused);
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find(shape.kernel) == 0, "a refusal names the kernel");
    return;
  }
  fail("launched in spite of " + what);
}

void check_launches() {
  const Stream stream(kPlace);
  expect(stream.multiprocessors() == 4, "default device");
  expect(stream.architecture("indices", indices) == 90, "default architecture");
  expect_refusal({"shared", {1}, 32, 232449}, "its shared memory");
  expect_refusal({"threads", {1}, 33}, "its threads");
  expect_refusal({"threads", {1}, 1056}, "its threads");
  expect_refusal({"grid", {1, 65536}, 32}, "its grid's y");
  expect_refusal({"grid", {1, 1, 65536}, 32}, "its grid's z");
  shim::set_device(8, 80, 1000);
  expect_refusal({"shared", {1}, 32, 1001}, "the device's limit");
  shim::set_device(4, 90, 232448);
  shim::clear_launches();
  std::vector<int> out(64);
  launch({"none", {0}, 64}, indices, out.data());
  launch({"first", {1}, 64}, indices, out.data());
  float values[2];
  launch({"second", {1}, 32}, mathematics, values);
  expect(shim::launches() == std::vector<std::string>{"first", "second"}, "the list of launches");
}

void check_host_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([] {
      for (int repeat = 0; repeat < 3; ++repeat) check_warps();
    });
  for (std::thread& thread : threads) thread.join();
}

// ---- what must fail -------------------------------------------------------------------------

__global__ void never_waits(const float* from) {
  copy_async<4>(shared_memory() + 4 * threadIdx.x, from);
  commit_copies();
}
__global__ void off_boundary(const float* from) { copy_async<16>(shared_memory(), from + 1); }
__global__ void copies_outside(float* memory) { copy_async<4>(memory, memory); }
__global__ void parts() {
  if (threadIdx.x <= 32)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void mixed() {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __any_sync(kAll, 1);
}
__global__ void ends_early() {
  if (threadIdx.x != 5) __syncthreads();
}
__global__ void part_of_a_warp() { __syncwarp(0xffff); }
__global__ void overrun() { shared_memory()[4 * threadIdx.x + 3] = 0; }

__global__ void neighbours(int* out, int barrier) {
  auto* memory = reinterpret_cast<int*>(shared_memory());
  memory[threadIdx.x] = 1;
  if (barrier == 1) __syncthreads();
  if (barrier == 2) __syncwarp();
  if (barrier == 3) __shfl_sync(kAll, 1, 0);
  if (barrier == 4) __ballot_sync(kAll, 1);
  out[threadIdx.x] = memory[threadIdx.x ^ 1];
}
// Barriers before the accesses do not order the accesses.
__global__ void after_a_barrier(int* out) {
  auto* memory = reinterpret_cast<int*>(shared_memory());
  for (int i = 0; i < 4; ++i) __syncthreads();
  memory[threadIdx.x] = 1;
  out[threadIdx.x] = memory[threadIdx.x ^ 1];
  __syncthreads();
}
__global__ void same_place(int* out) {
  if (threadIdx.x == 0) *out = static_cast<int>(blockIdx.x);
}
// The blocks in between do not write.
__global__ void ends_of_grid(int* out) {
  if (blockIdx.x % 11 == 0) out[threadIdx.x] = static_cast<int>(blockIdx.x);
}
__global__ void early_read(const int* from, int* out) {
  auto* memory = reinterpret_cast<int*>(shared_memory());
  copy_async<4>(memory + threadIdx.x, from + threadIdx.x);
  commit_copies();
  __syncthreads();
  wait_copies<0>();
  out[threadIdx.x] = memory[threadIdx.x ^ 1];
}

void neighbours_with(int barrier) {
  int out[32];
  launch({"neighbours", {1}, 32, 128}, neighbours, out, barrier);
}

enum class Finder { shim, address, thread, none };

struct Scenario {
  const char *name, *message;
  Finder finder;
  std::function<void()> body;
};

alignas(16) float some_floats[256];
int some_ints[1024];

// 0: nothing waits for the product. 1: its operand changes. 2: copies are not published. 3: another
// product replaces it. 4: nothing is wrong; copies are published before the last barrier.
__global__ void product(const float* from, int what) {
  copy_async<16>(shared_memory() + 16 * threadIdx.x, from);
  commit_copies();
  wait_copies<0>();
  if (what == 4) __syncthreads();
  if (what != 2) publish_shared();
  __syncthreads();
  float d[8][4] = {};
  std::uint32_t a[4] = {};
  begin_products();
  begin_product(d, a, shared_memory(), 1024);
  commit_products();
  if (what == 0) return;
  if (what == 3) begin_product(d, a, shared_memory(), 1024, false);
  if (what != 4) a[2] = 1;
  wait_products<0>();
}

const Scenario kScenarios[] = {
    {"unwaited", "kernel never_waits: thread 0 of block (0, 0, 0) ends and never waited",
     Finder::shim, [] { launch({"never_waits", {1}, 32, 128}, never_waits, some_floats); }},
    {"unwaited product", "ends and never waited for its products", Finder::shim,
     [] { launch({"product", {1}, 128, 4096}, product, some_floats, 0); }},
    {"changed operand", "changes an operand of a product that is under way", Finder::shim,
     [] { launch({"product", {1}, 128, 4096}, product, some_floats, 1); }},
    {"unpublished", "multiplies what was not published before a barrier", Finder::shim,
     [] { launch({"product", {1}, 128, 4096}, product, some_floats, 2); }},
    {"dropped product", "drops a product that is under way", Finder::shim,
     [] { launch({"product", {1}, 128, 4096}, product, some_floats, 3); }},
    {"boundary", "off their boundary", Finder::shim,
     [] { launch({"off_boundary", {1}, 32, 128}, off_boundary, some_floats); }},
    {"outside", "not its block's shared memory", Finder::shim,
     [] { launch({"copies_outside", {1}, 32, 128}, copies_outside, some_floats); }},
    {"parts",
     "kernel parts: threads wait at different barriers, 33 at __syncthreads, 31 at __syncwarp",
     Finder::shim, [] { launch({"parts", {1}, 64}, parts); }},
    {"mixed", "kernel mixed: threads wait at different barriers: __any_sync and __syncwarp",
     Finder::shim, [] { launch({"mixed", {1}, 64}, mixed); }},
    {"early end", "kernel ends_early: threads wait for threads that ended, 63 at __syncthreads; 1",
     Finder::shim, [] { launch({"ends_early", {1}, 64}, ends_early); }},
    {"part", "calls __syncwarp for a part of its warp", Finder::shim,
     [] { launch({"part_of_a_warp", {1}, 32}, part_of_a_warp); }},
    {"overrun", "heap-buffer-overflow", Finder::address,
     [] { launch({"overrun", {1}, 32, 124}, overrun); }},
    {"no barrier", "data race", Finder::thread, [] { neighbours_with(0); }},
    {"shuffle only", "data race", Finder::thread, [] { neighbours_with(3); }},
    {"vote only", "data race", Finder::thread, [] { neighbours_with(4); }},
    {"after a barrier", "data race", Finder::thread,
     [] { launch({"after", {1}, 32, 128}, after_a_barrier, some_ints); }},
    {"after barriers of many", "data race", Finder::thread,
     [] { launch({"after", {1}, 1024, 4096}, after_a_barrier, some_ints); }},
    {"blocks", "data race", Finder::thread,
     [] { launch({"same_place", {2}, 32}, same_place, some_ints); }},
    {"distant blocks", "data race", Finder::thread,
     [] { launch({"ends_of_grid", {12}, 256}, ends_of_grid, some_ints); }},
    {"early read", "data race", Finder::thread,
     [] { launch({"early", {1}, 32, 128}, early_read, some_ints, some_ints + 32); }},
    {"barriers", "", Finder::none,
     [] {
       for (unsigned order = 0; order < 4; ++order) {
         shim::set_order(order);
         for (int barrier = 1; barrier < 3; ++barrier) neighbours_with(barrier);
       }
     }},
    {"published late", "", Finder::none,
     [] {
       for (unsigned order = 0; order < 4; ++order) {
         shim::set_order(order);
         launch({"product", {1}, 128, 4096}, product, some_floats, 4);
       }
     }},
    {"two grids", "", Finder::none,
     [] {
       for (int repeat = 0; repeat < 3; ++repeat)
         launch({"same_place", {1}, 32}, same_place, some_ints);
       some_ints[0] = 1;
     }},
};

bool applies(Finder finder) {
  return finder == Finder::shim || finder == Finder::none ||
         (finder == Finder::address && kAddressSanitizer) ||
         (finder == Finder::thread && kThreadSanitizer);
}

void check_scenario(const std::string& program, const Scenario& scenario) {
  const std::string command = "ulimit -c 0; ASAN_OPTIONS=\"$ASAN_OPTIONS symbolize=0\" " +
                              ("TSAN_OPTIONS=\"$TSAN_OPTIONS halt_on_error=1 symbolize=0\" '" +
                               program + "' '" + scenario.name + "' 2>&1");
  std::FILE* child = popen(command.c_str(), "r");
  expect(child != nullptr, "popen");
  std::string output;
  for (int c; (c = std::fgetc(child)) != EOF;) output += static_cast<char>(c);
  const bool ended_well = pclose(child) == 0;
  expect(ended_well == (scenario.finder == Finder::none) &&
             output.find(scenario.message) != std::string::npos,
         std::string("scenario ") + scenario.name + ":\n" + output);
}

void check_scenarios() {
  char program[4096] = {};
  expect(readlink("/proc/self/exe", program, sizeof program - 1) > 0, "the program's path");
  for (const Scenario& scenario : kScenarios)
    if (applies(scenario.finder)) check_scenario(program, scenario);
}

int run_scenario(const std::string& name) {
  for (const Scenario& scenario : kScenarios)
    if (name == scenario.name) return scenario.body(), 0;
  return std::fprintf(stderr, "no scenario %s\n", name.c_str()), 2;
}

// ---- counts ---------------------------------------------------------------------------------

__global__ void nothing() {}

// Block b does everything b times, products only in its first warp.
__global__ void counted_work(const float* from) {
  if (threadIdx.x % 2) wait_for_earlier_launches();
  const unsigned times = blockIdx.x + gridDim.x * blockIdx.y;
  const std::uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  for (unsigned i = 0; i < times; ++i) {
    __syncthreads();
    __shfl_xor_sync(kAll, 1, 1);
    if (threadIdx.x < 32) multiply_add(d, a, b), multiply_halves(d, a, b);
    copy_async<16>(shared_memory() + 16 * threadIdx.x, from, 8);
  }
  if (times > 0) wait_for_earlier_launches();  // too late
  commit_copies();
  wait_copies<0>();
}

void check_counts() {
  const Launch shape = {"counted_work", {3, 2}, 64, 1024};
  launch(shape, counted_work, some_floats);
  expect(shim::count(true).empty(), "nothing is counted at first");
  launch({"indices", {0}, 64}, indices, static_cast<int*>(nullptr));
  launch(shape, counted_work, some_floats);
  launch({"nothing", {1}, 32}, nothing);
  const std::vector<shim::LaunchCounts> counts = shim::count(false);
  launch(shape, counted_work, some_floats);
  expect(shim::count(false).empty(), "counting has stopped");

  expect(counts.size() == 2 && counts[1].kernel == "nothing", "empty grids are not launched");
  const shim::LaunchCounts& one = counts[0];
  expect(one.kernel == "counted_work" && one.grid == std::array<std::int64_t, 3>{3, 2, 1} &&
             one.threads == 64 && one.shared == 1024,
         "the shape of the launch");
  const std::map<std::string, std::int64_t> once = {{"__syncthreads", 1},
                                                    {"__shfl_xor_sync", 2},
                                                    {"multiply_add", 1},
                                                    {"multiply_add_halves", 1},
                                                    {"copied", 64 * 8}};
  for (const auto& [name, values] : one.blocks)
    for (int block = 0; block < 6; ++block) {
      const auto expected = once.find(name);
      const bool waits = name == "wait_for_earlier_launches";
      expect(values.at(block) == (waits                    ? 32
                                  : expected == once.end() ? 0
                                                           : block * expected->second),
             "the count of " + name);
    }
  expect(one.blocks.size() > once.size() &&
             counts[1].blocks.at("copied") == std::vector<std::int64_t>{0},
         "every call has a count");
}

// ---- times ----------------------------------------------------------------------------------

__global__ void many_products(float* out, int count) {
  float d[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < count; ++i) multiply_add(d, a, b);
  out[threadIdx.x] = d[0];
}
__global__ void many_barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}
__global__ void many_shuffles(int count) {
  for (int i = 0; i < count; ++i) __shfl_xor_sync(kAll, 1.0f, 1);
}
void time(const char* what, int count, const std::function<void(int)>& body) {
  body(1);
  const auto start = std::chrono::steady_clock::now();
  body(count);
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  std::printf("%-44s %8.2f µs\n", what, taken.count() / count);
}

int print_times() {
  const int n = kThreadSanitizer ? 50 : 5000;
  std::vector<float> out(256);
  time("multiply_add of a warp", n,
       [&](int count) { launch({"many_products", {1}, 32}, many_products, out.data(), count); });
  time("multiply_add of 8 warps", n,
       [&](int count) { launch({"many_products", {1}, 256}, many_products, out.data(), count); });
  time("shuffle of a warp", n,
       [&](int count) { launch({"many_shuffles", {1}, 32}, many_shuffles, count); });
  time("__syncthreads of 256 threads", n,
       [&](int count) { launch({"many_barriers", {1}, 256}, many_barriers, count); });
  time("a block of 256 threads that do nothing", n / 10,
       [&](int count) { launch({"nothing", {count}, 256, 1024}, nothing); });
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "times") return print_times();
  if (count > 1) return run_scenario(arguments[1]);
  for (unsigned order = 0; order < 4; ++order) {
    shim::set_order(order);
    check_indices();
    check_copies();
    check_warps();
    check_atomics();
    check_product();
    check_product_of_halves();
    check_product_of_warpgroup();
    check_product_in_tensor_memory();
    check_counts();
  }
  check_orders();
  check_equal_bits();
  check_conversions();
  check_rounding_to_halves();
  check_launches();
  check_host_threads();
  check_scenarios();
  std::puts("the shim works");
  return 0;
}
