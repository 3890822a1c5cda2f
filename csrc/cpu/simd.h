// Vectors, element types, memory and threads for the CPU kernels, compiled once per instruction
// set.
//
// Everything in the headers that the kernels include has internal linkage, and they instantiate no
// standard function template. Otherwise the linker might use a function compiled for AVX-512 in the
// portable build.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "api/posterior_mean.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

using Index = std::int64_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A register tile holds kTileQueries × kTileVectors vectors of sums and leaves registers for
// operands.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileQueries = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileQueries = 6, kTileVectors = 2;
#else
constexpr int kVectorBytes = 16, kTileQueries = 4, kTileVectors = 2;
#endif

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr Index lanes = kVectorBytes / sizeof(T);
  static constexpr Index tile = kTileVectors * lanes;
};

template <class T>
typename Simd<T>::Vector& vector_at(T* p) {
  return *reinterpret_cast<typename Simd<T>::Vector*>(p);
}
template <class T>
const typename Simd<T>::Vector& vector_at(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Vector*>(p);
}

// A vector that starts at any T.
template <class T>
typename Simd<T>::Vector load_unaligned(const T* from) {
  typename Simd<T>::Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
template <class T>
void store_unaligned(T* to, const typename Simd<T>::Vector& values) {
  std::memcpy(to, &values, sizeof values);
}

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
constexpr Index divide_up(Index n, Index by) { return (n + by - 1) / by; }
constexpr Index round_up(Index n, Index multiple) { return divide_up(n, multiple) * multiple; }

// ---- element types --------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T> inline T load(float v) { return static_cast<T>(v); }
template <class T> inline T load(double v) { return static_cast<T>(v); }
template <class T> inline T load(std::uint8_t v) { return static_cast<T>(v) / T(127.5) - T(1); }
// 2u − 255 is exact, and a product is many times faster than a quotient.
template <> inline float load<float>(std::uint8_t v) { return (2.0f * v - 255.0f) * (1 / 255.0f); }
template <class T> inline T load(BFloat16 v) {
  return static_cast<T>(from_bits(static_cast<std::uint32_t>(v.bits) << 16));
}
template <class T> inline T load(Float16 v) {
  // By integers: an operation on a subnormal number may give 0 (torch.set_flush_denormal).
  const std::uint32_t magnitude = v.bits & 0x7fffu, sign = (v.bits & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  std::uint32_t small, bits = (magnitude << 13) + (112u << 23);
  std::memcpy(&small, &subnormal, sizeof small);
  bits = magnitude < 0x400u ? small : bits;
  bits = magnitude >= 0x7c00u ? bits | 0x7f800000u : bits;
  return static_cast<T>(from_bits(bits | sign));
}

// Keeps the vectors in registers; `= {}` would also clear the memory that they might spill to.
template <class V, int kRows, int kColumns>
inline void set_zero(V (&vectors)[kRows][kColumns]) {
  for (int q = 0; q < kRows; ++q)
    for (int c = 0; c < kColumns; ++c) vectors[q][c] = V{};
}

// Loads one vector of elements from any address.
template <class T, class R>
typename Simd<T>::Vector load_vector(const R* p) {
  alignas(kVectorBytes) T values[Simd<T>::lanes];
  for (Index i = 0; i < Simd<T>::lanes; ++i) values[i] = load<T>(p[i]);
  return vector_at(values);
}

// ---- transposition --------------------------------------------------------------------------

template <int... kIndex> struct Indices {};
template <int kCount, int... kIndex>
struct CountTo : CountTo<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct CountTo<0, kIndex...> {
  using Type = Indices<kIndex...>;
};

// Swaps the odd blocks of a with the even blocks of b. A block is kHalf lanes.
template <class T, int kHalf, int... kIndex>
void swap_blocks(typename Simd<T>::Vector& a, typename Simd<T>::Vector& b, Indices<kIndex...>) {
  constexpr int lanes = Simd<T>::lanes;
#ifdef __clang__
  const auto low =
      __builtin_shufflevector(a, b, (kIndex & kHalf ? lanes + kIndex - kHalf : kIndex)...);
  b = __builtin_shufflevector(a, b, (kIndex & kHalf ? lanes + kIndex : kIndex + kHalf)...);
#else
  typedef std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t> Mask
      __attribute__((vector_size(kVectorBytes)));
  const auto low =
      __builtin_shuffle(a, b, Mask{(kIndex & kHalf ? lanes + kIndex - kHalf : kIndex)...});
  b = __builtin_shuffle(a, b, Mask{(kIndex & kHalf ? lanes + kIndex : kIndex + kHalf)...});
#endif
  a = low;
}

// Transposes a square of `lanes` vectors.
template <class T, int kHalf = Simd<T>::lanes / 2>
void transpose(typename Simd<T>::Vector* rows) {
  for (int i = 0; i < Simd<T>::lanes; ++i)
    if (!(i & kHalf))
      swap_blocks<T, kHalf>(rows[i], rows[i + kHalf], typename CountTo<Simd<T>::lanes>::Type());
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

// out[c] = the sum over the lanes of v[c], for kColumns vectors, a power of two. The last additions
// are in float64. v is overwritten.
template <class T, int kColumns, int kBlock = Simd<T>::lanes>
void sum_lanes(typename Simd<T>::Vector* v, double* out) {
  constexpr int lanes = Simd<T>::lanes, count = kColumns * kBlock / lanes;
  if constexpr (count > 1) {
    // Folds two vectors into one that takes blocks from both in turn.
    for (int i = 0; i < count / 2; ++i) {
      auto &a = v[i], &b = v[i + count / 2];
      swap_blocks<T, kBlock / 2>(a, b, typename CountTo<lanes>::Type());
      a += b;
    }
    sum_lanes<T, kColumns, kBlock / 2>(v, out);
  } else {
    for (int c = 0; c < kColumns; ++c) {
      out[c] = 0;
      for (int lane = 0; lane < kBlock; ++lane) out[c] += v[0][c * kBlock + lane];
    }
  }
}

// The same for kCount vectors, in batches that leave one addition for float64.
template <class T, int kCount>
void sum_all_lanes(typename Simd<T>::Vector* v, double* out) {
  constexpr int together = Simd<T>::lanes / 2;
  static_assert(kCount % together == 0);
  for (int i = 0; i < kCount; i += together) sum_lanes<T, together>(v + i, out + i);
}

// ---- elementary functions -------------------------------------------------------------------

using Doubles = Simd<double>::Vector;
typedef std::int64_t Longs __attribute__((vector_size(kVectorBytes), may_alias));
typedef std::uint64_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
constexpr Index kDoubles = Simd<double>::lanes;

constexpr float kLog2e = 1.44269504f;
constexpr double kLog2High = 0x1.62e42fefap-1, kLog2Low = 0x1.cf79abc9e3b39p-40;

// Σ_i coefficient[i] x^i. Each step halves the number of terms; one term after the other would wait
// for the latency of each operation.
template <int kTerms>
Doubles polynomial(const double (&coefficient)[kTerms], Doubles x) {
  Doubles terms[kTerms];
  for (int i = 0; i < kTerms; ++i) terms[i] = Doubles{} + coefficient[i];
  for (int count = kTerms; count > 1; count = (count + 1) / 2) {
    for (int i = 0; i < count / 2; ++i) terms[i] = terms[2 * i] + terms[2 * i + 1] * x;
    if (count % 2) terms[count / 2] = terms[count - 1];
    x *= x;
  }
  return terms[0];
}

// exp(x) for x ≤ 0 with a relative error of 2e-16; e^-700 for x below −700.
inline Doubles exponential(Doubles x) {
  // Adding `magic` rounds a small number to an integer, which is then in the low bits.
  constexpr double magic = 0x1.8p52;
  x = x > -700.0 ? x : Doubles{} - 700.0;
  const Doubles shifted = x * 0x1.71547652b82fep0 + magic;
  const Doubles n = shifted - magic;
  const Doubles r = x - n * kLog2High - n * kLog2Low;
  // clang-format off
  constexpr double taylor[] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                               1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800,
                               1.0 / 479001600};
  // clang-format on
  const Doubles p = polynomial(taylor, r);  // |r| ≤ log(2)/2, remainder 2e-16
  return reinterpret_cast<Doubles>(reinterpret_cast<Bits>(p) +
                                   (reinterpret_cast<Bits>(shifted) << 52));
}

// log(1 + u) for u ≥ 0, with a relative error of 3e-16.
inline Doubles log_one_plus(Doubles u) {
  constexpr std::uint64_t one = 0x3ff0000000000000, root_half = 0x3fe6a09e667f3bcd;
  const Doubles s = 1.0 + u;
  const Doubles lost = u < 1.0 ? u - (s - 1.0) : 1.0 - (s - u);
  // s = 2^k m with m between √½ and √2. The exponent is read through 2^52 + (1023 + k).
  const Bits exponent = (reinterpret_cast<Bits>(s) + (one - root_half)) >> 52;
  const Doubles k = reinterpret_cast<Doubles>(exponent | 0x4330000000000000) - (0x1p52 + 1023.0);
  const Bits shift = (exponent - 1023) << 52;
  const Doubles m = reinterpret_cast<Doubles>(reinterpret_cast<Bits>(s) - shift);
  const Doubles downscale = reinterpret_cast<Doubles>(one - shift);
  const Doubles f = (m - 1.0 + lost * downscale) / (m + 1.0);  // log m = 2 atanh f
  constexpr double series[] = {2,        2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9, 2.0 / 11,
                               2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  return k * kLog2High + (f * polynomial(series, f * f) + k * kLog2Low);
}

// The same functions in float32, for twice as many values.
using Floats = Simd<float>::Vector;
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));
constexpr Index kFloats = Simd<float>::lanes;

// 2^x for −125 ≤ x ≤ 0 with a relative error of 2e-7 beside that of x itself.
inline Floats exponential2(Floats x) {
  constexpr float magic = 0x1.8p23f;
  const Floats shifted = x + magic;
  const Floats r = x - (shifted - magic), square = r * r;  // |r| ≤ 1/2
  const Floats p =
      (1.0f + r * 0.693147180f) +
      square * ((0.240226507f + r * 0.0555041087f) +
                square * ((0.00961812911f + r * 0.00133335581f) + square * 0.000154035304f));
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) +
                                  (reinterpret_cast<Ints>(shifted) << 23));
}

