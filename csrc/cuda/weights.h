// From squared distances to weights, and to the coefficients of the gradient, on CUDA devices. How
// a distance becomes a weight is in cuda/weight_law.h.
#pragma once
#include "cuda/refinement.h"

namespace pfgm {
namespace {

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of a float32 result. A gradient multiplies p_j by (y_j − mean)²/s,
// which may be large; there the cutoff is kGradientCutoff nats lower.
constexpr double kWeightCutoff = 16, kGradientCutoff = 8;
constexpr int kQueryThreads = 256;
constexpr int kPiece = 1024;  // references that a block of weigh takes at a time

// Merge state of each query. nearest and total are results too.
struct QueryStates {
  double* nearest;
  double* total;
  double* logsumexp;
};

// The weights of a chunk, and a bit for each that is not zero. Rows of `weight` are pairs.stride
// apart, rows of `live` a 32nd of that. A weight is a float32 number, or a word of both_halves.
struct ChunkWeights {
  float* weight;
  std::uint32_t* live;
};

// All threads of a warp call this. Returns how many weights of the warp are not zero.
__device__ inline int mark_live(const ChunkWeights& out, Index row, Index stride, int j,
                                bool counts) {
  const unsigned bits = __ballot_sync(kAll, counts);
  if (j % 32 == 0 && j < stride) out.live[row * (stride / 32) + j / 32] = bits;
  return __popc(bits);
}

// Queries × pieces of the chunk: what weigh leaves for merge and for the order of queries. In the
// backward pass find_coefficients leaves `live`, and the other sums are null.
struct PieceSums {
  int pieces, size;  // how many, and how many references each has, a multiple of kPiece
  float* sum;        // of the weights
  int* live;         // how many weights are not zero
  double* closest;   // (queries): the smallest squared distance so far
  double* kept;      // (queries): the weight of all earlier chunks, relative to `closest`
};

struct WeighMemory {
  std::int64_t least[kQueryThreads / 32];
  float sums[kQueryThreads / 32];
  int live[kQueryThreads / 32];
};

// Weights of one query over a piece of the chunk, relative to the nearest reference so far, which
// comes from the minima of tiles and from earlier chunks. They are stored times `factor`, in halves
// if HALVES. GAUSSIAN is law.gaussian.
template <bool HALVES, bool GAUSSIAN>
__global__ void __launch_bounds__(kQueryThreads)
    weigh(WeightLaw law, const double* radius, const Pairs pairs, int references, double floor,
          float factor, bool first_chunk, const QueryStates state, const ChunkWeights out,
          const PieceSums sums) {
  WeighMemory& shared = *reinterpret_cast<WeighMemory*>(shared_memory());
  law.gaussian = GAUSSIAN;  // known to the compiler, which leaves the other law out
  const Lane lane = this_lane();
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  const double r = radius[query];
  // Numbers ≥ 0 have the order of their bits, and −1 comes before. Comparing bits takes no float64.
  std::int64_t least = bits_of(static_cast<double>(INFINITY));
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += kQueryThreads)
    least = Least()(least, bits_of(pairs.lowest[query * pairs.tiles + tile]));
  double nearest = double_of(over_block<kQueryThreads>(least, shared.least, Least()));
  const double before = first_chunk ? INFINITY : state.nearest[query];
  nearest = isnan(before) ? -1 : fmin(nearest, before);
  if (nearest < 0) nearest = NAN;  // in the minima NaN is −1
  const double rate = law.rate(nearest, r);
  const double kept =
      first_chunk ? 0
                  : state.total[query] * static_cast<double>(law.weight(before - nearest, rate));
  const float smallest = static_cast<float>(floor) * fmaxf(static_cast<float>(kept), 1);

