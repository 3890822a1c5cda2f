// A lower bound of every squared distance, computed from a sixteenth as many values.
//
// Features are split into lines. A line x_l of L features has the mean m(x_l) and the deviation
// ρ(x_l) = |x_l − m(x_l)|. The part of x_l − y_l along (1, …, 1) has the square L (m(x_l) −
// m(y_l))². The part across it is the difference of two vectors of lengths ρ(x_l) and ρ(y_l), whose
// square is at least (ρ(x_l) − ρ(y_l))². So with s = √L m
//     |x − y|² ≥ Σ_l (s(x_l) − s(y_l))² + (ρ(x_l) − ρ(y_l))².
// The bound is tight on images, where neighbours are alike: s holds nearly all of the difference
// between two images, ρ most of the noise.
//
// Rounding: s and ρ have an error of at most 40 epsilon |x_l| (32 additions, and the mean in ρ).
// The vectors of all s and ρ are off by at most kSketchError |x| and kSketchError |y|, and their
// distance by the sum of the two. A square that underflows takes up to kLostDeviation from a ρ.
//
// The sketch of a vector is all its s and ρ, in a row of whole cache lines, and its length |v|.
// Sketches of references are computed in each call, or once for all calls. In the second case
// screening pays for any number of queries.
#pragma once
#include "cpu/tiles.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kScreenedQueries = 48;  // with fewer queries sketches cost more than they save
constexpr Index kTaskReferences = 16;   // references in a task
constexpr Index kDenseQueries = 32;     // with fewer queries packing tiles costs more than it saves
constexpr Index kLine = 32;             // features in a line; the last line may be shorter
constexpr double kLineRoot = 5.656854249492381;  // √kLine

inline Index sketch_lines(Index features) { return divide_up(features, kLine); }
inline Index sketch_stride(Index features) { return round_up(2 * sketch_lines(features), 16); }

template <class T> constexpr double kSketchError = 64 * std::numeric_limits<T>::epsilon();
// The square root of the smallest number, rounded up.
template <class T> constexpr double kLostDeviation =
    sizeof(T) == sizeof(float) ? 1.1e-19 : 1.5e-154;
// Bound of the relative error of sums of squares, if they do not underflow: a lane adds at most 196
// values, kPairPanel<float> over four lanes.
template <class T> constexpr double kSumError = sizeof(T) == sizeof(float) ? 2e-5 : 1e-13;

template <class T>
class LineScreen {
 public:
  LineScreen(const Problem& problem, Index max_queries, Index max_references)
      : problem_(problem),
        lines_(sketch_lines(problem.features)),
        stride_(sketch_stride(problem.features)),
        tiles_(max_queries > 0 ? problem.threads : 0),
        queries_(max_queries * stride_),
        query_lengths_(max_queries),
        references_(problem.sketch ? 0 : max_references * stride_),
        reference_lengths_(problem.sketch ? 0 : max_references) {}

  explicit operator bool() const {
    return tiles_ && queries_ && query_lengths_ && references_ && reference_lengths_;
  }

  template <class Queries>
  void set_queries(Index count, const Queries& x) {
    queries_count_ = count;
    parallel(count, problem_.threads,
             [&](Index b, int) { query_lengths_[b] = sketch(x(b), queries_.at(b * stride_)); });
  }

  // out(b)[j] = the lower bound for reference first + j, without the allowance for rounding.
  template <class Out>
  void bound(Index first, Index count, const Rows& y, const Out& out) {
    const T *rows = references_.data(), *lengths = reference_lengths_.data();
    if (problem_.sketch) {
      const T* kept = static_cast<const T*>(problem_.sketch);
      rows = kept + first * stride_;
      lengths = kept + problem_.references * stride_ + first;
    } else {
      sketch(count, y, references_.data(), reference_lengths_.data());
    }
    // A NaN is passed over: its own bound is NaN, which rules nothing out.
    longest_ = 0;
    for (Index j = 0; j < count; ++j)
      if (lengths[j] > longest_) longest_ = static_cast<double>(lengths[j]);
    if (queries_count_ < kDenseQueries) return bound_few(count, rows, out);
    const auto x = [&](Index b) { return queries_.at(b * stride_); };
    tiles_.template sum<Distance>(queries_count_, count, 2 * lines_, x, x,
                                  Rows{rows, stride_, problem_.type}, out);
  }

  static Index sketch_bytes(const Problem& problem) {
    return problem.references * (sketch_stride(problem.features) + 1) *
           static_cast<Index>(sizeof(T));
  }

  static bool is_sketch_of(const Problem&) { return true; }  // its size says so

  // Writes the sketch of all references, y(0), …
  void sketch(const Rows& y, void* out) const {
    T* rows = static_cast<T*>(out);
    sketch(problem_.references, y, rows, rows + problem_.references * stride_);
  }

  // Writes rows and lengths of the sketch of the vectors y(0), …
  void sketch(Index count, const Rows& y, T* rows, T* lengths) const {
    parallel(divide_up(count, kTaskReferences), problem_.threads, [&](Index task, int) {
      for (Index j = task * kTaskReferences; j < smaller((task + 1) * kTaskReferences, count); ++j)
        lengths[j] = sketch(y(j), rows + j * stride_);
    });
  }

