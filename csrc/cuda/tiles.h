// Loading elements, and staging rows in shared memory.
//
// A warp's lanes are g = lane/4 and t = lane mod 4 (multiply_add in cuda/intrinsics.h). The order
// of terms in a sum is free. So a lane reads 4 neighbouring values in one access, where the matrix
// instruction expects every fourth value.
#pragma once
#include "cuda/arithmetic.h"
#include "cuda/arrays.h"
#include "cuda/intrinsics.h"

namespace pfgm {
namespace {

constexpr std::size_t kSharedLimit = 99 << 10;  // bytes that a block can have from sm_80 on

__device__ inline void load4(const float* from, float (&v)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
__device__ inline void load4(const BFloat16* from, float (&v)[4]) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(from);
  v[0] = float_of(pairs.x << 16), v[1] = float_of(pairs.x & 0xffff0000u);
  v[2] = float_of(pairs.y << 16), v[3] = float_of(pairs.y & 0xffff0000u);
}
__device__ inline void load4(const Float16* from, float (&v)[4]) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(from);
  v[0] = half_of_word(pairs.x, 0), v[1] = half_of_word(pairs.x, 1);
  v[2] = half_of_word(pairs.y, 0), v[3] = half_of_word(pairs.y, 1);
}
__device__ inline void load4(const std::uint8_t* from, float (&v)[4]) {
  const std::uint32_t four = *reinterpret_cast<const std::uint32_t*>(from);
  for (int i = 0; i < 4; ++i)
    v[i] = static_cast<float>(2 * static_cast<int>(four >> (8 * i) & 255u) - 255);
}

// Loads four elements. Those after the first `count` become zero; a byte of 0 would mean −1.
template <class R>
__device__ inline void load4(const R* from, int count, float (&v)[4]) {
  load4(from, v);
  if constexpr (sizeof(R) == 1)
    for (int i = 0; i < 4; ++i) v[i] = i < count ? v[i] : 0;
}

// The same of eight elements of a short type, which are read at once.
template <class R>
__device__ inline void load8(const R* from, int count, float (&v)[8]) {
  using Words = std::conditional_t<sizeof(R) == 2, uint4, uint2>;
  const Words words = *reinterpret_cast<const Words*>(from);
  for (int i = 0; i < 8; i += 4) {
    float four[4];
    load4(reinterpret_cast<const R*>(&words) + i, count - i, four);
    for (int k = 0; k < 4; ++k) v[i + k] = four[k];
  }
}

// One value, in float32.
__device__ inline float load_float(const float* from) { return *from; }
__device__ inline float load_float(const BFloat16* from) {
  return float_of(static_cast<std::uint32_t>(from->bits) << 16);
}
__device__ inline float load_float(const Float16* from) { return half_to_float(from->bits); }
__device__ inline float load_float(const std::uint8_t* from) {
  // Not as a difference of rounded numbers, which would cancel near the middle.
  return static_cast<float>(2 * static_cast<int>(*from) - 255) * (1 / 255.0f);
}

// A reference's value as high + low, exact.
template <class R>
__device__ inline TwoFloats two_floats(const R* from) {
  return {load_float(from), 0};
}
__device__ inline TwoFloats two_floats(const std::uint8_t* from) {
  const float whole = static_cast<float>(2 * static_cast<int>(*from) - 255);
  const float high = rounded_product(whole, 1 / 255.0f);  // the same wherever it is used
  // The remainder in products of few digits, which are exact without a fused operation.
  const float front = float_of(bits_of(high) & 0xfffff000u);
  return {high, ((whole - front * 255) - (high - front) * 255) * (1 / 255.0f)};
}

// One value or four, in one access.
template <int WIDTH>
__device__ inline void load_values(const float* from, float (&v)[WIDTH]) {
  if constexpr (WIDTH == 4)
    load4(from, v);
  else
    v[0] = *from;
}
template <int WIDTH>
__device__ inline void store_values(float* to, const float (&v)[WIDTH]) {
  if constexpr (WIDTH == 4)
    *reinterpret_cast<float4*>(to) = float4{v[0], v[1], v[2], v[3]};
  else if constexpr (WIDTH == 2)
    *reinterpret_cast<float2*>(to) = float2{v[0], v[1]};
  else
    *to = v[0];
}

// ---- staging -----------------------------------------------------------------------------------

// Starts to copy 16 bytes of a row with COLUMNS values, the vector number `vector`, to shared
// memory. Values after the first `values` become zero.
template <int COLUMNS, class T>
__device__ inline void copy_vector(T* to, const T* from, int vector, int values, bool aligned) {
  constexpr int count = 16 / sizeof(T);
  static_assert(COLUMNS % count == 0, "rows of tiles are whole accesses");
  const int first = vector * count, left = values - first;
  const int valid = left < 0 ? 0 : left < count ? left : count;
  if (aligned) {
    copy_async<16>(to + first, valid ? from + first : from, valid * static_cast<int>(sizeof(T)));
    return;
  }
  for (int i = 0; i < count; ++i) to[first + i] = i < valid ? from[first + i] : T{};
}

// Starts to copy ROWS rows from `first` on, COLUMNS features from `feature` on. In shared memory
// rows are PITCH apart.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ inline void copy_rows(T* to, const Rows<T>& rows, Index first, int feature,
                                 int features) {
  constexpr int vectors = COLUMNS * sizeof(T) / 16;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (THREADS % vectors == 0) {  // a thread copies the same vector of each of its rows
    constexpr int step = THREADS / vectors;
    const int row0 = thread / vectors, vector = thread % vectors;
    const Index left = rows.count - first - row0;
    const T* from = rows.row(left > 0 ? first + row0 : 0) + feature;
    if (step > ROWS && row0 >= ROWS) return;
#pragma unroll
    for (int row = 0; row < ROWS; row += step)
      copy_vector<COLUMNS>(to + (row0 + row) * PITCH, row < left ? from + row * rows.stride : from,
                           vector, row < left ? features - feature : 0, rows.aligned);
  } else {
    for (int i = thread; i < ROWS * vectors; i += THREADS) {
      const int row = i / vectors;
      const bool exists = first + row < rows.count;
      copy_vector<COLUMNS>(to + row * PITCH, rows.row(exists ? first + row : 0) + feature,
                           i % vectors, exists ? features - feature : 0, rows.aligned);
    }
  }
}