  float sum = 0;
  int live = 0;
  const int first = piece * sums.size;
#pragma unroll 1
  for (int start = first; start < first + sums.size && start < references; start += kPiece)
#pragma unroll
    for (int step = 0; step < kPiece; step += kQueryThreads) {
      const int j = start + step + thread;
      const Index place = query * pairs.stride + j;
      float w = j < references ? law.weight(pairs.squared[place] - nearest, rate) : 0;
      // The sum is that of the weights by which references are multiplied.
      if constexpr (HALVES) w = law.rounded(w);
      sum += w;
      if (w < smallest) w = 0;
      if (j < pairs.stride)
        out.weight[place] = HALVES ? float_of(both_halves(w * factor)) : w * factor;
      live += mark_live(out, query, pairs.stride, j, w != 0);
    }
  sum = over_warp(sum, Sum());
  if (lane.lane == 0) shared.sums[lane.warp] = sum, shared.live[lane.warp] = live;
  __syncthreads();
  if (thread > 0) return;
  for (int w = 1; w < kQueryThreads / 32; ++w) sum += shared.sums[w], live += shared.live[w];
  sums.sum[query * sums.pieces + piece] = sum;
  sums.live[query * sums.pieces + piece] = live;
  if (piece > 0) return;
  sums.closest[query] = nearest;
  sums.kept[query] = kept;
}

// ---- the gradient ----------------------------------------------------------------------------
//
// With upstream gradients G = ∂L/∂mean and g = ∂L/∂logsumexp, and coefficients in units of F:
//     t_j = G·y_j − Σ_i p_i G·y_i + g
//     c_j = −p_j t_j s₀/s_j, F = (N + D)/s₀      D = ∞: c_j = −p_j t_j, F = 1/σ²
// s₀ and d₀² are those of the nearest reference. Σ p_j t_j = g, so the t_j nearly cancel in Σ c_j.
// The following form avoids the cancellation. With e_j = d_j² − d₀² and moment = Σ p_j t_j e_j/s_j
// (D = ∞: Σ p_j t_j e_j/σ²):
//     C = moment − g                             D = ∞: C = −g
//     ∂L/∂x = F (C (x − mean) − Σ_j c_j (y_j − mean))
//     ∂L/∂r = r F C                              D = ∞: ∂L/∂σ = (g d₀²/σ² + moment)/σ
//     ∂L/∂y_j = Σ_b (p_bj G_b − F_b c_bj (x_b − y_j))

// Sums of each query over the chunks so far, one for each piece of a chunk, and what follows from
// them after the last one.
struct Moments {
  double* projection;  // (queries, pieces): Σ p_j G·y_j
  // (queries, pieces): Σ p_j. Over all pieces it is close to 1; distances differ a little from the
  // forward pass. It is 0 at a limit.
  double* mass;
  double* moment;     // (queries, pieces): moment times law.exponent
  double* sum;        // (queries, pieces): Σ c_j of the rounded c_j
  double* total;      // (queries): Σ c_j over all pieces
  double* exact_sum;  // (queries): C, without rounding
  double* unit;       // (queries): F, 0 at a limit
  double* grad_radius;
  int pieces, size;  // as many as the first chunk has, and references of each

  // Adds to the sum of a piece.
  __device__ void add(double* sums, Index query, int piece, double value, bool first_chunk) const {
    double& at = sums[query * pieces + piece];
    at = value + (first_chunk ? 0 : at);
  }
  // The sum over all pieces.
  __device__ double over_pieces(const double* sums, Index query) const {
    double sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < pieces; ++piece) sum += sums[query * pieces + piece];
    return sum;
  }
};

// F; not finite where the row is at a limit. `nearest` is the smallest squared distance.
__device__ inline double unit_of(const WeightLaw& law, double nearest, double r) {
  return law.gaussian ? 1 / r / r : 2 * law.exponent / (nearest + r * r);
}

// What the probabilities of a query need.
struct RowWeights {
  double nearest, rate, per_total;
  bool limit;

  __device__ RowWeights(const WeightLaw& law, double nearest, double total, double r)
      : nearest(nearest),
        rate(law.rate(nearest, r)),
        per_total(1 / total),
        limit(law.at_limit(nearest, r)) {}

  // p_j; zero below `floor`.
  __device__ double probability(const WeightLaw& law, double squared, double floor) const {
    const double p = limit ? 0 : law.weight(squared - nearest, rate) * per_total;
    return p < floor ? 0 : p;
  }
};

// Adds Σ p_j G·y_j and Σ p_j of one query over a piece of the chunk.
__global__ void __launch_bounds__(kQueryThreads)
    pull(const WeightLaw law, const double* radius, const double* nearest, const double* total,
         const Pairs pairs, int references, double floor, bool first_chunk, const Moments moments) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  const int piece = static_cast<int>(blockIdx.y), first = piece * moments.size;
  const RowWeights of(law, nearest[query], total[query], radius[query]);
  double projection = 0, mass = 0;
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < references; start += kPiece)
#pragma unroll
    for (int step = 0; step < kPiece; step += kQueryThreads) {
      const int j = start + step + static_cast<int>(threadIdx.x);
      if (j >= references) continue;
      const double p = of.probability(law, pairs.squared[row + j], floor);
      if (p != 0) projection += p * pairs.projected[row + j];  // undefined where p = 0
      mass += p;
    }
  projection = over_block<kQueryThreads>(projection, scratch, Sum());
  mass = over_block<kQueryThreads>(mass, scratch, Sum());
  if (threadIdx.x > 0) return;
  moments.add(moments.projection, query, piece, projection, first_chunk);
  moments.add(moments.mass, query, piece, mass, first_chunk);
}

