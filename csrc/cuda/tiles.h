// Tiles of rows in shared memory, products in matrix units with the accuracy of float32, and sums
// over threads.
//
// A warp's lanes are g = lane/4 and t = lane mod 4 (multiply_add in cuda/intrinsics.h). The order
// of terms in a sum is free. So a lane reads 4 neighbouring values in one access, where the matrix
// instruction expects every fourth value.
#pragma once
#include <cstddef>
#include <cstdint>

#include "api/posterior_mean.h"
#include "cuda/intrinsics.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

constexpr int kPanel = 32;  // terms that are added up together: features, or references
constexpr unsigned kAll = 0xffffffffu;
constexpr std::size_t kSharedLimit = 99 << 10;  // bytes that a block can have from sm_80 on

__host__ __device__ constexpr Index divide_up(Index n, Index by) { return (n + by - 1) / by; }
__host__ __device__ constexpr Index round_up(Index n, Index multiple) {
  return divide_up(n, multiple) * multiple;
}
__host__ __device__ constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
__host__ __device__ constexpr Index larger(Index a, Index b) { return a > b ? a : b; }

struct Lane {
  int warp, lane, g, t;
};

__device__ inline Lane this_lane() {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  return {thread / 32, lane, lane / 4, lane % 4};
}

// ---- element types ---------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
// float32 of which matrix units multiply what float16 holds, in precision "medium".
struct Rounded {
  float value;
};
template <class R> constexpr bool kRounded = false;
template <> constexpr bool kRounded<Rounded> = true;

// load4 returns elements as numbers in this unit. In it, all types but float32 are exact in TF32.
template <class R> constexpr bool kShort = true;
template <> constexpr bool kShort<float> = false;
template <> constexpr bool kShort<Rounded> = false;
template <class R> constexpr float kUnit = 1;
// Which of them are exact in float16 too.
template <class R> constexpr bool kExactHalf = false;
template <> constexpr bool kExactHalf<Float16> = true;
template <> constexpr bool kExactHalf<std::uint8_t> = true;
template <> constexpr float kUnit<std::uint8_t> = 1 / 255.0f;  // u/127.5 − 1 = (2u − 255)/255

// The first or the second float16 value of a word.
__device__ inline float half_of_word(std::uint32_t word, int second) {
  return half_to_float(static_cast<std::uint16_t>(word >> 16 * second));
}

__device__ inline void load4(const float* from, float (&v)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
__device__ inline void load4(const Rounded* from, float (&v)[4]) { load4(&from->value, v); }
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

// Loads four elements. Those after the first `known` become zero; a byte of 0 would mean −1.
template <class R>
__device__ inline void load4(const R* from, int known, float (&v)[4]) {
  load4(from, v);
  if constexpr (sizeof(R) == 1)
    for (int i = 0; i < 4; ++i) v[i] = i < known ? v[i] : 0;
}

// The same of eight elements of a short type, which are read at once.
template <class R>
__device__ inline void load8(const R* from, int known, float (&v)[8]) {
  using Words = std::conditional_t<sizeof(R) == 2, uint4, uint2>;
  const Words words = *reinterpret_cast<const Words*>(from);
  for (int i = 0; i < 8; i += 4) {
    float four[4];
    load4(reinterpret_cast<const R*>(&words) + i, known - i, four);
    for (int k = 0; k < 4; ++k) v[i + k] = four[k];
  }
}

// One value, in float32.
__device__ inline float load_float(const float* from) { return *from; }
__device__ inline float load_float(const Rounded* from) { return from->value; }
__device__ inline float load_float(const BFloat16* from) {
  return float_of(static_cast<std::uint32_t>(from->bits) << 16);
}
__device__ inline float load_float(const Float16* from) { return half_to_float(from->bits); }
__device__ inline float load_float(const std::uint8_t* from) {
  // Not as a difference of rounded numbers, which would cancel near the middle.
  return static_cast<float>(2 * static_cast<int>(*from) - 255) * (1 / 255.0f);
}

// ---- rows in global memory -------------------------------------------------------------------

// Rows of a matrix in global memory. Accesses of 16 bytes need all rows to start on a 16-byte
// boundary; `aligned` also says that rows are less than 4 GiB apart.
template <class T>
struct Rows {
  const T* at;
  Index stride;
  int count;
  bool aligned;

  __device__ const T* row(Index i) const { return at + i * stride; }
};

template <class T>
Rows<T> rows_of(const void* at, Index stride, Index count) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(at) % 16 == 0 &&
                       (count == 1 || stride * static_cast<Index>(sizeof(T)) % 16 == 0) &&
                       stride * static_cast<Index>(sizeof(T)) <= 0xffffffff;
  return {static_cast<const T*>(at), stride, static_cast<int>(count), aligned};
}

