// t[b, j] = G_b · (y_j − mean_b) for the pairs that count: the first half of the backward pass.
#pragma once
#include "weighted_sums_cpu.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kDotReferences = 32;              // packed at a time
template <class T> constexpr Index kDotPanel = 6144 / sizeof(T);  // of so many features
constexpr int kDotRows = 3;
constexpr int kDotColumns = kVectorBytes == 16 ? 2 : 4;  // registers are few without AVX2

template <class T>
double total(typename Simd<T>::Vector sum) {
  double result = 0;
  for (Index lane = 0; lane < Simd<T>::lanes; ++lane) result += sum[lane];
  return result;
}

// out[q][c] += g_q · (y_c − m_q) over n features; the y are padded with zeros to whole vectors.
template <class T>
void dot_tile(const T* const* g, const T* const* m, const T* const* y, Index n,
              double (*out)[kDotColumns]) {
  using Vector = typename Simd<T>::Vector;
  typedef Vector Unaligned __attribute__((aligned(sizeof(T))));
  constexpr Index lanes = Simd<T>::lanes;
  Vector sum[kDotRows][kDotColumns] = {};
  Index k = 0;
  for (; k + lanes <= n; k += lanes) {
    Vector reference[kDotColumns];
    for (int c = 0; c < kDotColumns; ++c) reference[c] = vector_at(y[c] + k);
    for (int q = 0; q < kDotRows; ++q) {
      const Vector upstream = *reinterpret_cast<const Unaligned*>(g[q] + k);
      const Vector mean = *reinterpret_cast<const Unaligned*>(m[q] + k);
      for (int c = 0; c < kDotColumns; ++c) sum[q][c] += upstream * (reference[c] - mean);
    }
  }
  for (int q = 0; q < kDotRows; ++q)
    for (int c = 0; c < kDotColumns; ++c) {
      out[q][c] += total<T>(sum[q][c]);
      for (Index i = k; i < n; ++i) out[q][c] += g[q][i] * (y[c][i] - m[q][i]);
    }
}

template <class T, class R>
class Projections {
 public:
  explicit Projections(const Problem& problem)
      : problem_(problem), packed_(problem.threads * kDotReferences * kDotPanel<T>) {}

  explicit operator bool() const { return static_cast<bool>(packed_); }

  // t(b) is the row of b, zero before; grad and mean are the first rows of the block.
  template <class Rows>
  void add(const Distances<T, R>& distances, const Groups<T, kDotRows>& groups, const T* grad,
           const T* mean, const Rows& t) {
    const Index tiles = divide_up(distances.count(), kDotReferences);
    const Index parts = parts_of(tiles, problem_.threads, groups.count());
    parallel(tiles * parts, problem_.threads, [&](Index task, int thread) {
      const Index begin = task / parts * kDotReferences;
      const Index end = smaller(begin + kDotReferences, distances.count());
      T* packed = packed_.at(thread * kDotReferences * kDotPanel<T>);
      for (Index k = 0; k < problem_.features; k += kDotPanel<T>) {
        const Index n = smaller(kDotPanel<T>, problem_.features - k);
        for (Index j = begin; j < end; ++j)
          if (groups.live(j))
            pack(distances.reference(j) + k, n, packed + (j - begin) * kDotPanel<T>);
        for (Index g = task % parts; g < groups.count(); g += parts)
          add_group(groups[g], begin, end, k, n, packed, grad, mean, t);
      }
    });
  }

 private:
  static void pack(const R* y, Index n, T* out) {
    for (Index i = 0; i < n; ++i) out[i] = load<T>(y[i]);
    for (Index i = n; i < round_up(n, Simd<T>::lanes); ++i) out[i] = 0;
  }

  template <class Rows>
  void add_group(const Group<T, kDotRows>& group, Index begin, Index end, Index k, Index n,
                 const T* packed, const T* grad, const T* mean, const Rows& t) const {
    const T *g[kDotRows], *m[kDotRows], *y[kDotColumns];
    for (Index q = 0; q < kDotRows; ++q) {
      const Index row = group.row[smaller(q, group.rows - 1)];
      g[q] = grad + row * problem_.features + k;
      m[q] = mean + row * problem_.features + k;
    }
    const Index last = lower_bound(group, end);
    for (Index i = lower_bound(group, begin); i < last; i += kDotColumns) {
      const Index columns = smaller(kDotColumns, last - i);
      for (Index c = 0; c < kDotColumns; ++c)
        y[c] = packed + (group.index[i + smaller(c, columns - 1)] - begin) * kDotPanel<T>;
      double out[kDotRows][kDotColumns] = {};
      dot_tile<T>(g, m, y, n, out);
      for (Index q = 0; q < group.rows; ++q)
        for (Index c = 0; c < columns; ++c) t(group.row[q])[group.index[i + c]] += out[q][c];
    }
  }

  // The first of the group's references from the j-th of the chunk on.
  static Index lower_bound(const Group<T, kDotRows>& group, Index j) {
    Index low = 0, high = group.length;
    while (low < high) {
      const Index middle = (low + high) / 2;
      if (group.index[middle] < j)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  const Problem& problem_;
  Buffer<T> packed_;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
