// A lower bound of every squared distance, computed from bytes. Processors with VNNI multiply bytes
// four times as fast as float32 numbers.
//
// A reference is rounded to ŷ = a + h u with bytes u from 0 to 255, a query to x̂ = b + g q with q
// from −127 to 127. Their distance follows from integers:
//     |x̂ − ŷ|² = |x̂|² + |ŷ|² − 2 (b Σ ŷ + a g Σ q + h g Σ q u).
// All sums over features are exact. The rest is computed in float64. With the lengths of what
// rounding lost, e_x = |x − x̂| and e_y = |y − ŷ|, the triangle inequality gives
//     |x − y| ≥ |x̂ − ŷ| − e_x − e_y.
// The lengths e are rounded up. A value that is not finite makes e_x or e_y NaN, and a pair with
// such a length is never skipped.
//
// References of bytes need no rounding: a = −1, h = 1/127.5 and e_y = 0.
//
// Both kinds of bytes are stored in words of four. Word l of a group of 4 L features, L the lanes
// of a vector, holds the features l, L + l, 2 L + l and 3 L + l of the group. The sketch of the
// references is a sequence of tiles of kByteTile references: their words, packed[word][reference],
// and the terms of each reference.
#pragma once
#include "cpu/line_screen.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

// sum + Σ_i u_i q_i over the four unsigned bytes u and the four signed bytes q of each lane.
// Assembly, because GCC 12 copies the sums between calls of the intrinsic. AVX2's products of
// bytes, maddubs and madd, take three instructions, and q may have 7 bits only. On a Zen 3 that is
// slower than lines (line_screen.h).
inline Ints plus_products(Ints sum, const Ints& u, const Ints& q) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(q));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(q));
#else
  for (int shift = 0; shift < 32; shift += 8)
    sum += ((u >> shift) & 0xff) * ((q << (24 - shift)) >> 24);
#endif
  return sum;
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kByteScreens = true;
#else
constexpr bool kByteScreens = false;
#endif

constexpr Index kByteTile = Simd<float>::tile;  // references in a tile
constexpr Index kWordGroup = 4 * kFloats;       // features in a group of words
// Features summed before the sums are merged in float64. Up to here the sums of squares of bytes
// are exact in float32, 256 · 255² < 2^24 in a lane, and sums of products in int32.
constexpr Index kBytePanel = 64 * kWordGroup;

// What the bound needs of a tile of references besides their bytes.
struct ByteTerms {
  double low[kByteTile], step[kByteTile];    // a, h
  double sum[kByteTile], square[kByteTile];  // Σ ŷ, |ŷ|²
  double lost[kByteTile];                    // at least e_y
  double error[kByteTile];                   // this reference's part in the error of |x̂ − ŷ|²
};

inline Index words_of(Index features) { return round_up(features, kWordGroup) / 4; }
inline Index byte_tile_bytes(Index features) {
  return words_of(features) * kByteTile * 4 + static_cast<Index>(sizeof(ByteTerms));
}

class ByteScreen {
 public:
  // `sketch` is that of all references, or null.
  ByteScreen(const Problem& problem, const void* sketch, Index max_queries, Index max_references)
      : problem_(problem),
        sketch_(static_cast<const char*>(sketch)),
        words_(words_of(problem.features)),
        tile_bytes_(byte_tile_bytes(problem.features)),
        queries_(max_queries * words_),
        query_terms_(max_queries),
        tiles_(sketch ? 0 : divide_up(max_references, kByteTile) * tile_bytes_),
        packing_(packing_threads(problem)),
        rows_(packing_ * kLanes * words_) {}

  explicit operator bool() const { return queries_ && query_terms_ && tiles_ && rows_; }

  // The tiles, and a cache line that holds the number of references.
  static Index sketch_bytes(const Problem& problem) {
    return divide_up(problem.references, kByteTile) * byte_tile_bytes(problem.features) + 64;
  }

  static bool is_sketch_of(const Problem& problem) {
    const Index bytes = sketch_bytes(problem);
    Index references;
    std::memcpy(&references, static_cast<const char*>(problem.sketch) + bytes - 64,
                sizeof references);
    return references == problem.references;
  }

  template <class Queries>
  void set_queries(Index count, const Queries& x) {
    queries_count_ = count;
    parallel(count, problem_.threads,
             [&](Index b, int) { query_terms_[b] = round(x(b), queries_.at(b * words_)); });
  }

