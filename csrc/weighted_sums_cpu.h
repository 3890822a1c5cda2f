// Sums over the references of a chunk, weighted per query, that touch only what counts.
//
// Rows with about as many live references as one another are taken kGroup at a time over the union
// of their lists, in register tiles of kGroup rows by kTileVectors vectors of features; references
// are packed, so that a tile stays in cache for all groups. Sums of T are merged in float64 every
// kSegment references.
#pragma once
#include "distances_cpu.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kBatch = 512;    // references packed at a time
constexpr Index kSegment = 256;  // references summed in T
constexpr Index kSegments = kChunk / kBatch * (kBatch / kSegment);  // at most, in a chunk
template <class T> constexpr Index kSumPanel = 256 / sizeof(T);     // features packed at a time

// The live references of a group of rows: index[i] counts from the chunk's first; weights[i] holds
// one weight a row. A segment's weights are relative to `scale`, the sum of their magnitudes:
// coefficients of the backward pass may lie outside the range of float32, and a sum of many large
// references would overflow.
template <class T, int kGroup>
struct Group {
  struct Segment {
    std::int32_t begin, end;  // in index
    double scale[kGroup];
  };
  Index rows, segments, length;
  Index row[kGroup];
  Segment segment[kSegments];
  std::int32_t index[kChunk];
  T weights[kChunk][kGroup];
};

// All groups of a block. `weights(b)` is row b's weights over the chunk, zero where a reference does
// not count; `arrange` finds what is live, `weigh` takes the weights.
template <class T, int kGroup>
class Groups {
 public:
  explicit Groups(Index max_rows)
      : groups_(divide_up(max_rows, kGroup)), order_(max_rows), live_(kChunk) {}

  explicit operator bool() const { return groups_ && order_ && live_; }

  template <class Weights>
  void arrange(const Row* rows, Index row_count, Index references, const Weights& weights,
               int threads) {
    const Index alive = sort(rows, row_count);
    count_ = divide_up(alive, kGroup);
    std::memset(live_.data(), 0, kChunk);
    parallel(count_, threads, [&](Index g, int) {
      Group<T, kGroup>& group = groups_[g];
      group.rows = smaller(kGroup, alive - g * kGroup);
      for (Index q = 0; q < group.rows; ++q) group.row[q] = order_[g * kGroup + q];
      list(group, references, weights);
    });
  }

  template <class Weights>
  void weigh(const Weights& weights, int threads) {
    parallel(count_, threads, [&](Index g, int) {
      for (Index s = 0; s < groups_[g].segments; ++s)
        weigh(groups_[g], groups_[g].segment[s], weights);
    });
  }

  Index count() const { return count_; }
  const Group<T, kGroup>& operator[](Index g) const { return groups_[g]; }
  bool live(Index j) const { return live_[j]; }

 private:
  // Rows with any live reference, those with most first; how many there are.
  Index sort(const Row* rows, Index row_count) {
    Index starts[kChunk + 1] = {};
    for (Index b = 0; b < row_count; ++b) ++starts[kChunk - rows[b].live];
    Index at = 0;
    for (Index& start : starts) {
      const Index number = start;
      start = at;
      at += number;
    }
    const Index alive = starts[kChunk];
    for (Index b = 0; b < row_count; ++b) order_[starts[kChunk - rows[b].live]++] = b;
    return alive;
  }

  template <class Weights>
  void list(Group<T, kGroup>& group, Index references, const Weights& weights) {
    std::uint8_t any[kChunk] = {};
    for (Index q = 0; q < group.rows; ++q) {
      const double* w = weights(group.row[q]);
      for (Index j = 0; j < references; ++j) any[j] |= w[j] != 0;
    }
    Index length = 0;
    group.segments = 0;
    using Position = std::int32_t;
    for (Index batch = 0; batch < references; batch += kBatch) {
      Index begin = length;
      for (Index j = batch; j < smaller(batch + kBatch, references); ++j)
        if (any[j]) {
          __atomic_store_n(&live_[j], 1, __ATOMIC_RELAXED);
          group.index[length++] = static_cast<Position>(j);
        }
      for (; begin < length; begin += kSegment)
        group.segment[group.segments++] = {
            static_cast<Position>(begin), static_cast<Position>(smaller(begin + kSegment, length)), {}};
    }
    group.length = length;
  }

  template <class Weights>
  static void weigh(Group<T, kGroup>& group, typename Group<T, kGroup>::Segment& segment,
                    const Weights& weights) {
    for (Index q = 0; q < kGroup; ++q) {
      if (q >= group.rows) {
        for (Index i = segment.begin; i < segment.end; ++i) group.weights[i][q] = 0;
        continue;
      }
      const double* w = weights(group.row[q]);
      double sum = 0;
      for (Index i = segment.begin; i < segment.end; ++i) sum += std::fabs(w[group.index[i]]);
      const double scale = sum == 0 ? 1 : sum;
      for (Index i = segment.begin; i < segment.end; ++i)
        group.weights[i][q] = static_cast<T>(w[group.index[i]] / scale);
      segment.scale[q] = scale;
    }
  }

