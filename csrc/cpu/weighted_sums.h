// Weighted sums over the references of a chunk that count.
//
// A register tile holds the sums of a group's rows by kTileVectors vectors of features. References
// are packed, so that a tile stays in cache for all groups. Sums in T are merged in float64 every
// kSegment references.
#pragma once
#include "cpu/distances.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

template <class T> constexpr Index kSumPanel = 512 / sizeof(T);  // features packed at a time
constexpr Index kPrefetchReferences = 4;  // how far ahead references are prefetched

// sum[q][k] = Σ_i w_iq (y_i[k] − origin[q][k]) over one segment and one tile of features.
template <class T, int kRows, bool kOrigin>
void sum_tile(const Group<T, kRows>& group, Index begin, Index end, const T* packed,
              const T* origin, T* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr Index lanes = Simd<T>::lanes;
  Vector sum[kRows][kTileVectors], from[kOrigin ? kRows : 1][kTileVectors];
  set_zero(sum);
  if constexpr (kOrigin)
    for (int q = 0; q < kRows; ++q)
      for (int v = 0; v < kTileVectors; ++v)
        from[q][v] = vector_at(origin + q * kSumPanel<T> + v * lanes);
  for (Index i = begin; i < end; ++i) {
    const T* y = packed + group.index[i] % kBatch * kSumPanel<T>;
    Vector reference[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) reference[v] = vector_at(y + v * lanes);
    for (int q = 0; q < kRows; ++q)
      for (int v = 0; v < kTileVectors; ++v) {
        if constexpr (kOrigin)
          sum[q][v] += group.weights[i][q] * (reference[v] - from[q][v]);
        else
          sum[q][v] += group.weights[i][q] * reference[v];
      }
  }
  for (int q = 0; q < kRows; ++q)
    for (int v = 0; v < kTileVectors; ++v)
      vector_at(out + q * kSumPanel<T> + v * lanes) = sum[q][v];
}

// Adds Σ_j weights[b, j] (y_j − origin[b, :]) over the chunk to sums[b, :]. Without kOrigin,
// origin is 0.
template <class T, int kRows, bool kOrigin>
class WeightedSums {
 public:
  WeightedSums(const Problem& problem)
      : problem_(problem), packed_(problem.threads * kBatch * kSumPanel<T>) {}

  explicit operator bool() const { return static_cast<bool>(packed_); }

  void add(const Distances<T>& distances, const Groups<T, kRows>& groups, const T* origin,
           double* sums) {
    const Index panels = divide_up(problem_.features, kSumPanel<T>);
    const Index parts = parts_of(panels, problem_.threads, groups.count());
    parallel(panels * parts, problem_.threads, [&](Index task, int thread) {
      const Index k = task / parts * kSumPanel<T>;
      const Index n = smaller(kSumPanel<T>, problem_.features - k);
      T* packed = packed_.at(thread * kBatch * kSumPanel<T>);
      for (Index batch = 0; batch < distances.count(); batch += kBatch) {
        pack(distances, groups, batch, k, n, packed);
        for (Index g = task % parts; g < groups.count(); g += parts)
          add_group(groups[g], batch, k, n, packed, origin, sums);
      }
    });
  }

 private:
  void pack(const Distances<T>& distances, const Groups<T, kRows>& groups, Index batch, Index k,
            Index n, T* packed) const {
    const Index end = smaller(batch + kBatch, distances.count());
    for (Index j = batch; j < end; ++j) {
      if (const Index next = j + kPrefetchReferences; next < end && groups.needed(next))
        prefetch(distances.reference(next) + k, n);
      if (!groups.needed(j)) continue;
      T* out = packed + (j - batch) * kSumPanel<T>;
      with_values(distances.reference(j) + k, [&](const auto* y) {
        if (n == kSumPanel<T>) {
          for (Index i = 0; i < kSumPanel<T>; ++i) out[i] = load<T>(y[i]);
          return;
        }
        for (Index i = 0; i < n; ++i) out[i] = load<T>(y[i]);
        for (Index i = n; i < kSumPanel<T>; ++i) out[i] = 0;
      });
    }
  }

  void add_group(const Group<T, kRows>& group, Index batch, Index k, Index n, const T* packed,
                 const T* origin, double* sums) const {
    alignas(64) T from[kRows][kSumPanel<T>] = {}, sum[kRows][kSumPanel<T>];
    for (Index s = 0; s < group.segments; ++s) {
      const auto& segment = group.segment[s];
      if (group.index[segment.begin] / kBatch * kBatch != batch) continue;
      if (kOrigin)
        for (Index q = 0; q < group.rows; ++q)
          std::memcpy(from[q], origin + group.row[q] * problem_.features + k, n * sizeof(T));
      for (Index t = 0; t < n; t += Simd<T>::tile)
        sum_tile<T, kRows, kOrigin>(group, segment.begin, segment.end, packed + t, from[0] + t,
                                    sum[0] + t);
      for (Index q = 0; q < group.rows; ++q) {
        double* out = sums + group.row[q] * problem_.features + k;
        const double scale = group.scale[q];
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