// c_j, p_j and −F c_j of the chunk. p_j and −F c_j may be null.
struct Coefficients {
  ChunkWeights c;
  int* live;  // (queries, pieces): how many c_j may be other than zero
  float* probability;
  float* scaled;
};

// Coefficients of one query over a piece of the chunk, and their sums.
__global__ void __launch_bounds__(kQueryThreads, 2)
    find_coefficients(const WeightLaw law, const double* radius, const double* nearest,
                      const double* total, const double* grad_logsumexp, const Pairs pairs,
                      int references, double floor, bool first_chunk, const Moments moments,
                      const Coefficients out) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Index query = blockIdx.x, row = query * pairs.stride;
  const int piece = static_cast<int>(blockIdx.y), first = piece * moments.size;
  const double r = radius[query], g = grad_logsumexp[query];
  const RowWeights of(law, nearest[query], total[query], r);
  const double found = moments.over_pieces(moments.mass, query), mass = found == 0 ? 1 : found;
  const double per_mass = 1 / mass;
  const double center = moments.over_pieces(moments.projection, query) * per_mass;
  const double unit = unit_of(law, of.nearest, r);
  double moment = 0, sum = 0;
  int live = 0;
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < pairs.stride; start += kPiece)
#pragma unroll
    for (int step = 0; step < kPiece; step += kQueryThreads) {
      const int j = start + step + static_cast<int>(threadIdx.x);
      double p = 0, c = 0;
      if (j < references) p = of.probability(law, pairs.squared[row + j], floor) * per_mass;
      if (p != 0) {
        const double pt = p * (pairs.projected[row + j] - center + g);
        const Ratios ratios = law.ratios(pairs.squared[row + j] - of.nearest, of.rate);
        c = -pt * ratios.nearest;
        moment += pt * ratios.excess;
      }
      const float rounded = static_cast<float>(c);
      sum += rounded;
      if (j < pairs.stride) {
        out.c.weight[row + j] = rounded;
        if (out.probability) {
          out.probability[row + j] = static_cast<float>(p);
          out.scaled[row + j] = static_cast<float>(c == 0 ? 0 : -c * unit);
        }
      }
      live += mark_live(out.c, query, pairs.stride, j, p != 0);
    }
  if (threadIdx.x % 32 > 0) live = 0;  // it is that of a warp
  live = over_block<kQueryThreads>(live, reinterpret_cast<int*>(scratch), Sum());
  moment = over_block<kQueryThreads>(moment, scratch, Sum());
  sum = over_block<kQueryThreads>(sum, scratch, Sum());
  if (threadIdx.x > 0) return;
  out.live[query * static_cast<int>(gridDim.y) + piece] = live;
  moments.add(moments.moment, query, piece, moment, first_chunk);
  moments.add(moments.sum, query, piece, sum, first_chunk);
}

// After the last chunk: what the sums over all references say.
__global__ void __launch_bounds__(kQueryThreads)
    finish_moments(const WeightLaw law, const double* radius, const double* nearest,
                   const double* grad_logsumexp, int queries, const Moments moments) {
  const int query = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (query >= queries) return;
  const double r = radius[query], low = nearest[query], g = grad_logsumexp[query];
  const double moment = moments.over_pieces(moments.moment, query) / law.exponent;
  const double exact_sum = law.gaussian ? -g : moment - g;
  const double unit = law.at_limit(low, r) ? 0 : unit_of(law, low, r);
  moments.total[query] = moments.over_pieces(moments.sum, query);
  moments.exact_sum[query] = exact_sum;
  moments.unit[query] = unit;
  moments.grad_radius[query] = law.at_limit(low, r) ? 0
                               : law.gaussian       ? (g * (low / r / r) + moment) / r
                                                    : r * unit * exact_sum;
}

}  // namespace
}  // namespace pfgm
