// From squared distances to weights, and to the coefficients of the gradient, on CUDA devices. How
// a distance becomes a weight is in cuda/weight_law.h.
#pragma once
#include "cuda/refinement.h"

namespace pfgm {
namespace {

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of a float32 result. So it does not matter that the sum has those
// of some tiles, and not those of tiles that weigh leaves out. A gradient multiplies p_j by (y_j −
// mean)²/s, which may be large; there the cutoff is kGradientCutoff nats lower.
constexpr double kWeightCutoff = 16, kGradientCutoff = 8;
constexpr int kQueryThreads = 256;
constexpr int kWeighBlocks = 6;     // of a multiprocessor; those of GeForce cards hold no more
constexpr int kMomentThreads = 32;  // of finish_moments, whose float64 many multiprocessors share
constexpr int kPiece = 1024;        // references that a block of pull takes at a time
constexpr int kSteps = kPiece / kQueryThreads;  // references of a thread at a time

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

// All threads of a warp call this. Returns how many weights of the warp are not zero. One lane
// stores their bits.
__device__ inline int mark_live(std::uint32_t* word, bool stores, bool counts) {
  const unsigned bits = __ballot_sync(kAll, counts);
  if (stores) *word = bits;
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

// What the weights of a query need.
struct RowWeights {
  Fall fall;
  float smallest;  // a weight below it becomes zero
};

// In a round a warp of weigh takes 32 words, each of 32 references. They are kQueryThreads
// references apart, because the warps of a block take neighbours.
constexpr int kRound = 32 * kQueryThreads;

// The words of a warp in a round. Places have 32 bits: a multiplication makes an address of them.
struct Round {
  unsigned first, place;  // of the first word, in its chunk, and in the rows of all queries
  int left;               // references from there to the end of the piece, or of the round

  // Whether there is a reference so far behind the first one.
  __device__ bool has(unsigned behind) const { return static_cast<int>(behind) < left; }

  // Stores zeros for the words that are not alive. Eight lanes have the weights of a word.
  __device__ void store_zeros(const ChunkWeights& out, unsigned alive, unsigned lane) const {
    const unsigned dead = ~alive;
    if (has(kQueryThreads * lane) && (dead >> lane & 1u) != 0)
      out.live[(place + kQueryThreads * lane) / 32] = 0;
    unsigned own = dead >> lane / 8;
#pragma unroll 1
    for (unsigned j = kQueryThreads * (lane / 8) + 4 * (lane % 8); has(j); j += 4 * kQueryThreads) {
      if ((own & 1u) != 0) *reinterpret_cast<float4*>(out.weight + (place + j)) = {};
      own >>= 4;
    }
  }
};

// Finds the weights of a query in the words of a warp.
template <bool HALVES>
struct Weigher {
  const WeightLaw& law;
  RowWeights row;
  float factor;

  __device__ float weight(double squared) const {
    const float w = law.weight(row.fall(squared));
    // The sum is that of the weights by which references are multiplied.
    return HALVES ? law.rounded(w) : w;
  }

  // A bit for each word whose tile has a weight that is not zero, as its smallest distance says. A
  // lane looks at one word. A weight that is NaN counts.
  __device__ unsigned alive(const Round& round, const Pairs& pairs, unsigned lane) const {
    const unsigned behind = kQueryThreads * lane;
    const bool known = round.has(behind);
    const double least = known ? pairs.lowest[blockIdx.x * static_cast<unsigned>(pairs.tiles) +
                                              (round.first + behind) / kTileReferences]
                               : 0;
    return __ballot_sync(kAll, known && !(weight(least) < row.smallest));
  }

  // Stores the weights of the words that are alive, and adds to their sum and to the number of
  // those that are not zero.
  __device__ void weigh(const Round& round, unsigned alive, const double* distances,
                        const ChunkWeights& out, unsigned lane, float& sum, int& live) const {
    const unsigned place = round.place + lane;
    const unsigned end = round.place + static_cast<unsigned>(round.left);
#pragma unroll 1
    while (alive != 0) {
      unsigned to[kSteps];  // ~0 after the last word
      double squared[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i, alive &= alive - 1) {
        const auto word = static_cast<unsigned>(__ffs(static_cast<int>(alive)) - 1);
        to[i] = alive != 0 ? place + kQueryThreads * word : ~0u;
        squared[i] = to[i] < end ? distances[to[i]] : 0;
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const bool stores = to[i] != ~0u;
        float w = weight(squared[i]);
        if (to[i] >= end) w = 0;
        sum += w;
        if (w < row.smallest) w = 0;
        const float stored = HALVES ? float_of(both_halves(w * factor)) : w * factor;
        if (stores) out.weight[to[i]] = stored;
        live += mark_live(out.live + to[i] / 32, lane == 0 && stores, w != 0);
      }
    }
  }
};

struct WeighMemory {
  std::int64_t least[kQueryThreads / 32];
  RowWeights row;
  float sums[kQueryThreads / 32];
  int live[kQueryThreads / 32];
};

// Weights of one query over a piece of the chunk, relative to the nearest reference so far, which
// comes from the minima of tiles and from earlier chunks. They are stored times `factor`, in halves
// if HALVES. GAUSSIAN is law.gaussian. Most tiles have no weight that is not zero; their distances
// are not read.
template <bool HALVES, bool GAUSSIAN>
__global__ void __launch_bounds__(kQueryThreads, kWeighBlocks)
    weigh(WeightLaw law, const double* radius, const Pairs pairs, int references, double floor,
          float factor, bool first_chunk, const QueryStates state, const ChunkWeights out,
          const PieceSums sums) {
  wait_for_earlier_launches();
  let_next_launch_start();
  WeighMemory& shared = *reinterpret_cast<WeighMemory*>(shared_memory());
  law.gaussian = GAUSSIAN;  // known to the compiler, which leaves the other law out
  const Lane lane = this_lane();
  const Index query = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  // Numbers ≥ 0 have the order of their bits, and −1 comes before. Comparing bits takes no float64.
  std::int64_t least = bits_of(static_cast<double>(INFINITY));
#pragma unroll 1
  for (int tile = thread; tile < pairs.tiles; tile += kQueryThreads)
    least = Least()(least, bits_of(pairs.lowest[query * pairs.tiles + tile]));
  least = least_of_warp(least);
  if (lane.lane == 0) shared.least[lane.warp] = least;
  __syncthreads();
  if (lane.warp == 0) {  // does the arithmetic in float64 for all
    for (const std::int64_t bits : shared.least) least = Least()(least, bits);
    const double before = first_chunk ? INFINITY : state.nearest[query];
    double nearest = isnan(before) ? -1 : fmin(double_of(least), before);
    if (nearest < 0) nearest = NAN;  // in the minima NaN is −1
    const Fall fall(nearest, law.rate(nearest, radius[query]));
    const double kept =
        first_chunk ? 0 : state.total[query] * static_cast<double>(law.weight(fall(before)));
    if (lane.lane == 0) {
      shared.row = {fall, static_cast<float>(floor) * fmaxf(static_cast<float>(kept), 1)};
      if (piece == 0) sums.closest[query] = nearest, sums.kept[query] = kept;
    }
  }
  __syncthreads();
  const Weigher<HALVES> weigher = {law, shared.row, factor};
  const unsigned row = blockIdx.x * static_cast<unsigned>(pairs.stride);
  const int first = piece * sums.size;
  const int end = first + static_cast<int>(smaller(sums.size, references - first));
  const auto own = static_cast<unsigned>(lane.lane);
  float sum = 0;
  int live = 0;
#pragma unroll 1
  for (int start = first; start < end; start += kRound) {
    const int at = start + 32 * lane.warp;
    const int left = static_cast<int>(smaller(end - at, kRound));
    const Round round = {static_cast<unsigned>(at), row + static_cast<unsigned>(at), left};
    const unsigned alive = weigher.alive(round, pairs, own);
    round.store_zeros(out, alive, own);
    weigher.weigh(round, alive, pairs.squared, out, own, sum, live);
  }
  sum = over_warp(sum, Sum());
  if (lane.lane == 0) shared.sums[lane.warp] = sum, shared.live[lane.warp] = live;
  __syncthreads();
  if (thread > 0) return;
  for (int w = 1; w < kQueryThreads / 32; ++w) sum += shared.sums[w], live += shared.live[w];
  sums.sum[query * sums.pieces + piece] = sum;
  sums.live[query * sums.pieces + piece] = live;
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
//     ∂L/∂x = F (Σ_j c_j (x − y_j) + (C − Σ_j c_j) (x − mean)), C − Σ c_j from rounding c_j
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
  double* of_chunk;   // (queries, pieces): the same of the last chunk alone
  double* squares;    // (queries, pieces): at least Σ c_j² of the last chunk
  double* total;      // (queries): Σ c_j over all pieces
  double* exact_sum;  // (queries): C, without rounding
  double* unit;       // (queries): F, 0 at a limit
  double* grad_radius;
  int pieces, size;  // as many as the first chunk has, and references of each

  // Adds to the sum of a piece.
  __device__ void add(double* sums, Index query, int piece, const TwoFloats& value,
                      bool first_chunk) const {
    double& at = sums[query * pieces + piece];
    at = static_cast<double>(value.high) + value.low + (first_chunk ? 0 : at);
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

// F; not finite where the row is at a limit. `nearest` is the smallest squared distance.
__device__ inline double unit_of(const WeightLaw& law, double nearest, double r) {
  return law.gaussian ? 1 / r / r : 2 * law.exponent / (nearest + r * r);
}

// What the probabilities of a query need.
struct RowProbabilities {
  Fall fall;
  float per_total;  // 1 over the sum of weights, 0 at a limit
  float floor;      // a probability below it becomes zero

  __device__ RowProbabilities(const WeightLaw& law, double nearest, double total, double r,
                              double floor)
      : fall(nearest, law.rate(nearest, r)),
        per_total(law.at_limit(nearest, r) ? 0 : reciprocal(static_cast<float>(total))),
        floor(static_cast<float>(floor)) {}

  // p_j from what `fall` says of the distance.
  __device__ float probability(const WeightLaw& law, float linear) const {
    const float p = law.weight(linear) * per_total;
    return p < floor ? 0 : p;
  }
};

struct PullMemory {
  RowProbabilities row;
  TwoFloats sums[2 * kQueryThreads / 32];
};

// Adds Σ p_j G·y_j and Σ p_j of one query over a piece of the chunk. GAUSSIAN is law.gaussian.
template <bool GAUSSIAN>
__global__ void __launch_bounds__(kQueryThreads)
    pull(WeightLaw law, const double* radius, const double* nearest, const double* total,
         const Pairs pairs, int references, double floor, bool first_chunk, const Moments moments) {
  wait_for_earlier_launches();
  let_next_launch_start();
  PullMemory& shared = *reinterpret_cast<PullMemory*>(shared_memory());
  law.gaussian = GAUSSIAN;
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  const Index query = blockIdx.x, at = query * pairs.stride + thread;
  const int first = piece * moments.size;
  if (thread < 32) {  // one warp does the arithmetic in float64 for all
    const RowProbabilities row(law, nearest[query], total[query], radius[query], floor);
    if (thread == 0) shared.row = row;
  }
  __syncthreads();
  const RowProbabilities row = shared.row;
  const double* const distances = pairs.squared + at;
  const float* const products = pairs.projected + at;
  CompensatedSum projection, mass;
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < references; start += kPiece) {
    const int left = references - start - thread;
    double squared[kSteps];
    float projected[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = i * kQueryThreads;
      squared[i] = step < left ? distances[start + step] : 0;
      projected[i] = step < left ? products[start + step] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool known = i * kQueryThreads < left;
      const float p = known ? row.probability(law, row.fall(squared[i])) : 0;
      projection.add_product(p, p != 0 ? projected[i] : 0);  // G·y_j is undefined where p = 0
      mass.add(p);
    }
  }
  TwoFloats sums[] = {projection.result(), mass.result()};
  sum_over_block<kQueryThreads>(sums, shared.sums);
  if (threadIdx.x > 0) return;
  moments.add(moments.projection, query, piece, sums[0], first_chunk);
  moments.add(moments.mass, query, piece, sums[1], first_chunk);
}

// c_j, p_j and −F c_j of the chunk.
struct Coefficients {
  ChunkWeights c;
  int* live;  // (queries, pieces): how many c_j may be other than zero
  float* probability;
  float* scaled;
};

// A number that may be out of the range of float32, as a product of two that are not.
struct TwoFactors {
  float first, second;

  __device__ explicit TwoFactors(double v) {
    const int power = (static_cast<int>(bits_of(v) >> 52 & 2047) - 1023) / 2;
    const int half = power < -126 ? -126 : power > 126 ? 126 : power;
    first = static_cast<float>(v * double_of(static_cast<std::int64_t>(1023 - half) << 52));
    second = float_of(static_cast<std::uint32_t>(127 + half) << 23);
  }
  __device__ float times(float v) const { return v * first * second; }
};

// What the coefficients of a query need besides.
struct RowCoefficients {
  RowProbabilities probabilities;
  float per_mass;
  TwoFloats center;  // Σ p_i G·y_i − g
  TwoFactors unit;   // F

  __device__ RowCoefficients(const WeightLaw& law, const RowProbabilities& probabilities,
                             const Moments& moments, Index query, double nearest, double r,
                             double g)
      : probabilities(probabilities), unit(unit_of(law, nearest, r)) {
    const double found = moments.over_pieces(moments.mass, query), mass = found == 0 ? 1 : found;
    const double at = moments.over_pieces(moments.projection, query) / mass - g;
    per_mass = reciprocal(static_cast<float>(mass));
    center.high = static_cast<float>(at);
    center.low = static_cast<float>(at - center.high);
  }
};

struct alignas(16) CoefficientMemory {
  RowCoefficients row;
  TwoFloats sums[3 * kQueryThreads / 32];
  float largest[kQueryThreads / 32];
  int live[kQueryThreads / 32];
};

// Coefficients of one query over a piece of the chunk, and their sums. GAUSSIAN is law.gaussian.
// With REFERENCES it stores what the gradient of the references needs.
template <bool GAUSSIAN, bool REFERENCES>
__global__ void __launch_bounds__(kQueryThreads, 2)
    find_coefficients(WeightLaw law, const double* radius, const double* nearest,
                      const double* total, const double* grad_logsumexp, const Pairs pairs,
                      int references, double floor, bool first_chunk, const Moments moments,
                      const Coefficients out) {
  wait_for_earlier_launches();
  let_next_launch_start();
  CoefficientMemory& shared = *reinterpret_cast<CoefficientMemory*>(shared_memory());
  law.gaussian = GAUSSIAN;
  const Lane lane = this_lane();
  const int thread = static_cast<int>(threadIdx.x), piece = static_cast<int>(blockIdx.y);
  const int first = piece * moments.size, stride = static_cast<int>(pairs.stride);
  const Index query = blockIdx.x, at = query * stride + thread;
  if (lane.warp == 0) {  // does the arithmetic in float64 for all
    const double low = nearest[query], r = radius[query];
    const RowCoefficients row(law, RowProbabilities(law, low, total[query], r, floor), moments,
                              query, low, r, grad_logsumexp[query]);
    if (lane.lane == 0) shared.row = row;
  }
  __syncthreads();
  const RowCoefficients row = shared.row;
  const double* const distances = pairs.squared + at;
  const float* const products = pairs.projected + at;
  std::uint32_t* const words = out.c.live + query * (stride / 32) + lane.warp;
  CompensatedSum moment, sum;
  float size = 0, largest = 0;  // of c_j
  int live = 0;
#pragma unroll 1
  for (int start = first; start < first + moments.size && start < stride; start += kPiece) {
    const int left = references - start - thread, columns = stride - start - thread;
    double squared[kSteps];
    float projected[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = i * kQueryThreads;
      squared[i] = step < left ? distances[start + step] : 0;
      projected[i] = step < left ? products[start + step] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = i * kQueryThreads;
      const float linear = row.probabilities.fall(squared[i]);
      // per_mass may be no number.
      const float p = step < left ? row.probabilities.probability(law, linear) * row.per_mass : 0;
      const float pt = p * ((projected[i] - row.center.high) - row.center.low);
      const Ratios ratios = law.ratios(linear);
      const float c =
          p == 0 ? 0 : -rounded_product(pt, ratios.nearest);  // G·y_j is undefined where p = 0
      moment.add(p == 0 ? 0 : pt * ratios.excess);
      sum.add(c);
      size += fabsf(c), largest = fmaxf(largest, fabsf(c));
      if (step < columns) {
        out.c.weight[at + start + step] = c;
        if (REFERENCES) {
          out.probability[at + start + step] = p;
          out.scaled[at + start + step] = c == 0 ? 0 : row.unit.times(-c);
        }
      }
      live += mark_live(words + (start + step) / 32, lane.lane == 0 && step < columns, p != 0);
    }
  }
  if (lane.lane == 0) shared.live[lane.warp] = live;
  largest = over_block<kQueryThreads>(largest, shared.largest, Most());
  TwoFloats sums[] = {moment.result(), sum.result(), {size, 0}};
  sum_over_block<kQueryThreads>(sums, shared.sums);
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kQueryThreads / 32; ++w) live += shared.live[w];
  out.live[query * static_cast<int>(gridDim.y) + piece] = live;
  moments.add(moments.moment, query, piece, sums[0], first_chunk);
  moments.add(moments.sum, query, piece, sums[1], first_chunk);
  moments.add(moments.of_chunk, query, piece, sums[1], true);
  const double of_size = static_cast<double>(sums[2].high) + sums[2].low;
  moments.squares[query * moments.pieces + piece] = of_size * largest;
}

// After the last chunk: what the sums over all references say.
__global__ void __launch_bounds__(kMomentThreads)
    finish_moments(const WeightLaw law, const double* radius, const double* nearest,
                   const double* grad_logsumexp, int queries, const Moments moments) {
  wait_for_earlier_launches();
  let_next_launch_start();
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