// Starts to copy 16 bytes of a row with COLUMNS values, the piece number `piece`, to shared memory.
// Values after the first `known` become zero.
template <int COLUMNS, class T>
__device__ inline void copy_piece(T* to, const T* from, int piece, int known, bool aligned) {
  constexpr int count = 16 / sizeof(T);
  static_assert(COLUMNS % count == 0, "rows of tiles are whole accesses");
  const int first = piece * count, left = known - first;
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
  constexpr int pieces = COLUMNS * sizeof(T) / 16;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (THREADS % pieces == 0) {  // a thread copies the same piece of each of its rows
    constexpr int step = THREADS / pieces;
    const int row0 = thread / pieces, piece = thread % pieces;
    const Index left = rows.count - first - row0;
    const T* from = rows.row(left > 0 ? first + row0 : 0) + feature;
    if (step > ROWS && row0 >= ROWS) return;
#pragma unroll
    for (int row = 0; row < ROWS; row += step)
      copy_piece<COLUMNS>(to + (row0 + row) * PITCH, row < left ? from + row * rows.stride : from,
                          piece, row < left ? features - feature : 0, rows.aligned);
  } else {
    for (int i = thread; i < ROWS * pieces; i += THREADS) {
      const int row = i / pieces;
      const bool known = first + row < rows.count;
      copy_piece<COLUMNS>(to + row * PITCH, rows.row(known ? first + row : 0) + feature, i % pieces,
                          known ? features - feature : 0, rows.aligned);
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

// ---- products --------------------------------------------------------------------------------

// v as the sum of two TF32 numbers: the nearest one and the rest. The matrix unit cuts off the last
// bit of the rest. If v is not finite, the rest is not finite either.
struct Split {
  std::uint32_t big, small;
};

__device__ inline Split split(float v) {
  const std::uint32_t big = (bits_of(v) + 0x1000u) & 0xffffe000u;
  return {big, bits_of(v - float_of(big))};
}

// Operands of multiply_add, in two parts. If SHORT, values of A are TF32 numbers themselves.
template <bool SHORT>
struct OperandA {
  std::uint32_t big[4], small[4];

  __device__ void set(int i, float v) {
    if constexpr (SHORT) {
      big[i] = bits_of(v);
    } else {
      const Split parts = split(v);
      big[i] = parts.big, small[i] = parts.small;
    }
  }
};

struct OperandB {
  std::uint32_t big[2], small[2];

  __device__ void set(int i, float v) {
    const Split parts = split(v);
    big[i] = parts.big, small[i] = parts.small;
  }
};

template <bool SHORT>
__device__ inline void add_product(float (&d)[4], const OperandA<SHORT>& a, const OperandB& b) {
  if constexpr (!SHORT) multiply_add(d, a.small, b.big);
  multiply_add(d, a.big, b.small);
  multiply_add(d, a.big, b.big);
}

// Adds Σ reference[feature] · weight[query] over the staged references. The result has 32 features,
// lane g has features 4g to 4g + 3, by 8 queries a tile: sum[i][n][e] is feature 4g + 2i + e/2,
// query 8n + 2t + e % 2. weights(n, s) returns the weights of query 8n + g for references 8s + t
// and 8s + t + 4.
template <int REFERENCES, int TILES, int PITCH, class R, class Weights>
__device__ inline void add_weighted(float (&sum)[2][TILES][4], const R* references,
                                    const Weights& weights, const Lane& lane) {
  float panel[2][TILES][4] = {};
#pragma unroll
  for (int step = 0; step < REFERENCES; step += 8) {
    OperandB weight[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float2 v = weights(n, step / 8);
      weight[n].set(0, v.x), weight[n].set(1, v.y);
    }
    float of[2][4];
    for (int e = 0; e < 2; ++e)
      load4(references + (step + 4 * e + lane.t) * PITCH + 4 * lane.g, of[e]);
    OperandA<kShort<R>> feature[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 4; ++e) feature[i].set(e, of[e / 2][2 * i + e % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < TILES; ++n) add_product(panel[i][n], feature[i], weight[n]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int n = 0; n < TILES; ++n)
      for (int e = 0; e < 4; ++e) sum[i][n][e] += panel[i][n][e];
}

// ---- products of float16 parts ---------------------------------------------------------------

// Two values in float16 as high + low, the first in the lower half of each word.
struct TwoHalves {
  std::uint32_t high, low;
};
__device__ inline TwoHalves split_halves(float first, float second) {
  const std::uint32_t high = halves_of(first, second);
  const float of_first = half_of_word(high, 0), of_second = half_of_word(high, 1);
  return {high, halves_of(first - of_first, second - of_second)};
}

// One value as high + low in a word, high in its lower half.
__device__ inline std::uint32_t both_halves(float v) {
  const std::uint32_t high = halves_of(v, 0);
  return halves_of(v, v - half_of_word(high, 0));
}

// The high parts, and the low parts, of two such words.
__device__ inline TwoHalves apart(std::uint32_t first, std::uint32_t second) {
  return {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
}

// The weights of a panel of 32 references for a group of queries lie in pairs of words, in the
// order in which the lanes of a warp read them, for query 8n + g. Pair s < 4 of a lane has the
// weights of references 8s + t and 8s + t + 4. Halves take two pairs for four references: pair 2s
// has the low halves of references 16s + t + 4i, and pair 2s + 1 the high halves.
__device__ inline int pair_place(int n, int s, int lane) {
  return 2 * (32 * (kPanel / 8 * n + s) + lane);
}

// The weight of a query and a reference of a panel in halves.
__device__ inline float weight_of_halves(const float* weights, int query, int reference) {
  const int n = query / 8, lane = 4 * (query % 8) + reference % 4;
  const int step = reference / 16, i = reference / 4 % 4;
  const auto of = [&](int s) {
    const float word = weights[pair_place(n, 2 * step + s, lane) + i / 2];
    return half_of_word(bits_of(word), i % 2);
  };
  return of(1) + of(0);
}

// For asynchronous products a panel has the weights of ROWS queries in other places, in words
// of two halves: as operands (begin_product) of 16 references, first low halves and then high ones.
// The words from operand_place on have references 16 step + t and 16 step + t + 4, t < 4; those
// from kOperandStep after it the ones that come 8 later.
template <int ROWS> constexpr int kOperandStep = 4 * ROWS;
template <int ROWS>
__device__ inline int operand_place(int query, int step, int part) {
  return 4 * query + 2 * kOperandStep<ROWS> * (2 * step + part);
}

// The weight of a query and a reference of such a panel.
template <int ROWS>
__device__ inline float weight_of_operands(const float* weights, int query, int reference) {
  const int i = reference / 4 % 4;
  const auto of = [&](int part) {
    const int at = operand_place<ROWS>(query, reference / 16, part) + i / 2 * kOperandStep<ROWS>;
    return half_of_word(bits_of(weights[at + reference % 4]), i % 2);
  };
  return of(1) + of(0);
}

// Adds Σ reference[feature] · weight[query] over a panel of staged references, as add_weighted
// does. References are multiplied by `factor` before they are cut into halves; weights are pairs of
// halves. `largest` keeps the largest reference of each of the lane's features. If EXACT,
// float16 holds references as they are. Weights of Rounded references have no low part.
template <bool EXACT, int TILES, int PITCH, class R>
__device__ inline void add_weighted_halves(float (&sum)[2][TILES][4], const R* references,
                                           const float* weights, float factor, float (&largest)[4],
                                           const Lane& lane) {
  constexpr int kSteps = kPanel / 16;
  std::uint32_t big[kSteps][2][4], small[kSteps][2][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    for (int pair = 0; pair < 2; ++pair) {
      // This lane's terms of the instruction are those of references first + 4i.
      const int first = 16 * step + lane.t;
      float v[2][4];
      for (int e = 0; e < 2; ++e) {
        load4(references + (first + 8 * pair + 4 * e) * PITCH + 4 * lane.g, v[e]);
        if constexpr (!EXACT)
          for (int f = 0; f < 4; ++f)
            largest[f] = fmaxf(largest[f], fabsf(v[e][f])), v[e][f] *= factor;
      }
      for (int f = 0; f < 4; ++f) {
        const TwoHalves parts = split_halves(v[0][f], v[1][f]);
        big[step][f / 2][2 * pair + f % 2] = parts.high;
        small[step][f / 2][2 * pair + f % 2] = parts.low;
      }
    }
  constexpr bool kLowWeights = !kRounded<R>, kLowValues = !EXACT;
  // Products of four sums take turns, so that none waits for another.
#pragma unroll
  for (int n0 = 0; n0 < TILES; n0 += 2) {
    float panel[2][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t high[2][2], low[2][2];
      const auto load = [&](std::uint32_t (&words)[2], int n, int s) {
        const uint2 pair =
            *reinterpret_cast<const uint2*>(weights + pair_place(n0 + n, s, lane.lane));
        words[0] = pair.x, words[1] = pair.y;
      };
      for (int n = 0; n < 2; ++n) load(low[n], n, 2 * step);
      for (int n = 0; n < 2; ++n) load(high[n], n, 2 * step + 1);
      const auto each = [&](auto multiply) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < 2; ++i) multiply(panel[i][n], i, n);
      };
      bool first = step == 0;  // of the panel
      const auto add = [&](float (&d)[4], const std::uint32_t (&a)[4],
                           const std::uint32_t (&b)[2]) {
        if (first)
          multiply_halves(d, a, b);
        else
          multiply_add_halves(d, a, b);
      };
      if constexpr (kLowWeights) {
        each([&](float (&d)[4], int i, int n) { add(d, big[step][i], low[n]); });
        first = false;
      }
      if constexpr (kLowValues) {
        each([&](float (&d)[4], int i, int n) { add(d, small[step][i], high[n]); });
        first = false;
      }
      each([&](float (&d)[4], int i, int n) { add(d, big[step][i], high[n]); });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < 2; ++n)
        for (int e = 0; e < 4; ++e) sum[i][n0 + n][e] += panel[i][n][e];
  }
}

// The same for references that float16 cannot hold, in float32. Weights are multiplied by `factor`.
template <int TILES, int PITCH, class R>
__device__ inline void add_weighted_floats(float (&sum)[2][TILES][4], const R* references,
                                           const float* weights, float factor, const Lane& lane) {
#pragma unroll 1
  for (int reference = 0; reference < kPanel; ++reference) {
    float v[4];
    load4(references + reference * PITCH + 4 * lane.g, v);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      for (int odd = 0; odd < 2; ++odd) {
        const int query = 8 * n + 2 * lane.t + odd;
        const float weight = weight_of_halves(weights, query, reference) * factor;
        for (int f = 0; f < 4; ++f) sum[f / 2][n][f % 2 * 2 + odd] += weight * v[f];
      }
  }
}

// ---- sums over threads -----------------------------------------------------------------------

template <class T, class Combine>
__device__ inline T over_warp(T value, Combine combine) {
  for (int apart = 16; apart > 0; apart /= 2)
    value = combine(value, __shfl_xor_sync(kAll, value, apart));
  return value;
}

// Combines values of all THREADS threads of the block in a fixed order. All threads get the result.
// `scratch` holds one value per warp.
template <int THREADS, class T, class Combine>
__device__ inline T over_block(T value, T* scratch, Combine combine) {
  const Lane lane = this_lane();
  value = over_warp(value, combine);
  if (lane.lane == 0) scratch[lane.warp] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; ++w) value = combine(value, scratch[w]);
  __syncthreads();
  return value;
}

// high + low, with about twice the digits of float32.
struct TwoFloats {
  float high, low;
};

__device__ inline TwoFloats sum_of(const TwoFloats& a, const TwoFloats& b) {
  const float high = a.high + b.high, of_b = high - a.high;
  const float rest = (a.high - (high - of_b)) + (b.high - of_b);
  return {high, a.low + b.low + rest};
}

// v ≥ 0 in two floats: its first 24 digits, and the rest. `power` is by how much its exponent is
// larger in float64 than in float32, in the upper half of float64. Numbers that float32 does not
// hold become about as large as it holds, or as small.
__device__ inline TwoFloats two_floats(double v, std::uint32_t power) {
  constexpr int least = 1 << 20, most = (255 << 20) - 1;
  const std::int64_t bits = bits_of(v);
  const auto back = static_cast<std::uint32_t>(bits);
  int front = static_cast<int>(static_cast<std::uint32_t>(bits >> 32) - power);
  front = front < least ? least : front > most ? most : front;
  const std::uint32_t first = static_cast<std::uint32_t>(front) << 3 | back >> 29;
  const float last_place = float_of(first & 0x7f800000u) * 0x1p-52f;
  return {float_of(first), static_cast<float>(static_cast<int>(back & 0x1fffffffu)) * last_place};
}

// Σ over the lanes of a warp, in two floats. All lanes get the same bits.
__device__ inline TwoFloats over_warp(TwoFloats sum) {
  for (int apart = 16; apart > 0; apart /= 2)
    sum = sum_of(sum,
                 {__shfl_xor_sync(kAll, sum.high, apart), __shfl_xor_sync(kAll, sum.low, apart)});
  return sum;
}

// Σ over the block's threads of each of COUNT values, for its first thread. All threads call this.
// `scratch` has COUNT places for each warp.
template <int THREADS, int COUNT>
__device__ inline void sum_over_block(TwoFloats (&sums)[COUNT], TwoFloats* scratch) {
  const Lane lane = this_lane();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sums[i] = over_warp(sums[i]);
    if (lane.lane == 0) scratch[COUNT * lane.warp + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int w = 1; w < THREADS / 32; ++w)
    for (int i = 0; i < COUNT; ++i) sums[i] = sum_of(sums[i], scratch[COUNT * w + i]);
}

struct Sum {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Least {
  template <class T> __device__ T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Most {
  template <class T> __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};

// Kahan's sum: total − lost is the sum of all values to about twice the digits of float32.
__device__ inline void add_compensated(float& total, float& lost, float value) {
  value -= lost;
  const float larger = total + value;
  lost = (larger - total) - value;
  total = larger;
}

// A sum of float32 values in two floats.
struct CompensatedSum {
  float total = 0, lost = 0;

  __device__ void add(float value) { add_compensated(total, lost, value); }
  // Adds a b, with the rounding error of the product.
  __device__ void add_product(float a, float b) {
    const float product = rounded_product(a, b);
    add(product);
    lost -= fmaf(a, b, -product);
  }
  __device__ TwoFloats result() const { return {total, -lost}; }
};

}  // namespace
}  // namespace pfgm
