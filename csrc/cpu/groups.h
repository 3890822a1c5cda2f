// Lists of the references that count for a group of queries, arranged for register tiles.
//
// kRows queries form a group with one list, the union of theirs. Queries are sorted by how many
// references count for them, and among kBucket neighbours in this order those with the most similar
// lists form a group. On photographs that leaves a seventh fewer pairs than the order alone.
#pragma once
#include "cpu/weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kBatch = 512;  // references that a weighted sum packs at a time
// References whose sum is computed in T before it is added in float64. A segment lies in one batch.
constexpr Index kSegment = 128;
constexpr Index kMaxSegments = kChunk / kBatch * (kBatch / kSegment);  // in a chunk
constexpr Index kBucket = 24;  // rows among which groups are chosen, a multiple of every kRows
constexpr Index kWords = kChunk / 64;  // of a set of references, one bit each

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
  std::int32_t start[kWords + 1];  // position in `index` of the first from reference 64 i on
  T weights[kChunk][kRows];
};

template <class T, int kRows>
class Groups {
  static_assert(kBucket % kRows == 0 && kBatch % 64 == 0);

 public:
  explicit Groups(Index max_rows)
      : groups_(divide_up(max_rows, kRows)),
        order_(max_rows),
        lengths_(max_rows),
        needs_(max_rows * kWords) {}

  explicit operator bool() const { return groups_ && order_ && lengths_ && needs_; }

  // Notes that row b needs the references j with is_needed(values[j]). Threads may note one row
  // each.
  template <class IsNeeded>
  void note(Index b, const double* values, Index references, const IsNeeded& is_needed) {
    std::uint64_t* needs = needs_of(b);
    lengths_[b] = 0;
    for (Index word = 0; word < divide_up(references, 64); ++word) {
      std::uint8_t bytes[64] = {};
      const Index count = smaller(64, references - word * 64);
      for (Index i = 0; i < count; ++i) bytes[i] = is_needed(values[word * 64 + i]);
      needs[word] = 0;
      for (Index i = 0; i < 64; i += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, bytes + i, sizeof eight);
        if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) eight = __builtin_bswap64(eight);
        needs[word] |= (eight * 0x0102040810204080u >> 56) << i;  // byte k becomes bit k
      }
      lengths_[b] += __builtin_popcountll(needs[word]);
    }
  }

  // Makes groups of the rows that need any reference, from what was noted of each.
  void arrange(Index rows, Index references, int threads) {
    words_ = divide_up(references, 64);
    const Index needing = sort(rows, references);
    count_ = divide_up(needing, kRows);
    std::memset(needed_, 0, words_ * sizeof *needed_);
    parallel(divide_up(needing, kBucket), threads, [&](Index bucket, int) {
      const Index first = bucket * kBucket, last = smaller(first + kBucket, needing);
      for (Index i = first; i < last; i += kRows) {
        choose_group(i, last);
        list(groups_[i / kRows], i, last);
      }
    });
  }

  // weights_of(b) are the weights of row b over the chunk; scale_of(b) > 0 bounds the sum of their
  // magnitudes.
  template <class WeightsOf, class ScaleOf>
  void set_weights(int threads, const WeightsOf& weights_of, const ScaleOf& scale_of) {
    parallel(count_, threads, [&](Index g, int) { set_weights(groups_[g], weights_of, scale_of); });
  }

  Index count() const { return count_; }
  const Group<T, kRows>& operator[](Index g) const { return groups_[g]; }
  // Whether any row needs the reference.
  bool needed(Index j) const { return needed_[j / 64] >> (j % 64) & 1; }

 private:
  // Sorts the rows that need any reference, by counting; the rows that need most come first.
  // Returns their number.
  Index sort(Index rows, Index references) {
    Index starts[kChunk + 1];
    std::memset(starts, 0, (references + 1) * sizeof *starts);
    for (Index b = 0; b < rows; ++b) ++starts[references - lengths_[b]];
    Index at = 0;
    for (Index i = 0; i <= references; ++i) {
      const Index number = starts[i];
      starts[i] = at;
      at += number;
    }
    const Index needing = starts[references];
    for (Index b = 0; b < rows; ++b) order_[starts[references - lengths_[b]]++] = b;
    return needing;
  }

  std::uint64_t* needs_of(Index b) const { return needs_.at(b * kWords); }

  // Reorders order_[first, last) so that it begins with the rows of a group: the first row, then
  // each time the row whose list differs least from the union so far.
  void choose_group(Index first, Index last) {
    std::uint64_t all[kWords];
    std::memcpy(all, needs_of(order_[first]), words_ * sizeof *all);
    for (Index chosen = first + 1; chosen < smaller(first + kRows, last); ++chosen) {
      Index best = chosen, least = kChunk + 1;
      for (Index i = chosen; i < last && least > 0; ++i) {
        const std::uint64_t* needs = needs_of(order_[i]);
        Index differing = 0;
        for (Index word = 0; word < words_; ++word)
          differing += __builtin_popcountll(all[word] ^ needs[word]);
        if (differing < least) best = i, least = differing;
      }
      const Index row = order_[best];
      order_[best] = order_[chosen];
      order_[chosen] = row;
      for (Index word = 0; word < words_; ++word) all[word] |= needs_of(row)[word];
    }
  }

  // The group of the rows from order_[first] on.
  void list(Group<T, kRows>& group, Index first, Index last) {
    group.rows = smaller(kRows, last - first);
    for (Index q = 0; q < group.rows; ++q) group.row[q] = order_[first + q];
    group.length = group.segments = 0;
    for (Index batch = 0; batch < words_; batch += kBatch / 64) {
      const auto begin = static_cast<std::int32_t>(group.length);
      for (Index word = batch; word < smaller(batch + kBatch / 64, words_); ++word) {
        group.start[word] = static_cast<std::int32_t>(group.length);
        std::uint64_t any = 0;
        for (Index q = 0; q < group.rows; ++q) any |= needs_of(group.row[q])[word];
        // Write only once: threads that write to the same cache line slow each other down.
        if (any & ~__atomic_load_n(&needed_[word], __ATOMIC_RELAXED))
          __atomic_fetch_or(&needed_[word], any, __ATOMIC_RELAXED);
        for (; any != 0; any &= any - 1)
          group.index[group.length++] = static_cast<std::int32_t>(word * 64 + __builtin_ctzll(any));
      }
      const auto end = static_cast<std::int32_t>(group.length);
      for (std::int32_t i = begin; i < end; i += kSegment)
        group.segment[group.segments++] = {i,
                                           static_cast<std::int32_t>(smaller(i + kSegment, end))};
    }
    group.start[words_] = static_cast<std::int32_t>(group.length);
  }

  template <class WeightsOf, class ScaleOf>
  static void set_weights(Group<T, kRows>& group, const WeightsOf& weights_of,
                          const ScaleOf& scale_of) {
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
  Buffer<Index> order_, lengths_;  // lengths_: how many references each row needs
  Buffer<std::uint64_t> needs_;    // of each row
  std::uint64_t needed_[kWords];   // of all rows
  Index count_ = 0, words_ = 0;    // of groups; of references of the chunk, 64 each
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