// stage(p, slot) starts the copies of panel p. compute(p, slot) uses them STAGES − 1 panels later.
template <int STAGES, class Stage, class Compute>
__device__ inline void pipeline(int panels, Stage stage, Compute compute) {
#pragma unroll 1
  for (int p = 0; p < STAGES - 1; ++p) {
    if (p < panels) stage(p, p);
    commit_copies();
  }
  for (int p = 0; p < panels; ++p) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all copies of p have arrived, and no thread uses the slot of p − 1 any more
    const int next = p + STAGES - 1;
    if (next < panels) stage(next, next % STAGES);
    commit_copies();
    compute(p, p % STAGES);
  }
  wait_copies<0>();
  __syncthreads();
}

// ---- listed references -------------------------------------------------------------------------

// Weights in halves are multiplied by it. The largest weight is then far from overflow, and others
// are off by at most 2^-39 of it.
constexpr float kWeightUnit = 0x1p14f;

// Whether halves hold a feature to about 2^-20 of its largest value, in units of `unit`. float16
// ends at 65504 and at steps of 2^-24.
__device__ inline bool halves_hold(float largest, float unit) {
  return largest == 0 || (largest >= 0x1p-5f * unit && largest <= 65504 * unit);
}

// The weights of a panel of 32 references for a group of queries lie in pairs of words, in the
// order in which the lanes of a warp read them, for query 8n + g. Pair s < 4 of a lane has the
// weights of references 8s + t and 8s + t + 4. Halves take two pairs for four references: pair 2s
// has the low halves of references 16s + t + 4i, and pair 2s + 1 the high halves.
__device__ inline int weight_offset(int n, int s, int lane) {
  return 2 * (32 * (kPanel / 8 * n + s) + lane);
}

// ---- products of a tile -------------------------------------------------------------------------

// The panel of a lane: references g and g + 8, features 8t to 8t + 7, times the scale and centred,
// in two parts, as the operands of two products.
struct ReferencePanel {
  std::uint32_t high[2][4], low[2][4];
};

}  // namespace
}  // namespace pfgm
