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
constexpr int kQueryThreads = 256;   // of a block that takes a query
constexpr int kPiece = 1024;         // references that such a block takes at a time
constexpr int kThreadReferences = kPiece / kQueryThreads;  // references of a tile for each thread
constexpr int kCenterThreads = 256;                        // features of a block of find_center

constexpr Index kMostPairs = Index{1} << 31;  // of a block and a chunk, for places of 32 bits
constexpr Index kMostReferences = 1 << 16;    // of a chunk, for places of 16 bits

// Queries of a group of the weighted sums, and features of the blocks that sum.
constexpr int kSumRows = 32, kSumFeatures = 128;
constexpr int kPartPanels = 64;  // of listed references that a block sums, at most

// ---- element types -----------------------------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// load4 returns elements as numbers in this unit. In it, all types but float32 are exact in TF32.
template <class R> constexpr bool kShort = true;
template <> constexpr bool kShort<float> = false;
template <class R> constexpr float kUnit = 1;
template <> constexpr float kUnit<std::uint8_t> = 1 / 255.0f;  // u/127.5 − 1 = (2u − 255)/255
// Which of them are exact in float16 too.
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

// The centre of the references. `spread` has the largest distance to it of the sample, `largest`
// the largest value, in each group of kCenterThreads features.
struct Center {
  float* at;                // (width): zero from the last feature on
  float *spread, *largest;  // (divide_up(width, kCenterThreads))
  float* scale;             // (2): the power of two that centred references are multiplied by, and
                            // 1 over it
  float* value_scale;       // the same for references as they are
  float* scaled;            // (width): `at` times `scale`
  int features, width;
  float excess;  // references are multiplied by 1 + excess before they are centred

  // |y − centre|² from that of a reference as it is multiplied.
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
  float* projected;  // (queries, stride): G·y up to a number for each query; may be null
  double* lowest;    // (queries, tiles); negative if a distance of the tile, or of others of its
                     // block, is not finite, until find_limits has looked at it
  double* reach;     // (tiles): the largest |y − centre|²
  double* norms;     // (queries): |x − centre|², or |x|² beside differences
  unsigned* list;    // (queries · stride): places in `squared` of the pairs that refine takes
  unsigned* listed;  // their number
  int tiles;
};

// What a kernel makes of products: squared distances, G·y up to a number for each query, or sums
// over a slice of the features, of which finish_distances makes either.
enum class Target { distances, projections, slice };

// Sums over slices of the features. They take the place of the distances of blocks that have all
// features.
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
  int* live_count;  // (queries, pieces): how many c_j may be other than zero
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

// Queries × tiles (pieces) of the chunk: what weigh leaves for merge and for the order of queries.
// In the backward pass find_coefficients leaves `live`, and the other sums are null.
struct PieceSums {
  int pieces, size;  // how many, and how many references each has, a multiple of kPiece
  float* sum;        // of the weights
  int* live_count;   // how many weights are not zero
  double* nearest;   // (queries): the smallest squared distance so far
  double* earlier;   // (queries): the weight of all earlier chunks, relative to `nearest`
};

// Sums of each query over the chunks so far, one for each tile of a chunk, and what follows from
// them after the last one (cuda/coefficients.h).
struct Moments {
  double* projection;  // (queries, pieces): Σ p_j G·y_j
  // (queries, pieces): Σ p_j. Over all tiles it is close to 1; distances differ a little from the
  // forward pass. It is 0 at a limit.
  double* mass;
  double* moment;     // (queries, pieces): moment times law.exponent
  double* chunk_sum;  // (queries, pieces): Σ c_j of the rounded c_j of the last chunk
  double* squares;    // (queries, pieces): at least Σ c_j² of the last chunk
  double* exact_sum;  // (queries): C, without rounding
  double* unit;       // (queries): F, 0 at a limit (WeightLaw::at_limit)
  double* grad_radius;
  int pieces, size;  // as many as the first chunk has, and references of each

  // Adds to the sum of a tile (`piece`).
  __device__ void add(double* sums, Index query, int piece, double value, bool first_chunk) const {
    double& at = sums[query * pieces + piece];
    at = value + (first_chunk ? 0 : at);
  }
  // The sum over all tiles.
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
  int* listed;  // (groups, stride): which they are, and the last one again up to a whole panel
  int* counts;  // (groups): how many
  // (groups, stride, queries of a group): their weights, in panels of pair_place.
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