  // out(b)[j] = |x̂_b − ŷ_j|² for the references first + j. `first` is a multiple of kByteTile.
  template <class Out>
  void bound(Index first, Index count, const Rows& y, const Out& out) {
    current_ = tiles_.data();
    if (sketch_)
      current_ = sketch_ + first / kByteTile * tile_bytes_;
    else
      sketch(count, y, tiles_.data());
    const Index tiles = divide_up(count, kByteTile),
                groups = divide_up(queries_count_, kTileQueries);
    const Index parts = parts_of(tiles, problem_.threads, groups);
    // A panel of a tile stays in cache for all queries.
    parallel(tiles * parts, problem_.threads, [&](Index task, int) {
      for (Index word = 0; word < words_; word += kBytePanel / 4)
        for (Index group = task % parts; group < groups; group += parts) {
          const Index b = group * kTileQueries;
          bound_rows<kTileQueries>(b, smaller(kTileQueries, queries_count_ - b), task / parts, word,
                                   out);
        }
    });
  }

  // Replaces bounds of query b by 0 where the squared distance may be at most `far`, and by `skip`
  // elsewhere. Returns the number of zeros.
  Index choose(Index b, double far, double skip, double* bounds, Index count) const {
    const QueryTerms& query = query_terms_[b];
    const double distance = std::sqrt(far) + query.lost;
    Longs kept = {};
    for (Index tile = 0; tile * kByteTile < count; ++tile) {
      const ByteTerms& terms = terms_of(tile);
      double* at = bounds + tile * kByteTile;
      for (Index r = 0; r < kByteTile; r += kDoubles) {
        const Doubles limit = distance + vector_at(terms.lost + r);
        const Doubles error = query.error + vector_at(terms.error + r);
        const Longs above = vector_at(at + r) > limit * limit * (1 + 1e-12) + error;
        vector_at(at + r) = above ? Doubles{} + skip : Doubles{};
        kept += above + 1;  // a comparison that holds is −1
      }
    }
    Index number = 0;
    for (Index lane = 0; lane < kDoubles; ++lane) number += kept[lane];
    // Beyond the last reference the terms are 0.
    for (Index j = count; j < round_up(count, kByteTile); ++j) {
      number -= bounds[j] == 0;
      bounds[j] = skip;
    }
    return number;
  }

  // Writes the sketch of all references, y(0), …
  void sketch(const Rows& y, void* out) const {
    const Index references = problem_.references;
    char* tiles = static_cast<char*>(out);
    sketch(references, y, tiles);
    char* end = tiles + sketch_bytes(problem_) - 64;
    std::memset(end, 0, 64);
    std::memcpy(end, &references, sizeof references);
  }

 private:
  // Bound of the error of float64 in |x̂ − ŷ|², relative to N (|a| + 255 h)² and N (|b| + 127 g)²,
  // which bound every term.
  static constexpr double kByteSumError = 1e-14;
  static constexpr Index kLanes = kFloats;
  static constexpr Index kMaxRowBytes = 8 << 20;
  static constexpr double kSmallest = std::numeric_limits<float>::min();

  struct QueryTerms {
    double middle, step;  // b, g
    double sum, square;   // g Σ q, |x̂|²
    double lost;          // at least e_x
    double error;         // this query's part in the error of |x̂ − ŷ|²
  };

  // With very many features fewer threads pack references, which bounds the workspace.
  static int packing_threads(const Problem& problem) {
    const Index bytes = kLanes * words_of(problem.features) * 4;
    return static_cast<int>(larger(1, smaller(problem.threads, kMaxRowBytes / bytes)));
  }

  const ByteTerms& terms_of(Index tile) const {
    return *reinterpret_cast<const ByteTerms*>(current_ + (tile + 1) * tile_bytes_ -
                                               sizeof(ByteTerms));
  }

  // ---- rounding -----------------------------------------------------------------------------

  struct Range {
    float low, high;
  };

  // The smallest and the largest value. The result is undefined if a value is NaN.
  template <class V>
  Range range_of(const V* v) const {
    Floats low = Floats{} + value_of(v[0]), high = low;
    Index k = 0;
    for (; k + kLanes <= problem_.features; k += kLanes) {
      const Floats values = whole_vector(v + k);
      low = values < low ? values : low;
      high = values > high ? values : high;
    }
    Range range = {low[0], high[0]};
    const auto take = [&](float value) {
      if (value < range.low) range.low = value;
      if (value > range.high) range.high = value;
    };
    for (Index lane = 0; lane < kLanes; ++lane) take(low[lane]), take(high[lane]);
    for (; k < problem_.features; ++k) take(value_of(v[k]));
    return range;
  }