// log2(1 + u) for 0 ≤ u < 2^100, with a relative error of 3e-7.
inline Floats log2_one_plus(Floats u) {
  constexpr std::int32_t one = 0x3f800000, root_half = 0x3f3504f3;
  const Floats s = 1.0f + u;
  // s = 2^k m with m between √½ and √2. m − 1 is rounded once, since u/2^k and 1/2^k are exact.
  const Ints k = ((reinterpret_cast<Ints>(s) + (one - root_half)) >> 23) - 127;
  const Floats downscale = reinterpret_cast<Floats>((127 - k) << 23);
  const Floats difference = u * downscale + (downscale - 1.0f);
  const Floats f = difference / (difference + 2.0f);  // log m = 2 atanh f
  const Floats square = f * f;
  const Floats series =
      (2.88539008f + square * 0.961796694f) +
      square * square * ((0.577078016f + square * 0.412198583f) + square * square * 0.320598898f);
  return __builtin_convertvector(k, Floats) + f * series;
}

// Whether any lane of a comparison is true.
inline bool any(const Ints& mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  const Longs pairs = reinterpret_cast<Longs>(mask);
  return (pairs[0] | pairs[1]) != 0;
#endif
}

// ---- memory and threads ---------------------------------------------------------------------

// An array that is not initialised; false if there was no memory for it.
template <class T>
class Buffer {
 public:
  explicit Buffer(Index count)
      : data_(static_cast<T*>(acquire_workspace(count * sizeof(T), &capacity_))) {}
  ~Buffer() { release_workspace(data_, capacity_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T* at(Index i) const { return data_ + i; }
  T& operator[](Index i) const { return data_[i]; }
  T* data() const { return data_; }

 private:
  std::size_t capacity_ = 0;
  T* data_;
};

// Prefetches `count` values. The hardware prefetcher does not follow jumps from row to row.
template <class T>
void prefetch(const T* p, Index count) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (std::size_t i = 0; i < count * sizeof(T); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

template <class F>
void parallel(Index tasks, int threads, F&& body) {
  run_parallel(
      tasks, threads,
      [](void* context, Index task, int thread) { (*static_cast<F*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The number of parts to cut each task into, so that every thread finds work.
inline Index parts_of(Index tasks, int threads, Index most) {
  return larger(1, smaller(divide_up(2 * threads, larger(tasks, 1)), most));
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
