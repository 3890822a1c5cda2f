// The CPU kernels, compiled once per instruction set (PFGM_ISA). Everything below has internal
// linkage and no standard template is instantiated, so that the linker cannot share a function
// compiled for AVX-512 with the portable build.
//
// Blocks of queries and chunks of references keep the workspace bounded. For each pair:
//   1. squared distances by exact differences (|x|² + |y|² − 2x·y loses the digits that the exponent
//      (N + D)/2 multiplies), tiled in registers, merged in float64; in float32 those that decide
//      the answer are computed again in float64;
//   2. weights relative to the nearest reference seen so far, which is where float64 state is merged;
//   3. the weighted sum, which touches only references whose weight can be seen.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "posterior_mean.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

using Index = std::int64_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Index kTile = 64;          // references a tile
constexpr Index kChunk = 2048;       // references a chunk, a multiple of kTile
constexpr Index kMaxBlock = 504;     // queries a block, a multiple of every Simd::queries
constexpr Index kRows = 8;           // rows that share a tile of references in the weighted sum
constexpr Index kSumPanel = 1024;    // features of one weighted sum
constexpr Index kStateBytes = 24 << 20;
// A weight below e^-60 of the largest cannot be seen in float64, not even in a sum over 1e9 of them.
constexpr double kVisible = 60.0;
// What float32 distances cannot decide is computed again in float64 (Distances::refine):
constexpr double kTiny = 1e-30;      // squared distances below this lose digits to underflow
constexpr double kRounding = 2e-5;   // bound of the relative error of the others
constexpr double kNear = 20.0;       // a weight below e^-20 of the largest needs no more digits
constexpr Index kFew = 16;           // so many near references are worth their digits in any case

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileQueries = 6, kTileReferences = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileQueries = 4, kTileReferences = 2;
#else
constexpr int kVectorBytes = 16, kTileQueries = 4, kTileReferences = 2;
#endif

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr Index lanes = kVectorBytes / sizeof(T);
  // 3 KiB of features: a panel of queries and of references fits L1. It is also at most 256
  // additions into one lane, which keeps d² within 1e-5 of exact in float32.
  static constexpr Index panel = 3072 / sizeof(T);
  static_assert(panel / lanes <= 256, "too many additions into one accumulator");
};

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- element types --------------------------------------------------------------------------

struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T> inline T load(float v) { return static_cast<T>(v); }
template <class T> inline T load(double v) { return static_cast<T>(v); }
template <class T> inline T load(std::uint8_t v) { return static_cast<T>(v) / T(127.5) - T(1); }
template <class T> inline T load(BFloat16 v) {
  return static_cast<T>(from_bits(static_cast<std::uint32_t>(v.bits) << 16));
}
template <class T> inline T load(Float16 v) {
  // Exponent and mantissa moved into place are the value times 2^-112, subnormals included.
  const std::uint32_t magnitude = v.bits & 0x7fffu, sign = (v.bits & 0x8000u) << 16;
  const float finite = from_bits(magnitude << 13) * 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &finite, sizeof bits);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  return static_cast<T>(from_bits(bits | sign));
}

// ---- memory and threads ---------------------------------------------------------------------