  // Sums over the features of a vector: of its integers, of their squares, and of the squares of
  // what rounding lost, in steps.
  struct Sums {
    double sum = 0, square = 0, lost = 0;
  };

  // Rounds (v − origin)/step to the nearest integers from `least` to `most` and writes their bytes
  // in words. Prefetches the next vector, v + stride.
  template <class V>
  Sums round_values(const V* v, Index stride, float origin, float step, float least, float most,
                    std::int32_t* words) const {
    // If the inverse overflows, `lost` becomes NaN or infinite.
    const float inverse = step > 0 ? 1 / step : 0;
    Sums sums;
    for (Index panel = 0; panel < problem_.features; panel += kBytePanel) {
      Floats sum = {}, square = {}, lost = {};
      const Index end = smaller(panel + kBytePanel, problem_.features);
      for (Index k = panel; k < end; k += kWordGroup) {
        prefetch(v + stride + k, kWordGroup);
        Ints word = {};
        for (Index part = 0; part < 4; ++part) {
          // Adding `magic` rounds a small number to an integer, which is then in the low bits.
          constexpr float magic = 0x1.8p23f;
          const Floats values = values_at(v, k + part * kLanes, end, origin);
          const Floats steps = (values - origin) * inverse;
          const Floats above = steps < least ? Floats{} + least : steps;
          const Floats shifted = (above > most ? Floats{} + most : above) + magic;
          const Floats integer = shifted - magic, rest = steps - integer;
          sum += integer;
          square += integer * integer;
          lost += rest * rest;
          word |= (reinterpret_cast<Ints>(shifted) & 0xff) << static_cast<int>(8 * part);
        }
        vector_at(words + k / 4) = word;
      }
      sums.sum += total(sum);
      sums.square += total(square);
      sums.lost += total(lost);
    }
    return sums;
  }

  // One vector of values. Beyond the end it holds `origin`, which rounds to 0 and loses nothing.
  template <class V>
  static Floats values_at(const V* v, Index k, Index end, float origin) {
    if (k + kLanes <= end) return whole_vector(v + k);
    Floats values = Floats{} + origin;
    for (Index i = k; i < end; ++i) values[i - k] = value_of(v[i]);
    return values;
  }