  Buffer<Group<T, kGroup>> groups_;
  Buffer<Index> order_;
  Buffer<std::uint8_t> live_;
  Index count_ = 0;
};

// sum[q][k] = Σ_i w_iq (y_i[k] − origin[q][k]) over one segment and one tile of features.
template <class T, int kGroup, bool kOrigin>
void sum_tile(const Group<T, kGroup>& group, Index begin, Index end, const T* packed,
              const T* origin, T* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes;
  Vector sum[kGroup][kTileVectors] = {}, from[kOrigin ? kGroup : 1][kTileVectors];
  if constexpr (kOrigin)
    for (int q = 0; q < kGroup; ++q)
      for (int v = 0; v < kTileVectors; ++v) from[q][v] = vector_at(origin + q * kSumPanel<T> + v * lanes);
  for (Index i = begin; i < end; ++i) {
    const T* y = packed + group.index[i] % kBatch * kSumPanel<T>;
    Vector reference[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) reference[v] = vector_at(y + v * lanes);
    for (int q = 0; q < kGroup; ++q)
      for (int v = 0; v < kTileVectors; ++v) {
        if constexpr (kOrigin)
          sum[q][v] += group.weights[i][q] * (reference[v] - from[q][v]);
        else
          sum[q][v] += group.weights[i][q] * reference[v];
      }
  }
  for (int q = 0; q < kGroup; ++q)
    for (int v = 0; v < kTileVectors; ++v) vector_at(out + q * kSumPanel<T> + v * lanes) = sum[q][v];
}

// state[b, :] += Σ_j weights[b, j] (y_j − origin[b, :]) over the chunk; without kOrigin, origin is 0.
template <class T, class R, int kGroup, bool kOrigin>
class WeightedSums {
 public:
  WeightedSums(const Problem& problem)
      : problem_(problem), packed_(problem.threads * kBatch * kSumPanel<T>) {}

  explicit operator bool() const { return static_cast<bool>(packed_); }

  void add(const Distances<T, R>& distances, const Groups<T, kGroup>& groups, const T* origin,
           double* state) {
    const Index panels = divide_up(problem_.features, kSumPanel<T>);
    const Index parts = parts_of(panels, problem_.threads, groups.count());
    parallel(panels * parts, problem_.threads, [&](Index task, int thread) {
      const Index k = task / parts * kSumPanel<T>;
      const Index n = smaller(kSumPanel<T>, problem_.features - k);
      T* packed = packed_.at(thread * kBatch * kSumPanel<T>);
      for (Index batch = 0; batch < distances.count(); batch += kBatch) {
        pack(distances, groups, batch, k, n, packed);
        for (Index g = task % parts; g < groups.count(); g += parts)
          add_group(groups[g], batch, k, n, packed, origin, state);
      }
    });
  }

 private:
  void pack(const Distances<T, R>& distances, const Groups<T, kGroup>& groups, Index batch, Index k,
            Index n, T* packed) const {
    for (Index j = batch; j < smaller(batch + kBatch, distances.count()); ++j) {
      if (!groups.live(j)) continue;
      const R* y = distances.reference(j) + k;
      T* out = packed + (j - batch) * kSumPanel<T>;
      if (n == kSumPanel<T>) {
        for (Index i = 0; i < kSumPanel<T>; ++i) out[i] = load<T>(y[i]);
        continue;
      }
      for (Index i = 0; i < n; ++i) out[i] = load<T>(y[i]);
      for (Index i = n; i < kSumPanel<T>; ++i) out[i] = 0;
    }
  }

  void add_group(const Group<T, kGroup>& group, Index batch, Index k, Index n, const T* packed,
                 const T* origin, double* state) const {
    alignas(64) T from[kGroup][kSumPanel<T>] = {}, sum[kGroup][kSumPanel<T>];
    for (Index s = 0; s < group.segments; ++s) {
      const auto& segment = group.segment[s];
      if (group.index[segment.begin] / kBatch * kBatch != batch) continue;
      if (kOrigin)
        for (Index q = 0; q < group.rows; ++q)
          std::memcpy(from[q], origin + group.row[q] * problem_.features + k, n * sizeof(T));
      for (Index t = 0; t < n; t += Simd<T>::tile)
        sum_tile<T, kGroup, kOrigin>(group, segment.begin, segment.end, packed + t, from[0] + t,
                                     sum[0] + t);
      for (Index q = 0; q < group.rows; ++q) {
        double* out = state + group.row[q] * problem_.features + k;
        const double scale = segment.scale[q];
        for (Index i = 0; i < n; ++i) out[i] += scale * sum[q][i];
      }
    }
  }

  const Problem& problem_;
  Buffer<T> packed_;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
