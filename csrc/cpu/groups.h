// Lists of the references that count for a group of queries, arranged for register tiles.
//
// Queries are sorted by how many references count for them. Every kRows queries form a group with
// one list, the union of theirs.
#pragma once
#include "cpu/weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kBatch = 512;  // references that a weighted sum packs at a time
// References whose sum is computed in T before it is added in float64. A segment lies in one batch.
constexpr Index kSegment = 128;
constexpr Index kMaxSegments = kChunk / kBatch * (kBatch / kSegment);  // in a chunk

// Whether a reference with this weight counts.
constexpr auto counts = [](double weight) { return weight != 0; };

// The references that count for a group of rows. index[i] counts from the first of the chunk.
// weights[i] holds one weight per row, divided by the `scale` of the row, a bound of Σ |weight|.
// Unscaled weights of the backward pass may exceed float32, and a sum over many large references
// would overflow.
template <class T, int kRows>
struct Group {
  struct Segment {
    std::int32_t begin, end;  // range of `index`
  };
  Index rows, segments, length;
  Index row[kRows];
  double scale[kRows];
  Segment segment[kMaxSegments];
  std::int32_t index[kChunk];
  T weights[kChunk][kRows];

  // Position in `index` of the first listed reference from the j-th of the chunk on.
  Index lower_bound(Index j) const {
    Index low = 0, high = length;
    while (low < high) {
      const Index middle = (low + high) / 2;
      if (index[middle] < j)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

template <class T, int kRows>
class Groups {
 public:
  explicit Groups(Index max_rows)
      : groups_(divide_up(max_rows, kRows)), order_(max_rows), live_(kChunk) {}

  explicit operator bool() const { return groups_ && order_ && live_; }

  // is_live(row_of(b)[j]) says whether row b needs reference j, count_of(b) how many it needs.
  template <class CountOf, class RowOf, class IsLive>
  void arrange(Index rows, Index references, int threads, const CountOf& count_of,
               const RowOf& row_of, const IsLive& is_live) {
    const Index alive = sort(rows, count_of);
    count_ = divide_up(alive, kRows);
    std::memset(live_.data(), 0, kChunk);
    parallel(count_, threads, [&](Index g, int) {
      Group<T, kRows>& group = groups_[g];
      group.rows = smaller(kRows, alive - g * kRows);
      for (Index q = 0; q < group.rows; ++q) group.row[q] = order_[g * kRows + q];
      list(group, references, row_of, is_live);
    });
  }

  // weights_of(b) are the weights of row b over the chunk; scale_of(b) > 0 bounds the sum of their
  // magnitudes.
  template <class WeightsOf, class ScaleOf>
  void weigh(int threads, const WeightsOf& weights_of, const ScaleOf& scale_of) {
    parallel(count_, threads, [&](Index g, int) { weigh(groups_[g], weights_of, scale_of); });
  }

  Index count() const { return count_; }
  const Group<T, kRows>& operator[](Index g) const { return groups_[g]; }
  bool live(Index j) const { return live_[j]; }

 private:
  // Sorts the rows that need any reference; the rows that need most come first. Returns their
  // number.
  template <class CountOf>
  Index sort(Index rows, const CountOf& count_of) {
    Index starts[kChunk + 1] = {};
    for (Index b = 0; b < rows; ++b) ++starts[kChunk - count_of(b)];
    Index at = 0;
    for (Index& start : starts) {
      const Index number = start;
      start = at;
      at += number;
    }
    const Index alive = starts[kChunk];
    for (Index b = 0; b < rows; ++b) order_[starts[kChunk - count_of(b)]++] = b;
    return alive;
  }

  template <class RowOf, class IsLive>
  void list(Group<T, kRows>& group, Index references, const RowOf& row_of, const IsLive& is_live) {
    using Position = std::int32_t;
    std::uint8_t any[kChunk] = {};
    for (Index q = 0; q < group.rows; ++q) {
      const double* values = row_of(group.row[q]);
      for (Index j = 0; j < references; ++j) any[j] |= is_live(values[j]);
    }
    group.length = group.segments = 0;
    for (Index batch = 0; batch < references; batch += kBatch) {
      Index begin = group.length;
      for (Index j = batch; j < smaller(batch + kBatch, references); ++j)
        if (any[j]) {
          // Write only once: threads that write to the same cache line slow each other down.
          if (!__atomic_load_n(live_.at(j), __ATOMIC_RELAXED))
            __atomic_store_n(live_.at(j), 1, __ATOMIC_RELAXED);
          group.index[group.length++] = static_cast<Position>(j);
        }
      for (; begin < group.length; begin += kSegment)
        group.segment[group.segments++] = {
            static_cast<Position>(begin),
            static_cast<Position>(smaller(begin + kSegment, group.length))};
    }
  }

  template <class WeightsOf, class ScaleOf>
  static void weigh(Group<T, kRows>& group, const WeightsOf& weights_of, const ScaleOf& scale_of) {
    for (Index q = 0; q < kRows; ++q) {
      if (q >= group.rows) {
        for (Index i = 0; i < group.length; ++i) group.weights[i][q] = 0;
        continue;
      }
      const double* w = weights_of(group.row[q]);
      group.scale[q] = scale_of(group.row[q]);
      const double inverse = 1 / group.scale[q];
      for (Index i = 0; i < group.length; ++i)
        group.weights[i][q] = static_cast<T>(w[group.index[i]] * inverse);
    }
  }

  Buffer<Group<T, kRows>> groups_;
  Buffer<Index> order_;
  Buffer<std::uint8_t> live_;
  Index count_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