  static Floats whole_vector(const float* v) { return load_unaligned(v); }
  static Floats whole_vector(const std::uint8_t* v) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes bytes;
    std::memcpy(&bytes, v, sizeof bytes);
    return __builtin_convertvector(bytes, Floats);
  }
  template <class V>
  static Floats whole_vector(const V* v) {
    return load_vector<float>(v);
  }

  // A byte stands for itself.
  static float value_of(std::uint8_t v) { return static_cast<float>(v); }
  template <class V>
  static float value_of(V v) {
    return load<float>(v);
  }

  static double total(const Floats& values) {
    double sum = 0;
    for (Index lane = 0; lane < kLanes; ++lane) sum += values[lane];
    return sum;
  }

  // At least the length of what is lost, whose square is `square` by computation. In steps, a value
  // is off by less than 5e-5: v − origin, the inverse and the product are each rounded to 2^-24 of
  // at most 255. A sum of 256 squares is off by less than 2e-5 of itself. `rounded` bounds the
  // rounding of the values themselves, kSmallest what underflow takes from them, from v − origin or
  // from the step.
  double length_of(double square, double step, double rounded) const {
    const double root = std::sqrt(static_cast<double>(problem_.features));
    return step * (std::sqrt(square) * (1 + 2e-5) + 5e-5 * root) + (rounded + kSmallest) * root;
  }

  double error_of(double largest) const {
    return kByteSumError * problem_.features * largest * largest;
  }

  QueryTerms round(const float* x, std::int32_t* words) const {
    const Range range = range_of(x);
    // The middle is rounded, so that one side may be larger than the other.
    const float middle = range.low / 2 + range.high / 2;
    const float below = middle - range.low, above = range.high - middle;
    constexpr float most = 127;
    // Half a step less than fits, so that rounding stays within a byte.
    const float step = (below > above ? below : above) / (most - 0.5f);
    const Sums sums = round_values(x, problem_.x_stride, middle, step, -most, most, words);
    const double b = middle, g = step;
    return {b,
            g,
            g * sums.sum,
            problem_.features * b * b + 2 * b * g * sums.sum + g * g * sums.square,
            length_of(sums.lost, g, 0),
            error_of(std::fabs(b) + 127 * g)};
  }

  // Writes the tiles of the references y(0), …
  void sketch(Index count, const Rows& y, char* out) const {
    parallel(divide_up(count, kLanes), packing_, [&](Index task, int thread) {
      const Index j = task * kLanes;
      sketch_references(smaller(kLanes, count - j), y.from(j), rows_.at(thread * kLanes * words_),
                        j % kByteTile, out + j / kByteTile * tile_bytes_);
      if (j + kLanes >= count) clear(count, out);
    });
  }

  // Writes the words of up to kLanes references, side by side from column `first` of a tile on, and
  // their terms. `rows` has room for their words, row by row.
  void sketch_references(Index count, const Rows& y, std::int32_t* rows, Index first,
                         char* out) const {
    ByteTerms& terms =
        *reinterpret_cast<ByteTerms*>(out + tile_bytes_ - static_cast<Index>(sizeof(ByteTerms)));
    for (Index r = 0; r < count; ++r)
      with_values(y(r), [&](const auto* values) {
        sketch_reference(values, rows + r * words_, first + r, terms);
      });
    std::memset(rows + count * words_, 0, (kLanes - count) * words_ * sizeof(*rows));
    auto* packed = reinterpret_cast<std::int32_t*>(out) + first;
    for (Index word = 0; word < words_; word += kLanes) {
      Floats square[kLanes];
      for (Index r = 0; r < kLanes; ++r)
        square[r] = reinterpret_cast<const Floats&>(vector_at(rows + r * words_ + word));
      transpose<float>(square);
      for (Index lane = 0; lane < kLanes; ++lane)
        vector_at(packed + (word + lane) * kByteTile) = reinterpret_cast<Ints>(square[lane]);
    }
  }

  template <class R>
  void sketch_reference(const R* y, std::int32_t* words, Index r, ByteTerms& terms) const {
    float low = 0, step = 1;
    double a = -1, h = 1 / 127.5, rounded = 0;
    if constexpr (!std::is_same_v<R, std::uint8_t>) {
      const Range range = range_of(y);
      a = low = range.low;
      h = step = (range.high - range.low) / 254.5f;  // half a step less, as in round()
      if (sizeof(R) > sizeof(float))                 // float64 is rounded to float32 first
        rounded = 6e-8 * (std::fabs(a) + 255 * h);
    }
    const Sums sums = round_values(y, problem_.y_stride, low, step, 0, 255, words);
    terms.low[r] = a;
    terms.step[r] = h;
    terms.sum[r] = problem_.features * a + h * sums.sum;
    terms.square[r] = problem_.features * a * a + 2 * a * h * sums.sum + h * h * sums.square;
    terms.lost[r] = std::is_same_v<R, std::uint8_t> ? 0 : length_of(sums.lost, h, rounded);
    terms.error[r] = error_of(std::fabs(a) + 255 * h);
  }

  // Zeroes what lies beyond the last reference.
  void clear(Index count, char* out) const {
    const Index filled = round_up(count, kLanes) % kByteTile;
    char* last = out + (count - 1) / kByteTile * tile_bytes_;
    auto* packed = reinterpret_cast<std::int32_t*>(last);
    for (Index r = filled; filled > 0 && r < kByteTile; r += kLanes)
      for (Index word = 0; word < words_; ++word) vector_at(packed + word * kByteTile + r) = Ints{};
    auto& terms = *reinterpret_cast<ByteTerms*>(last + tile_bytes_ - sizeof(ByteTerms));
    for (Index r = (count - 1) % kByteTile + 1; r < kByteTile; ++r)
      terms.low[r] = terms.step[r] = terms.sum[r] = terms.square[r] = terms.lost[r] =
          terms.error[r] = 0;
  }

  // ---- products -----------------------------------------------------------------------------

  // Adds the panel of words from `word` on to the squared distances of up to kRows queries.
  template <int kRows, class Out>
  void bound_rows(Index b, Index rows, Index tile, Index word, const Out& out) const {
    if constexpr (kRows > 1)
      if (rows < kRows) return bound_rows<kRows - 1>(b, rows, tile, word, out);
    const auto* packed = reinterpret_cast<const std::int32_t*>(current_ + tile * tile_bytes_);
    const ByteTerms& terms = terms_of(tile);
    const Index n = smaller(kBytePanel / 4, words_ - word);
    const std::int32_t* x[kRows];
    for (int q = 0; q < kRows; ++q) x[q] = queries_.at((b + q) * words_ + word);
    Ints products[kRows][kTileVectors];
    sum_products<kRows>(x, packed + word * kByteTile, n, products);
    for (int q = 0; q < kRows; ++q)
      add_panel(query_terms_[b + q], terms, products[q], word == 0, word + n == words_,
                out(b + q) + tile * kByteTile);
  }

  template <int kRows>
  static void sum_products(const std::int32_t* const* x, const std::int32_t* packed, Index words,
                           Ints (&sum)[kRows][kTileVectors]) {
    set_zero(sum);
    for (Index word = 0; word < words; ++word) {
      Ints reference[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v)
        reference[v] = vector_at(packed + word * kByteTile + v * kLanes);
      for (int q = 0; q < kRows; ++q) {
        const Ints query = Ints{} + x[q][word];
        for (int v = 0; v < kTileVectors; ++v)
          sum[q][v] = plus_products(sum[q][v], reference[v], query);
      }
    }
  }

  // Adds the panel's products to a row of squared distances, and with the last panel the other
  // terms.
  static void add_panel(const QueryTerms& query, const ByteTerms& terms,
                        const Ints (&products)[kTileVectors], bool is_first, bool is_last,
                        double* out) {
    for (Index r = 0; r < kByteTile; r += kDoubles) {
      const Doubles dots = half_of(products[r / kLanes], r % kLanes);
      Doubles value = is_first ? Doubles{} : vector_at(out + r);
      value -= (2 * query.step) * (vector_at(terms.step + r) * dots);
      if (is_last)
        value +=
            query.square + vector_at(terms.square + r) -
            2.0 * (query.middle * vector_at(terms.sum + r) + query.sum * vector_at(terms.low + r));
      vector_at(out + r) = value;
    }
  }

  typedef std::int32_t HalfInts __attribute__((vector_size(kVectorBytes / 2), may_alias));
  static Doubles half_of(const Ints& values, Index first) {
    HalfInts half;
    std::memcpy(&half, reinterpret_cast<const char*>(&values) + first * sizeof(std::int32_t),
                sizeof half);
    return __builtin_convertvector(half, Doubles);
  }

  const Problem& problem_;
  const char* const sketch_;
  const Index words_, tile_bytes_;
  Buffer<std::int32_t> queries_;
  Buffer<QueryTerms> query_terms_;
  Buffer<char> tiles_;
  const int packing_;              // threads that pack references
  Buffer<std::int32_t> rows_;      // of each thread, the words of kLanes references
  const char* current_ = nullptr;  // the tiles of the chunk
  Index queries_count_ = 0;
};

