// Which pairs of queries and references count, arranged for register tiles.
//
// Rows with about as many live references as one another are taken kRows at a time over the union of
// their lists.
#pragma once
#include "cpu/weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kBatch = 512;    // references that a weighted sum packs at a time
constexpr Index kSegment = 128;  // references that it sums in T, all of one batch
constexpr Index kSegments = kChunk / kBatch * (kBatch / kSegment);  // at most, in a chunk

// The live references of a group of rows: index[i] counts from the chunk's first; weights[i] holds
// one weight a row, relative to its `scale`, which bounds the sum of their magnitudes: those of the
// backward pass may lie outside the range of float32, and a sum of many large references would
// overflow.
template <class T, int kRows>
struct Group {
  struct Segment {
    std::int32_t begin, end;  // in index
  };
  Index rows, segments, length;
  Index row[kRows];
  double scale[kRows];
  Segment segment[kSegments];
  std::int32_t index[kChunk];
  T weights[kChunk][kRows];

  // The first of its references from the j-th of the chunk on.
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

  // row(b)[j] says by is_live whether row b needs reference j; counts(b) is how many it needs.
  template <class Counts, class Rows, class IsLive>
  void arrange(Index rows, Index references, int threads, const Counts& counts, const Rows& row,
               const IsLive& is_live) {
    const Index alive = sort(rows, counts);
    count_ = divide_up(alive, kRows);
    std::memset(live_.data(), 0, kChunk);
    parallel(count_, threads, [&](Index g, int) {
      Group<T, kRows>& group = groups_[g];
      group.rows = smaller(kRows, alive - g * kRows);
      for (Index q = 0; q < group.rows; ++q) group.row[q] = order_[g * kRows + q];
      list(group, references, row, is_live);
    });
  }

  // weights(b) is row b's weights over the chunk, scale(b) > 0 a bound of the sum of their magnitudes.
  template <class Weights, class Scale>
  void weigh(int threads, const Weights& weights, const Scale& scale) {
    parallel(count_, threads, [&](Index g, int) { weigh(groups_[g], weights, scale); });
  }

  Index count() const { return count_; }
  const Group<T, kRows>& operator[](Index g) const { return groups_[g]; }
  bool live(Index j) const { return live_[j]; }

 private:
  // Rows with any live reference, those with most first; how many there are.
  template <class Counts>
  Index sort(Index rows, const Counts& counts) {
    Index starts[kChunk + 1] = {};
    for (Index b = 0; b < rows; ++b) ++starts[kChunk - counts(b)];
    Index at = 0;
    for (Index& start : starts) {
      const Index number = start;
      start = at;
      at += number;
    }
    const Index alive = starts[kChunk];
    for (Index b = 0; b < rows; ++b) order_[starts[kChunk - counts(b)]++] = b;
    return alive;
  }

  template <class Rows, class IsLive>
  void list(Group<T, kRows>& group, Index references, const Rows& row, const IsLive& is_live) {
    using Position = std::int32_t;
    std::uint8_t any[kChunk] = {};
    for (Index q = 0; q < group.rows; ++q) {
      const double* values = row(group.row[q]);
      for (Index j = 0; j < references; ++j) any[j] |= is_live(values[j]);
    }
    group.length = group.segments = 0;
    for (Index batch = 0; batch < references; batch += kBatch) {
      Index begin = group.length;
      for (Index j = batch; j < smaller(batch + kBatch, references); ++j)
        if (any[j]) {
          // Written once only: threads that write to a cache line take it from one another.
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

  template <class Weights, class Scale>
  static void weigh(Group<T, kRows>& group, const Weights& weights, const Scale& scale) {
    for (Index q = 0; q < kRows; ++q) {
      if (q >= group.rows) {
        for (Index i = 0; i < group.length; ++i) group.weights[i][q] = 0;
        continue;
      }
      const double* w = weights(group.row[q]);
      group.scale[q] = scale(group.row[q]);
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
