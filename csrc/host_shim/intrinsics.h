// The names of CUDA C++ and of cuda/intrinsics.h for the host. Kernels compile as plain C++17, and
// Stream::launch runs their threads as fibers of the calling thread (fibers.cpp). A fiber runs
// until it meets a barrier. So a kernel must not spin until another thread writes something.
#pragma once
#include <math.h>  // unlike <cmath> alone, it has float overloads in the global namespace

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The indices and sizes of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace pfgm {
namespace shim {

// The order in which threads and blocks continue if several can: 0 ascending, 1 descending,
// otherwise random with this seed. In a random order warps also overtake each other.
void set_order(unsigned seed);

constexpr int kCache = 40 << 20;  // bytes of the L2 cache, if no others are given

// What Stream reports about the device; initially 4, 90, 232448, kCache.
void set_device(int multiprocessors, int capability, std::size_t shared_limit,
                int l2_cache = kCache);

// The kernels launched since clear_launches(), in order.
std::vector<std::string> launches();
void clear_launches();

enum class Call {
  none,
  syncthreads,
  syncwarp,
  shuffle,
  shuffle_xor,
  any,
  all,
  ballot,
  reduce_min,
  reduce_add,
  multiply_add,
  multiply_add_halves,
  begin_product,
  take_tensor_memory,
  return_tensor_memory,
  load_tensor_memory,
  store_tensor_memory,
  wait_for_signal,
  begin_product_in_memory,
  is_elected,
  end
};

// What lane `source` of the warp brought to this call. All 32 lanes take part.
std::uint64_t exchange(Call call, unsigned mask, std::uint64_t mine, unsigned source);
// One bit per lane.
unsigned vote(Call call, unsigned mask, bool mine);
// What each lane brought to this call.
void gather(Call call, unsigned mask, std::uint32_t mine, std::uint32_t (&all)[32]);
void begin_copy(void* to, const void* from, int bytes, int valid);
void wait_copies(int pending);
void wait_products(int pending);
void take_tensor_memory(std::uint32_t* at, int columns);
void return_tensor_memory(std::uint32_t memory, int columns);
void begin_product_in_memory(std::uint32_t d, const void* a, int a_apart, const void* b,
                             int b_apart, int columns, bool adds);
void begin_product_in_memory(std::uint32_t d, std::uint32_t a, const void* b, int b_apart,
                             int columns, bool adds);

template <class T>
T shuffle(Call call, unsigned mask, T mine, unsigned source) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = exchange(call, mask, bits, source % 32);
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}

}  // namespace shim

// The shim runs launches one after the other. It counts the call.
void wait_for_earlier_launches();
inline void let_next_launch_start() {}

char* shared_memory();

// The bytes arrive when the thread waits for them and not before. Until then they are NaN.
template <int BYTES>
void copy_async(void* to, const void* from, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 16);
  shim::begin_copy(to, from, BYTES, valid);
}
void commit_copies();
template <int PENDING>
void wait_copies() {
  shim::wait_copies(PENDING);
}