template <class T>
class Buffer {
 public:
  explicit Buffer(Index count)
      : data_(static_cast<T*>(std::aligned_alloc(
            64, static_cast<std::size_t>(round_up(larger(count, 1) * sizeof(T), 64))))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T* at(Index i) const { return data_ + i; }
  T& operator[](Index i) const { return data_[i]; }
  T* data() const { return data_; }

 private:
  T* data_;
};

template <class F>
void parallel(Index tasks, int threads, F&& body) {
  run_parallel(
      tasks, threads,
      [](void* context, Index task, int thread) { (*static_cast<F*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// ---- weights --------------------------------------------------------------------------------

// How a squared distance becomes a weight.
struct Law {
  bool gaussian;    // D = ∞
  double exponent;  // (N + D)/2, D finite

  Law(double dimensions, Index features)
      : gaussian(std::isinf(dimensions)), exponent((features + dimensions) / 2) {}

  // log of the weight at squared distance nearest + excess, relative to that at nearest.
  double relative(double excess, double nearest, double radius) const {
    if (excess == 0) return 0;
    if (gaussian) return -excess / radius / radius / 2;
    return -exponent * std::log1p(excess / (nearest + radius * radius));
  }

  double absolute(double squared, double radius) const {
    if (gaussian) return squared == 0 ? 0 : -squared / radius / radius / 2;
    return -exponent * std::log(squared + radius * radius);
  }

  // The excess at which a weight is e^-fall of that of the nearest reference.
  double excess(double fall, double nearest, double radius) const {
    if (gaussian) return 2 * fall * radius * radius;
    return std::expm1(fall / exponent) * (nearest + radius * radius);
  }

  // How many times a relative error of the nearest squared distance is one of its log weight.
  double sensitivity(double nearest, double radius) const {
    if (gaussian) return nearest / radius / radius / 2;
    return exponent * nearest / (nearest + radius * radius);
  }
};

// ---- pass 1: squared distances --------------------------------------------------------------

// out[q, r] += |x_q − y_r|² over n features (a multiple of the lane count, zero-padded).
template <class T>
void distance_tile(const T* x, Index x_stride, const T* y, Index y_stride, Index n, double* out,
                   Index out_stride) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes;
  Vector sum[kTileQueries][kTileReferences] = {};
  for (Index k = 0; k < n; k += lanes) {
    Vector reference[kTileReferences];
    for (int r = 0; r < kTileReferences; ++r)
      reference[r] = *reinterpret_cast<const Vector*>(y + r * y_stride + k);
    for (int q = 0; q < kTileQueries; ++q) {
      const Vector query = *reinterpret_cast<const Vector*>(x + q * x_stride + k);
      for (int r = 0; r < kTileReferences; ++r) {
        const Vector difference = query - reference[r];
        sum[q][r] += difference * difference;
      }
    }
  }
  for (int q = 0; q < kTileQueries; ++q)
    for (int r = 0; r < kTileReferences; ++r) {
      double total = 0;
      for (Index lane = 0; lane < lanes; ++lane) total += sum[q][r][lane];
      out[q * out_stride + r] += total;
    }
}

// A block of queries against chunks of references: squared distances, rows kChunk apart.
template <class T, class R>
class Distances {
 public:
  Distances(const Problem& problem, Index max_queries)
      : problem_(problem),
        padded_(round_up(problem.features, Simd<T>::lanes)),
        queries_(round_up(max_queries, kTileQueries) * padded_),
        squared_(round_up(max_queries, kTileQueries) * kChunk),
        packed_(problem.threads * kTile * Simd<T>::panel) {}

  explicit operator bool() const { return queries_ && squared_ && packed_; }

  void set_queries(Index first, Index count) {
    first_query_ = first;
    rows_ = round_up(count, kTileQueries);
    std::memset(queries_.data(), 0, rows_ * padded_ * sizeof(T));
    for (Index b = 0; b < count; ++b)
      std::memcpy(queries_.at(b * padded_), query(b), problem_.features * sizeof(T));
  }

  void set_chunk(Index first, Index count) {
    first_reference_ = first;
    count_ = count;
    parallel((count + kTile - 1) / kTile, problem_.threads,
             [&](Index tile, int thread) { fill_tile(tile, thread); });
  }

  // The nearest squared distance of query b within the chunk; NaN if a distance is not finite.
  // float32 distances are computed again in float64 where one overflowed, and for references near
  // the minimum where few compete or their error would show: a point drawn from the references has
  // a sensitivity of features/2, and the error of many averages out.
  double refine(const Law& law, Index b, double radius) {
    double* squared = row(b);
    double nearest = scan(b);
    if (sizeof(T) != sizeof(float)) return nearest;
    double limit = kInfinity;
    if (std::isfinite(nearest)) {
      const double near =
          nearest * (1 + 2 * kRounding) + law.excess(kNear, nearest, radius) + kTiny;
      Index candidates = 0;
      for (Index j = 0; j < count_; ++j) candidates += squared[j] <= near;
      const double tolerated = larger(problem_.features * 3 / 4, 256);
      const bool decisive = candidates <= kFew || law.sensitivity(nearest, radius) > tolerated;
      limit = decisive ? near : kTiny;
    }
    for (Index j = 0; j < count_; ++j)
      if (!(squared[j] > limit)) squared[j] = exact(query(b), reference(j));
    return scan(b);
  }

  double* row(Index b) const { return squared_.at(b * kChunk); }
  const R* reference(Index j) const {
    return static_cast<const R*>(problem_.y) + (first_reference_ + j) * problem_.y_stride;
  }
  const T* query(Index b) const {
    return static_cast<const T*>(problem_.x) + (first_query_ + b) * problem_.x_stride;
  }
  Index count() const { return count_; }

 private:
  void fill_tile(Index tile, int thread) {
    const Index begin = tile * kTile, filled = smaller(kTile, count_ - begin);
    const Index width = round_up(filled, kTileReferences);
    T* packed = packed_.at(thread * kTile * Simd<T>::panel);
    for (Index b = 0; b < rows_; ++b) std::memset(row(b) + begin, 0, width * sizeof(double));
    for (Index k = 0; k < problem_.features; k += Simd<T>::panel) {
      const Index n = smaller(Simd<T>::panel, problem_.features - k);
      const Index padded = round_up(n, Simd<T>::lanes);
      for (Index j = 0; j < width; ++j) {
        T* out = packed + j * padded;
        const Index present = j < filled ? n : 0;
        const R* y = present ? reference(begin + j) + k : nullptr;
        for (Index i = 0; i < present; ++i) out[i] = load<T>(y[i]);
        for (Index i = present; i < padded; ++i) out[i] = 0;
      }
      for (Index b = 0; b < rows_; b += kTileQueries)
        for (Index j = 0; j < width; j += kTileReferences)
          distance_tile(queries_.at(b * padded_ + k), padded_, packed + j * padded, padded, padded,
                        row(b) + begin + j, kChunk);
    }
  }

  double scan(Index b) const {
    const double* squared = row(b);
    double nearest = kInfinity;
    bool finite = true;
    for (Index j = 0; j < count_; ++j) {
      finite &= squared[j] <= std::numeric_limits<double>::max();
      nearest = squared[j] < nearest ? squared[j] : nearest;
    }
    return finite ? nearest : std::numeric_limits<double>::quiet_NaN();
  }

  double exact(const T* x, const R* y) const {
    constexpr Index lanes = 16;
    double sum[lanes] = {};
    Index k = 0;
    for (; k + lanes <= problem_.features; k += lanes)
      for (Index lane = 0; lane < lanes; ++lane) {
        const double difference = static_cast<double>(x[k + lane]) - load<double>(y[k + lane]);
        sum[lane] += difference * difference;
      }
    for (; k < problem_.features; ++k) {
      const double difference = static_cast<double>(x[k]) - load<double>(y[k]);
      sum[0] += difference * difference;
    }
    double total = 0;
    for (Index lane = 0; lane < lanes; ++lane) total += sum[lane];
    return total;
  }

  const Problem& problem_;
  const Index padded_;
  Buffer<T> queries_;
  Buffer<double> squared_;
  Buffer<T> packed_;
  Index first_query_ = 0, rows_ = 0, first_reference_ = 0, count_ = 0;
};

// ---- blocks ---------------------------------------------------------------------------------

Index block_size(const Problem& problem, Index bytes_a_feature) {
  const Index fitting = kStateBytes / (larger(problem.features, 1) * bytes_a_feature);
  const Index whole = fitting / kTileQueries * kTileQueries;
  return smaller(problem.queries, smaller(kMaxBlock, larger(whole, kTileQueries)));
}

Status check_radius(const Problem& problem) {
  for (Index b = 0; b < problem.queries; ++b)
    if (!(problem.radius[b] >= 0 && std::isfinite(problem.radius[b])))
      return {Failure::radius, b};
  return {};
}

// ---- pass 2: weighted sums ------------------------------------------------------------------

// The references of one tile that count for one row. Weights are relative to `scale`, the sum of
// their magnitudes: coefficients of the backward pass may lie outside the range of float32, and a
// sum of many large references would overflow.
template <class T>
struct Live {
  Index index[kTile];
  T weight[kTile];
  double scale = 0;
  int count = 0;

  Live(const double* weights, Index begin, Index end) {
    for (Index j = begin; j < end; ++j) scale += std::fabs(weights[j]);
    for (Index j = begin; j < end; ++j)
      if (weights[j] != 0) {
        index[count] = j;
        weight[count++] = static_cast<T>(weights[j] / scale);
      }
  }
};

// sum[k] += Σ_i w_i (y_i[k] − origin[k]), at most kTile additions in T before the caller's float64.
// Four references at a time: one read and write of the sum for four products.
template <class T, class R, bool kOrigin>
void add_weighted(T* __restrict sum, const T* __restrict origin, const Distances<T, R>& distances,
                  const Live<T>& live, Index k0, Index n) {
  int i = 0;
  const auto term = [&](T w, const R* y, Index k) {
    return w * (kOrigin ? load<T>(y[k]) - origin[k] : load<T>(y[k]));
  };
  for (; i + 4 <= live.count; i += 4) {
    const T w0 = live.weight[i], w1 = live.weight[i + 1], w2 = live.weight[i + 2],
            w3 = live.weight[i + 3];
    const R* y0 = distances.reference(live.index[i]) + k0;
    const R* y1 = distances.reference(live.index[i + 1]) + k0;
    const R* y2 = distances.reference(live.index[i + 2]) + k0;
    const R* y3 = distances.reference(live.index[i + 3]) + k0;
    for (Index k = 0; k < n; ++k)
      sum[k] += (term(w0, y0, k) + term(w1, y1, k)) + (term(w2, y2, k) + term(w3, y3, k));
  }
  for (; i < live.count; ++i) {
    const T w = live.weight[i];
    const R* y = distances.reference(live.index[i]) + k0;
    for (Index k = 0; k < n; ++k) sum[k] += term(w, y, k);
  }
}

// state[b, :] = scale[b] · state[b, :] + Σ_j weights[b, j] (y_j − origin[b, :]) over the chunk;
// scale may be null, and so may origin without kOrigin.
template <class T, class R, bool kOrigin, class Weights>
void weighted_sums(const Problem& problem, const Distances<T, R>& distances, Index rows,
                   const Weights& weights, const double* scale, const T* origin, double* state) {
  const Index features = problem.features;
  const Index panels = (features + kSumPanel - 1) / kSumPanel;
  parallel((rows + kRows - 1) / kRows * panels, problem.threads, [&](Index task, int) {
    const Index first = task / panels * kRows, last = smaller(first + kRows, rows);
    const Index k0 = task % panels * kSumPanel, n = smaller(kSumPanel, features - k0);
    if (scale != nullptr)
      for (Index b = first; b < last; ++b)
        if (scale[b] != 1)
          for (Index k = k0; k < k0 + n; ++k) state[b * features + k] *= scale[b];
    T sum[kSumPanel];
    for (Index begin = 0; begin < distances.count(); begin += kTile)
      for (Index b = first; b < last; ++b) {
        const Live<T> live(weights(b), begin, smaller(begin + kTile, distances.count()));
        if (live.count == 0) continue;
        for (Index k = 0; k < n; ++k) sum[k] = 0;
        const T* from = kOrigin ? origin + b * features + k0 : nullptr;
        add_weighted<T, R, kOrigin>(sum, from, distances, live, k0, n);
        double* out = state + b * features + k0;
        for (Index k = 0; k < n; ++k) out[k] += live.scale * sum[k];
      }
  });
}

// ---- forward --------------------------------------------------------------------------------

// The merge state of one query: everything is relative to the nearest reference so far.
struct Row {
  double nearest, total, scale;
};

// Takes a chunk into the row: writes its weights (which may replace the distances); row.scale is
// what the earlier sums must be multiplied by.
void merge(const Law& law, Row& row, double radius, double chunk_nearest, const double* squared,
           double* weights, Index count) {
  row.scale = 1;
  if (chunk_nearest < row.nearest) {
    row.scale = row.total == 0 ? 0
                               : std::exp(law.relative(row.nearest - chunk_nearest, chunk_nearest,
                                                       radius));
    row.total *= row.scale;
    row.nearest = chunk_nearest;
  }
  const double visible = law.excess(kVisible, row.nearest, radius);
  for (Index j = 0; j < count; ++j) {
    const double excess = squared[j] - row.nearest;
    weights[j] = excess > visible ? 0 : std::exp(law.relative(excess, row.nearest, radius));
    row.total += weights[j];
  }
}

double logsumexp(const Law& law, const Row& row, double radius) {
  if (!law.gaussian && row.nearest + radius * radius == 0) return kInfinity;
  return law.absolute(row.nearest, radius) + std::log(row.total);
}

template <class T, class R>
Status forward(const Problem& problem, const Forward& out) {
  if (const Status status = check_radius(problem); status.failure != Failure::none) return status;
  const Index features = problem.features;
  const Index block = block_size(problem, sizeof(double) + sizeof(T));
  const Law law(problem.dimensions, features);
  Distances<T, R> distances(problem, block);
  Buffer<double> sums(block * features), scale(block);
  Buffer<Row> rows(block);
  if (!distances || !sums || !scale || !rows) return {Failure::memory, 0};

  for (Index first = 0; first < problem.queries; first += block) {
    const Index count = smaller(block, problem.queries - first);
    distances.set_queries(first, count);
    std::memset(sums.data(), 0, count * features * sizeof(double));
    for (Index b = 0; b < count; ++b) rows[b] = {kInfinity, 0, 1};

    for (Index begin = 0; begin < problem.references; begin += kChunk) {
      distances.set_chunk(begin, smaller(kChunk, problem.references - begin));
      parallel(count, problem.threads, [&](Index b, int) {
        const double radius = problem.radius[first + b];
        const double nearest = distances.refine(law, b, radius);
        if (std::isnan(nearest)) {
          rows[b].nearest = nearest;
          return;
        }
        double* row = distances.row(b);
        merge(law, rows[b], radius, nearest, row, row, distances.count());
        scale[b] = rows[b].scale;
      });
      for (Index b = 0; b < count; ++b)
        if (std::isnan(rows[b].nearest)) return {Failure::value, first + b};
      weighted_sums<T, R, false>(
          problem, distances, count, [&](Index b) { return distances.row(b); }, scale.data(),
          nullptr, sums.data());
    }

    parallel(count, problem.threads, [&](Index b, int) {
      T* mean = static_cast<T*>(out.mean) + (first + b) * features;
      for (Index k = 0; k < features; ++k)
        mean[k] = static_cast<T>(sums[b * features + k] / rows[b].total);
      out.logsumexp[first + b] = logsumexp(law, rows[b], problem.radius[first + b]);
    });
  }
  return {};
}

// ---- backward -------------------------------------------------------------------------------
//
// With upstream G = ∂L/∂mean and g = ∂L/∂logsumexp:
//     t_j = G·(y_j − mean) + g,   c_j = −(N + D) p_j t_j / s_j   (D = ∞: −p_j t_j / σ²)
//     ∂L/∂x = Σ_j c_j (x − y_j),  ∂L/∂r = r Σ_j c_j              (D = ∞: Σ_j p_j t_j d_j² / σ³)
//     ∂L/∂y_j = Σ_b [p_bj G_b − c_bj (x_b − y_j)]
// Σ p_j t_j = g, so that the t_j nearly cancel in Σ c_j. With s and e_j = d_j² − d² of the nearest
// reference and moment = Σ p_j t_j e_j / s_j (D = ∞: Σ p_j t_j e_j / σ²) nothing is lost:
//     C = Σ c_j = −(N + D)(g − moment)/s                         (D = ∞: −g/σ²)
//     ∂L/∂x = C (x − mean) − Σ_j c_j (y_j − mean)
//     ∂L/∂r = r C                                                (D = ∞: (g d²/σ² + moment)/σ)
// p_j is found relative to the nearest reference, as in the forward pass: logsumexp, of the size of
// d²/σ², has no digits left for it where σ is small.

// g·(y − m), at most 256 additions into one lane.
template <class T, class R>
double dot_difference(const T* g, const R* y, const T* m, Index n) {
  constexpr Index lanes = Simd<T>::lanes;
  double total = 0;
  for (Index begin = 0; begin < n; begin += Simd<T>::panel) {
    const Index end = smaller(begin + Simd<T>::panel, n);
    T sum[lanes] = {};
    Index k = begin;
    for (; k + lanes <= end; k += lanes)
      for (Index lane = 0; lane < lanes; ++lane)
        sum[lane] += g[k + lane] * (load<T>(y[k + lane]) - m[k + lane]);
    for (Index lane = 0; lane < lanes; ++lane) total += sum[lane];
    for (; k < end; ++k) total += g[k] * (load<T>(y[k]) - m[k]);
  }
  return total;
}

// At a limit (r = 0 on a reference, σ = 0) the mean is locally constant.
bool at_limit(const Law& law, double logsumexp, double radius) {
  return !std::isfinite(logsumexp) || (law.gaussian && radius == 0);
}

// One query against a chunk: squared distances become p in place, c goes to its own row. Returns
// the chunk's part of the moment.
template <class T, class R>
double coefficients(const Problem& problem, const Backward& io, const Law& law, const Row& row,
                    const Distances<T, R>& distances, Index b, Index query, double* c) {
  const Index features = problem.features;
  const double radius = problem.radius[query];
  const double g = io.grad_logsumexp == nullptr ? 0 : io.grad_logsumexp[query];
  const T* grad = static_cast<const T*>(io.grad_mean) + query * features;
  const T* mean = static_cast<const T*>(io.mean) + query * features;
  double* p = distances.row(b);
  const bool limit = at_limit(law, io.logsumexp[query], radius);
  const double visible = law.excess(kVisible, row.nearest, radius);
  double moment = 0;
  for (Index j = 0; j < distances.count(); ++j) {
    const double squared = p[j], excess = squared - row.nearest;
    p[j] = c[j] = 0;
    if (limit || excess > visible) continue;
    p[j] = std::exp(law.relative(excess, row.nearest, radius)) / row.total;
    const double t = dot_difference(grad, distances.reference(j), mean, features) + g;
    if (law.gaussian) {
      c[j] = -p[j] * t / radius / radius;
      moment -= c[j] * excess;
    } else {
      c[j] = -2 * law.exponent * p[j] * t / (squared + radius * radius);
      moment += p[j] * t * (excess / (squared + radius * radius));
    }
  }
  return moment;
}

// What a query needs beside its sum over references: C and ∂L/∂radius.
struct Totals {
  double c, grad_radius;
};

Totals totals(const Law& law, const Row& row, double moment, double g, double logsumexp,
              double radius) {
  if (at_limit(law, logsumexp, radius)) return {0, 0};
  if (law.gaussian)
    return {-g / radius / radius, (g * (row.nearest / radius / radius) + moment) / radius};
  const double c = -2 * law.exponent * (g - moment) / (row.nearest + radius * radius);
  return {c, radius * c};
}

// grad_y[j, :] += Σ_b [p_bj G_b − c_bj (x_b − y_j)] for the references of the chunk.
template <class T, class R>
void reference_gradients(const Problem& problem, const Backward& io,
                         const Distances<T, R>& distances, Index first_query, Index queries,
                         Index first_reference, const Buffer<double>& c) {
  const Index features = problem.features;
  const Index panels = (features + kSumPanel - 1) / kSumPanel;
  parallel(distances.count() * panels, problem.threads, [&](Index task, int) {
    const Index j = task / panels, k0 = task % panels * kSumPanel;
    const Index n = smaller(kSumPanel, features - k0);
    const R* y = distances.reference(j) + k0;
    double sum[kSumPanel] = {};
    for (Index b = 0; b < queries; ++b) {
      const double p = distances.row(b)[j], coefficient = c[b * kChunk + j];
      if (p == 0) continue;
      const T* grad = static_cast<const T*>(io.grad_mean) + (first_query + b) * features + k0;
      const T* x = distances.query(b) + k0;
      for (Index k = 0; k < n; ++k)
        sum[k] += p * static_cast<double>(grad[k]) -
                  coefficient * (static_cast<double>(x[k]) - static_cast<double>(load<T>(y[k])));
    }
    T* out = static_cast<T*>(io.grad_y) + (first_reference + j) * features + k0;
    for (Index k = 0; k < n; ++k) out[k] += static_cast<T>(sum[k]);
  });
}

Status check_singular(const Problem& problem, const Backward& io) {
  if (io.grad_logsumexp == nullptr) return {};
  for (Index b = 0; b < problem.queries; ++b)
    if (io.grad_logsumexp[b] != 0 &&
        (!std::isfinite(io.logsumexp[b]) ||
         (std::isinf(problem.dimensions) && problem.radius[b] == 0)))
      return {Failure::singular, b};
  return {};
}

template <class T, class R>
Status backward(const Problem& problem, const Backward& io) {
  if (const Status status = check_singular(problem, io); status.failure != Failure::none)
    return status;
  const Index features = problem.features;
  const Index block = block_size(problem, sizeof(double) + sizeof(T));
  const Law law(problem.dimensions, features);
  Distances<T, R> distances(problem, block);
  Buffer<double> sums(io.grad_x ? block * features : 0), c(block * kChunk), moments(block);
  Buffer<Row> rows(block);
  if (!distances || !sums || !c || !moments || !rows) return {Failure::memory, 0};
  const bool one_chunk = problem.references <= kChunk;
  if (io.grad_y) std::memset(io.grad_y, 0, problem.references * features * sizeof(T));

  for (Index first = 0; first < problem.queries; first += block) {
    const Index count = smaller(block, problem.queries - first);
    const T* mean = static_cast<const T*>(io.mean) + first * features;
    distances.set_queries(first, count);
    if (io.grad_x) std::memset(sums.data(), 0, count * features * sizeof(double));
    for (Index b = 0; b < count; ++b) {
      moments[b] = 0;
      rows[b] = {kInfinity, 0, 1};
    }

    for (Index begin = 0; begin < problem.references; begin += kChunk) {
      distances.set_chunk(begin, smaller(kChunk, problem.references - begin));
      parallel(count, problem.threads, [&](Index b, int) {
        const double radius = problem.radius[first + b];
        const double nearest = distances.refine(law, b, radius);
        if (std::isnan(nearest))
          rows[b].nearest = nearest;
        else
          merge(law, rows[b], radius, nearest, distances.row(b), c.at(b * kChunk),
                distances.count());
      });
      for (Index b = 0; b < count; ++b)
        if (std::isnan(rows[b].nearest)) return {Failure::value, first + b};
    }

    for (Index begin = 0; begin < problem.references; begin += kChunk) {
      if (!one_chunk) distances.set_chunk(begin, smaller(kChunk, problem.references - begin));
      parallel(count, problem.threads, [&](Index b, int) {
        if (!one_chunk) distances.refine(law, b, problem.radius[first + b]);
        moments[b] += coefficients(problem, io, law, rows[b], distances, b, first + b,
                                   c.at(b * kChunk));
      });
      if (io.grad_x)
        weighted_sums<T, R, true>(
            problem, distances, count, [&](Index b) { return c.at(b * kChunk); }, nullptr, mean,
            sums.data());
      if (io.grad_y)
        reference_gradients(problem, io, distances, first, count, begin, c);
    }

    for (Index b = 0; b < count; ++b) {
      const Index query = first + b;
      const double g = io.grad_logsumexp == nullptr ? 0 : io.grad_logsumexp[query];
      const Totals total =
          totals(law, rows[b], moments[b], g, io.logsumexp[query], problem.radius[query]);
      if (io.grad_radius) io.grad_radius[query] = total.grad_radius;
      if (!io.grad_x) continue;
      const T* x = distances.query(b);
      T* out = static_cast<T*>(io.grad_x) + query * features;
      for (Index k = 0; k < features; ++k) {
        const double offset = static_cast<double>(x[k]) - static_cast<double>(mean[b * features + k]);
        out[k] = static_cast<T>(total.c * offset - sums[b * features + k]);
      }
    }
  }
  return {};
}

// ---- entry points ---------------------------------------------------------------------------

template <class T, class F>
Status with_reference_type(Type type, const F& f) {
  switch (type) {
    case Type::float32: return f(T(), float());
    case Type::float64: return f(T(), double());
    case Type::bfloat16: return f(T(), BFloat16());
    case Type::float16: return f(T(), Float16());
    case Type::uint8: return f(T(), std::uint8_t());
  }
  std::abort();
}

template <class F>
Status with_types(const Problem& problem, const F& f) {
  return problem.type == Type::float64 ? with_reference_type<double>(problem.reference_type, f)
                                       : with_reference_type<float>(problem.reference_type, f);
}

Status run_forward(const Problem& problem, const Forward& out) {
  return with_types(problem, [&](auto t, auto r) {
    return forward<decltype(t), decltype(r)>(problem, out);
  });
}

Status run_backward(const Problem& problem, const Backward& io) {
  return with_types(problem, [&](auto t, auto r) {
    return backward<decltype(t), decltype(r)>(problem, io);
  });
}

}  // namespace

#define PFGM_TEXT_(name) #name
#define PFGM_TEXT(name) PFGM_TEXT_(name)
extern const Kernels kernels;
const Kernels kernels = {PFGM_TEXT(PFGM_ISA), run_forward, run_backward};

}  // namespace PFGM_ISA
}  // namespace pfgm
