// The arrays of the posterior mean in global memory: rows of the caller, and the workspace. Which
// of them share memory is in cuda/workspace.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pfgm {
namespace {

using Index = std::int64_t;

__host__ __device__ constexpr Index divide_up(Index n, Index by) { return (n + by - 1) / by; }
__host__ __device__ constexpr Index round_up(Index n, Index multiple) {
  return divide_up(n, multiple) * multiple;
}
__host__ __device__ constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
__host__ __device__ constexpr Index larger(Index a, Index b) { return a > b ? a : b; }

// ---- sizes -------------------------------------------------------------------------------------

constexpr int kPanel = 32;           // terms that are added up together: features, or references
constexpr int kTileReferences = 64;  // references in a tile, whose smallest distance is kept
constexpr int kQueryThreads = 256;   // of a block that works on one query
constexpr int kPiece = 1024;         // references that such a block takes at a time
constexpr int kThreadReferences = kPiece / kQueryThreads;  // references of a tile for each thread
constexpr int kCenterThreads = 256;                        // of find_center, one for each feature

constexpr Index kMostPairs = Index{1} << 31;  // of a block and a chunk: indices have 32 bits
constexpr Index kMostReferences = 1 << 16;    // of a chunk: indices have 16 bits

// Queries in a group of the weighted sums, and features that one block sums.
constexpr int kSumRows = 32, kSumFeatures = 128;
constexpr int kPartPanels = 64;  // most panels of listed references that a block sums

// ---- element types -----------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// load4 returns elements in units of kUnit. kShort: in this unit they are exact in TF32.
template <class R> constexpr bool kShort = true;
template <> constexpr bool kShort<float> = false;
template <class R> constexpr float kUnit = 1;
template <> constexpr float kUnit<std::uint8_t> = 1 / 255.0f;  // u/127.5 − 1 = (2u − 255)/255
// In this unit they are exact in float16 too.
template <class R> constexpr bool kExactHalf = false;
template <> constexpr bool kExactHalf<Float16> = true;
template <> constexpr bool kExactHalf<std::uint8_t> = true;

// ---- rows --------------------------------------------------------------------------------------

// Rows of a matrix. Accesses of 16 bytes need all rows to start on a 16-byte boundary; `aligned`
// also says that rows are less than 4 GiB apart.
template <class T>
struct Rows {
  const T* at;
  Index stride;
  int count;
  bool aligned;

  __device__ const T* row(Index i) const { return at + i * stride; }
  __device__ Rows from(int first) const { return {row(first), stride, count - first, aligned}; }
};

template <class T>
Rows<T> rows_of(const void* at, Index stride, Index count) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(at) % 16 == 0 &&
                       (count == 1 || stride * static_cast<Index>(sizeof(T)) % 16 == 0) &&
                       stride * static_cast<Index>(sizeof(T)) <= 0xffffffff;
  return {static_cast<const T*>(at), stride, static_cast<int>(count), aligned};
}

// The centre of the references. For each group of kCenterThreads features, `spread` is the largest
// distance of a sampled value from it, and `largest` the largest sampled value.
struct Center {
  float* at;                // (width): zeros after the last feature
  float *spread, *largest;  // (divide_up(width, kCenterThreads))
  float* scale;             // (2): the power of two that centred references are multiplied by, and
                            // 1 over it
  float* value_scale;       // the same for references as they are
  float* scaled;            // (width): `at` times `scale`
  int features, width;
  float excess;  // references are multiplied by 1 + excess before they are centred

  // |y − centre|², from the square of a centred reference, which is too large (kExcess).
  __device__ double true_square(double squared) const { return squared - 2.0 * excess * squared; }
};

// Rows times a power of two as high + low.
struct Halves {
  std::uint16_t *high, *low;  // (rows, width)
  double* units;              // (rows): turns a product with scaled references into the true one
  int rows;
  Rows<float> whole;  // the rows themselves
};

// ---- pairs of queries and references -----------------------------------------------------------

