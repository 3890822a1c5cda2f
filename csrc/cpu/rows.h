// Rows of values whose type is known at run time.
//
// Kernels are compiled for each type T of the queries, in which they compute, but not for each type
// of references: a function that reads a reference chooses the type before its loop over features.
#pragma once
#include "cpu/simd.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kTypeBytes[] = {4, 8, 2, 2, 1};  // of each Type
inline Index bytes_of(Type type) { return kTypeBytes[static_cast<int>(type)]; }

// The features of a query or a reference.
struct Row {
  Row(const void* values, Type type_of_values) : at(values), type(type_of_values) {}
  Row(const float* values) : Row(values, Type::float32) {}
  Row(const double* values) : Row(values, Type::float64) {}

  // The row from feature k on.
  Row operator+(Index k) const { return {static_cast<const char*>(at) + k * bytes_of(type), type}; }

  const void* at;
  Type type;
};

// Rows of one type, `stride` values apart.
struct Rows {
  Row operator()(Index j) const { return Row(first, type) + j * stride; }
  Rows from(Index j) const { return {(*this)(j).at, stride, type}; }

  const void* first;
  Index stride;
  Type type;
};

inline Rows references_of(const Problem& problem) {
  return {problem.y, problem.y_stride, problem.reference_type};
}

// Calls f with a pointer to the values.
template <class F>
auto with_values(const Row& row, const F& f) {
  switch (row.type) {
    case Type::float32:
      return f(static_cast<const float*>(row.at));
    case Type::float64:
      return f(static_cast<const double*>(row.at));
    case Type::bfloat16:
      return f(static_cast<const BFloat16*>(row.at));
    case Type::float16:
      return f(static_cast<const Float16*>(row.at));
    case Type::uint8:
      return f(static_cast<const std::uint8_t*>(row.at));
  }
  std::abort();
}

inline void prefetch(const Row& row, Index count) {
  prefetch(static_cast<const char*>(row.at), count * bytes_of(row.type));
}

// Whether T represents every reference exactly. If not, distances have an error relative to |y|
// too.
template <class T>
bool holds_exactly(const Problem& problem) {
  return problem.reference_type != Type::uint8 &&
         bytes_of(problem.reference_type) <= static_cast<Index>(sizeof(T));
}

// Whether references may be too large for T.
template <class T>
bool may_exceed(const Problem& problem) {
  return bytes_of(problem.reference_type) > static_cast<Index>(sizeof(T));
}

// Whether squares of differences may underflow float64. Those of values of at most 32 bits cannot.
template <class T>
bool may_underflow(const Problem& problem) {
  return sizeof(T) == sizeof(double) || problem.reference_type == Type::float64;
}

// Whether a query and a reference are equal.
template <class T>
bool coincide(const T* x, const Row& y, Index features) {
  return with_values(y, [&](const auto* values) {
    for (Index k = 0; k < features; ++k)
      if (static_cast<double>(x[k]) != load<double>(values[k])) return false;
    return true;
  });
}

// Σ term(k) in float64, in lanes that fill vectors.
template <class F>
double sum_over(Index features, const F& term) {
  constexpr Index lanes = 4 * kDoubles;
  double total = 0;
  Index k = 0;
  if (features >= lanes) {
    double sum[lanes] = {};
    for (; k + lanes <= features; k += lanes)
      for (Index lane = 0; lane < lanes; ++lane) sum[lane] += term(k + lane);
    for (Index lane = 0; lane < lanes; ++lane) total += sum[lane];
  }
  for (; k < features; ++k) total += term(k);
  return total;
}

// |x − y|² in float64.
template <class T>
double exact_distance(const T* x, const Row& y, Index features) {
  return with_values(y, [&](const auto* values) {
    return sum_over(features, [&](Index k) {
      const double difference = static_cast<double>(x[k]) - load<double>(values[k]);
      return difference * difference;
    });
  });
}

// g · (y − mean) in float64.
template <class T>
double project(const T* g, const T* mean, const Row& y, Index features) {
  return with_values(y, [&](const auto* values) {
    return sum_over(features, [&](Index k) {
      const double difference = load<double>(values[k]) - static_cast<double>(mean[k]);
      return static_cast<double>(g[k]) * difference;
    });
  });
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