inline float exponential(float v) { return exp2f(v * 1.44269504f); }
inline float rounded_product(float a, float b) { return a * b; }
inline float float_of(std::uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline double double_of(std::int64_t bits) {
  double v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline std::int64_t bits_of(double v) {
  std::int64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// The sum is truncated, as in matrix units. They also truncate intermediate sums; this does not.
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void multiply_add_halves(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
inline void multiply_halves(float (&d)[4], const std::uint32_t (&a)[4],
                            const std::uint32_t (&b)[2]) {
  for (float& each : d) each = 0;
  multiply_add_halves(d, a, b);
}

// The products are computed when the thread waits for them and not before. Until then d is NaN.
// Each warp of the warpgroup meets for itself.
void begin_products();
void begin_product(float (&d)[8][4], const std::uint32_t (&a)[4], const void* b, int apart,
                   bool adds = true);
void commit_products();
template <int PENDING>
void wait_products() {
  shim::wait_products(PENDING);
}
void publish_shared();
template <int COLUMNS>
void keep_in_place(float (&)[COLUMNS][4]) {}
template <int COUNT>
void keep_in_place(float (&)[COUNT]) {}

// Products in tensor memory are computed when a thread waits for their signal. Until then d is NaN.
// All threads of a block must wait at the same time, each for any signal, and meet there, which
// they do not on a GPU. What is loaded is NaN until the thread waits for it, and so is what is
// stored.
template <int COLUMNS>
void take_tensor_memory(std::uint32_t* at) {
  static_assert(COLUMNS >= 32 && COLUMNS <= 512 && (COLUMNS & (COLUMNS - 1)) == 0);
  shim::take_tensor_memory(at, COLUMNS);
}
template <int COLUMNS>
void return_tensor_memory(std::uint32_t memory) {
  shim::return_tensor_memory(memory, COLUMNS);
}
void start_signal(std::uint64_t* signal);
bool is_elected();
template <int COLUMNS>
void begin_product_in_memory(std::uint32_t d, const void* a, int a_apart, const void* b,
                             int b_apart, bool adds) {
  shim::begin_product_in_memory(d, a, a_apart, b, b_apart, COLUMNS, adds);
}
template <int COLUMNS>
void begin_product_in_memory(std::uint32_t d, std::uint32_t a, const void* b, int b_apart,
                             bool adds) {
  shim::begin_product_in_memory(d, a, b, b_apart, COLUMNS, adds);
}
void signal_products(std::uint64_t* signal);
void wait_for_signal(std::uint64_t* signal, int turn);
void order_before_barrier();
void order_after_barrier();
void load_tensor_memory(float (&d)[4][4], std::uint32_t from);
void load_tensor_memory(float (&d)[32], std::uint32_t from);
void store_tensor_memory(std::uint32_t to, const float (&d)[4][4]);
void store_tensor_memory(std::uint32_t to, const std::uint32_t (&d)[16]);
void wait_loads();
void wait_stores();

inline void atomic_least(double* at, double value) {
  double found;
  __atomic_load(at, &found, __ATOMIC_RELAXED);
  while (bits_of(value) < bits_of(found) &&
         !__atomic_compare_exchange(at, &found, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t exponent = bits >> 10 & 31, rest = bits & 0x7fffu;
  const float size = exponent == 31 ? (rest & 1023u ? NAN : INFINITY)
                     : exponent     ? float_of((rest << 13) + 0x38000000u)
                                    : static_cast<float>(rest) * 0x1p-24f;
  return bits >> 15 ? -size : size;
}

// Rounds to the nearest, ties to even.
inline std::uint16_t half_of(float v) {
  const std::uint16_t sign = static_cast<std::uint16_t>(bits_of(v) >> 16 & 0x8000u);
  const float size = std::fabs(v);
  if (v != v) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (size >= 65520) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (size < 0x1p-14f)  // a multiple of 2^-24; the sum rounds to it
    return static_cast<std::uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
  const std::uint32_t bits = bits_of(size), rounded = bits + 0xfffu + (bits >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline std::uint32_t halves_of(float first, float second) {
  return half_of(first) | static_cast<std::uint32_t>(half_of(second)) << 16;
}

// Matrix units round sums in float16 to the nearest (Fasi et al., Numerical behavior of NVIDIA
// tensor cores, 2021).
inline void multiply_add_halves(std::uint32_t (&d)[2], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
  float sums[4];
  for (int i = 0; i < 4; ++i)
    sums[i] = half_to_float(static_cast<std::uint16_t>(d[i / 2] >> i % 2 * 16));
  multiply_add_halves(sums, a, b);
  d[0] = halves_of(sums[0], sums[1]), d[1] = halves_of(sums[2], sums[3]);
}

inline float2 add_pairs(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
inline float2 subtract_pairs(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }

inline float reciprocal(float v) { return 1 / v; }
inline float square_root(float v) { return sqrtf(v); }
inline float logarithm(float v) { return logf(v); }

}  // namespace pfgm

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffff);

template <class T>
T __shfl_sync(unsigned mask, T v, int source) {
  return pfgm::shim::shuffle(pfgm::shim::Call::shuffle, mask, v, static_cast<unsigned>(source));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  return pfgm::shim::shuffle(pfgm::shim::Call::shuffle_xor, mask, v,
                             threadIdx.x ^ static_cast<unsigned>(lane_mask));
}

template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4);
  std::uint32_t all[32];
  pfgm::shim::gather(pfgm::shim::Call::reduce_min, mask, static_cast<std::uint32_t>(v), all);
  for (const std::uint32_t each : all) v = static_cast<T>(each) < v ? static_cast<T>(each) : v;
  return v;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4);
  std::uint32_t all[32], sum = 0;
  pfgm::shim::gather(pfgm::shim::Call::reduce_add, mask, static_cast<std::uint32_t>(v), all);
  for (const std::uint32_t each : all) sum += each;
  return static_cast<T>(sum);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return pfgm::shim::vote(pfgm::shim::Call::ballot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return pfgm::shim::vote(pfgm::shim::Call::any, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return pfgm::shim::vote(pfgm::shim::Call::all, mask, predicate != 0) == 0xffffffff;
}

// Bytes of b:a, as many as four digits of `selector` say.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i)
    found |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  return found;
}
// Atomic, like those of CUDA: no fiber can come between, and ThreadSanitizer sees no race.
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
[[noreturn]] inline void __trap() { std::abort(); }
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