// Rows are `stride` apart.
struct Pairs {
  Index stride;
  double* squared;   // (queries, stride)
  float* projected;  // (queries, stride): G·y up to a constant for each query; may be null
  double* lowest;    // (queries, tiles); negative if a distance of the tile, or of others of its
                     // block, is not finite, until find_limits has looked at it
  double* reach;     // (tiles): the largest |y − centre|²
  double* norms;     // (queries): |x − centre|², or |x|² beside differences
  unsigned* list;    // (queries · stride): indices into `squared` of the pairs to refine
  unsigned* listed;  // their number
  int tiles;
};

// What a kernel computes from products: squared distances, G·y up to a constant for each query, or
// sums over a slice of the features, which finish_distances turns into one of the two.
enum class Target { distances, projections, slice };

// Sums over slices of the features. Blocks that share out the features write them in place of
// distances.
struct Slices {
  Index stride;      // distance between rows
  float2* products;  // (slices, queries, stride): sums in two floats
  double* squares;   // (slices, stride): of centred references, times the square of the scale
  int count, trips;  // trips of a slice; the last slice may have fewer
};

// The weights of a chunk, and a bit for each that is not zero. Rows of `weight` are pairs.stride
// apart, rows of `live` a 32nd of that. A weight is a float32 number, or a word of both_halves.
struct ChunkWeights {
  float* weight;
  std::uint32_t* live;
};

// c_j, p_j and −F c_j of the chunk (cuda/coefficients.h).
struct Coefficients {
  ChunkWeights c;
  int* live_count;  // (queries, pieces): how many c_j may be nonzero
  float* probability;
  float* scaled;
};

// ---- queries -----------------------------------------------------------------------------------

// Merge state of each query. nearest and total are results too.
struct QueryStates {
  double* nearest;
  double* total;
  double* logsumexp;
};

// What weigh writes for merge and order_queries: (queries, pieces of the chunk). In the backward
// pass find_coefficients writes live_count, and the other pointers are null.
struct PieceSums {
  int pieces, size;  // how many, and how many references each has, a multiple of kPiece
  float* sum;        // of the weights
  int* live_count;   // how many weights are not zero
  double* nearest;   // (queries): the smallest squared distance so far
  double* earlier;   // (queries): the weight of all earlier chunks, relative to `nearest`
};

// Sums of each query over the chunks so far, one for each piece of a chunk, and what finish_moments
// computes from them after the last chunk (cuda/coefficients.h).
struct Moments {
  double* projection;  // (queries, pieces): Σ p_j G·y_j
  // (queries, pieces): Σ p_j. Over all pieces it is 0 at a limit, else about 1, because distances
  // may differ a little from the forward pass.
  double* mass;
  double* moment;     // (queries, pieces): moment times law.exponent
  double* chunk_sum;  // (queries, pieces): Σ c_j of the rounded c_j of the last chunk
  double* squares;    // (queries, pieces): at least Σ c_j² of the last chunk
  double* exact_sum;  // (queries): C, without rounding
  double* unit;       // (queries): F, 0 at a limit (WeightLaw::at_limit)
  double* grad_radius;
  int pieces, size;  // pieces of the first chunk, and references in each

  // Adds to the sum of a piece.
  __device__ void add(double* sums, Index query, int piece, double value, bool first_chunk) const {
    double& at = sums[query * pieces + piece];
    at = value + (first_chunk ? 0 : at);
  }
  // The sum over all pieces.
  __device__ double over_pieces(const double* sums, Index query) const {
    return over_pieces(sums, query, pieces);
  }
  // The same over the first ones, which are those of a chunk.
  __device__ double over_pieces(const double* sums, Index query, int count) const {
    double sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < count; ++piece) sum += sums[query * pieces + piece];
    return sum;
  }
};

// ---- weighted sums -----------------------------------------------------------------------------

// For each group of queries: the references of a chunk that have a weight for any of them.
struct Lists {
  int* listed;  // (groups, stride): their indices; the last one is repeated to fill a panel
  int* counts;  // (groups): how many
  // (groups, stride, queries of a group): their weights, in panels of weight_offset.
  // Padding (repeated references, queries past the end) has weight 0.
  float* weights;
  Index stride;
};

// Sums over parts of the lists, so that queries with many weights have more blocks than others.
struct Parts {
  float* sums;  // (parts, queries, features); only parts with a listed reference are written
  int* counts;  // (queries): how many are written
  int queries;
  int panels;  // of listed references in a part
};

}  // namespace
}  // namespace pfgm