  // Replaces bounds of query b by 0 where the squared distance may be at most `far`, and by `skip`
  // elsewhere. Returns the number of zeros.
  Index choose(Index b, double far, double skip, double* bounds, Index count) const {
    const double underflow = std::sqrt(static_cast<double>(kLine * lines_)) * kLostDeviation<T>;
    const double lost =
        kSketchError<T> * (static_cast<double>(query_lengths_[b]) + longest_) + 2 * underflow;
    const double distance = std::sqrt(far) + lost;
    const double limit = distance * distance / (1 - kSumError<T>);
    Index kept = 0;
    for (Index j = 0; j < count; ++j) {
      const bool needed = !(bounds[j] > limit);
      kept += needed;
      bounds[j] = needed ? 0 : skip;
    }
    return kept;
  }

 private:
  // As bound(), without packing.
  template <class Out>
  void bound_few(Index count, const T* rows, const Out& out) {
    parallel(divide_up(count, kTaskReferences), problem_.threads, [&](Index task, int) {
      const Index last = smaller((task + 1) * kTaskReferences, count) - 1;
      for (Index j = task * kTaskReferences; j <= last; j += kPairColumns)
        for (Index b = 0; b < queries_count_; b += kTileQueries) {
          const T *x[kTileQueries], *y[kPairColumns];
          double sums[kTileQueries][kPairColumns];
          for (Index k = 0; k < stride_; k += kPairPanel<T>) {
            for (Index q = 0; q < kTileQueries; ++q)
              x[q] = queries_.at(smaller(b + q, queries_count_ - 1) * stride_) + k;
            for (Index c = 0; c < kPairColumns; ++c)
              y[c] = rows + smaller(j + c, last) * stride_ + k;
            distance_pairs<T>(x, y, 0, smaller(kPairPanel<T>, stride_ - k), sums);
            for (Index q = 0; q < smaller(kTileQueries, queries_count_ - b); ++q)
              for (Index c = 0; c <= smaller(kPairColumns - 1, last - j); ++c)
                out(b + q)[j + c] = (k == 0 ? 0 : out(b + q)[j + c]) + sums[q][c];
          }
        }
    });
  }

  // Writes one row, padded with zeros. Returns |v|, which is not finite if v or its square is not.
  T sketch(const Row& vector, T* out) const {
    return with_values(vector, [&](const auto* v) { return sketch_values(v, out); });
  }
  template <class V>
  T sketch_values(const V* v, T* out) const {
    constexpr Index lanes = Simd<T>::lanes;
    const Index whole = problem_.features / kLine / lanes * lanes;
    typename Simd<T>::Vector sums = {};
    for (Index line = 0; line < whole; line += lanes)
      sums += reduce_lines(v + line * kLine, out + line, out + lines_ + line);
    double squares;
    sum_lanes<T, 1>(&sums, &squares);
    for (Index line = whole; line < lines_; ++line) {
      const Index n = smaller(kLine, problem_.features - line * kLine);
      squares += reduce_line(v + line * kLine, n, out + line, out + lines_ + line);
    }
    for (Index k = 2 * lines_; k < stride_; ++k) out[k] = 0;
    return static_cast<T>(std::sqrt(squares));
  }

  // Reduces one line per lane. Returns the squared norms of the lines.
  template <class V>
  static typename Simd<T>::Vector reduce_lines(const V* v, T* s, T* deviation) {
    using Vector = typename Simd<T>::Vector;
    constexpr Index lanes = Simd<T>::lanes;
    Vector features[kLine], sum = {}, square = {};
    for (Index part = 0; part < kLine; part += lanes) {
      for (Index line = 0; line < lanes; ++line)
        features[part + line] = load_vector<T>(v + line * kLine + part);
      transpose<T>(features + part);
    }
    for (const Vector& feature : features) sum += feature;
    for (const Vector& feature : features)
      square += (feature - sum / T(kLine)) * (feature - sum / T(kLine));
    for (Index lane = 0; lane < lanes; ++lane) {
      s[lane] = sum[lane] / T(kLineRoot);
      deviation[lane] = std::sqrt(square[lane]);
    }
    return sum * (sum / T(kLine)) + square;
  }

  // Reduces one line of n features. Returns its squared norm.
  template <class V>
  static double reduce_line(const V* v, Index n, T* s, T* deviation) {
    T sum = 0, square = 0;
    for (Index i = 0; i < n; ++i) sum += load<T>(v[i]);
    const T mean = sum / static_cast<T>(n);
    for (Index i = 0; i < n; ++i) square += (load<T>(v[i]) - mean) * (load<T>(v[i]) - mean);
    *s = sum / std::sqrt(static_cast<T>(n));
    *deviation = std::sqrt(square);
    return static_cast<double>(sum) * mean + square;
  }

  const Problem& problem_;
  const Index lines_, stride_;
  DenseTiles<T> tiles_;
  Buffer<T> queries_, query_lengths_, references_, reference_lengths_;
  Index queries_count_ = 0;
  double longest_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