// The screen for points in float32. It uses bytes, unless there is a sketch of uint8 references. In
// bytes that sketch would double their memory, so it holds lines, a quarter to a third of it. Bytes
// rule out more references, but for a block of queries that gains less than packing them takes.
class FloatScreen {
 public:
  FloatScreen(const Problem& problem, Index max_queries, Index max_references)
      : by_lines_(problem.sketch && has_lines(problem)),
        lines_(problem, by_lines_ ? max_queries : 0, by_lines_ ? max_references : 0),
        bytes_(problem, by_lines_ ? nullptr : problem.sketch, by_lines_ ? 0 : max_queries,
               by_lines_ ? 0 : max_references) {}

  explicit operator bool() const { return lines_ && bytes_; }

  static Index sketch_bytes(const Problem& problem) {
    return has_lines(problem) ? LineScreen<float>::sketch_bytes(problem)
                              : ByteScreen::sketch_bytes(problem);
  }
  static bool is_sketch_of(const Problem& problem) {
    return has_lines(problem) || ByteScreen::is_sketch_of(problem);
  }
  void sketch(const Rows& y, void* out) const {
    y.type == Type::uint8 ? lines_.sketch(y, out) : bytes_.sketch(y, out);
  }

  template <class Queries>
  void set_queries(Index count, const Queries& x) {
    by_lines_ ? lines_.set_queries(count, x) : bytes_.set_queries(count, x);
  }
  template <class Out>
  void bound(Index first, Index count, const Rows& y, const Out& out) {
    by_lines_ ? lines_.bound(first, count, y, out) : bytes_.bound(first, count, y, out);
  }
  Index choose(Index b, double far, double skip, double* bounds, Index count) const {
    return by_lines_ ? lines_.choose(b, far, skip, bounds, count)
                     : bytes_.choose(b, far, skip, bounds, count);
  }

 private:
  // Whether the sketch is one of lines.
  static bool has_lines(const Problem& problem) { return problem.reference_type == Type::uint8; }

  const bool by_lines_;
  LineScreen<float> lines_;
  ByteScreen bytes_;
};

// The screen for points in T.
template <class T>
using Screen =
    std::conditional_t<kByteScreens && std::is_same_v<T, float>, FloatScreen, LineScreen<T>>;

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
