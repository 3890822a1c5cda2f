// PFGM's normalised field and its gradients on the CPU, compiled once per instruction set
// (PFGM_ISA). They compute in float64, because |E|² may overflow or underflow float32.
#include "api/normalised_field.h"

#include "cpu/simd.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kMinTaskValues = 1 << 14;  // fewer values are not worth a thread
constexpr Index kSums = 4 * kDoubles;      // partial sums of a row, enough to hide latency

template <class T>
const T* row_of(const void* values, Index row, Index stride) {
  return static_cast<const T*>(values) + row * stride;
}

// Σ_k term(k) over n features, in an order that depends on n alone.
template <class Term>
double sum_features(Index n, const Term& term) {
  double sum[kSums] = {};
  Index k = 0;
  for (; k + kSums <= n; k += kSums)
    for (Index lane = 0; lane < kSums; ++lane) sum[lane] += term(k + lane);
  for (; k < n; ++k) sum[0] += term(k);
  double total = 0;
  for (Index lane = 0; lane < kSums; ++lane) total += sum[lane];
  return total;
}

// |E| of a row, and the factor s in v = s E.
struct Norm {
  double size, scale;
};

template <class T>
Norm norm_of(const NormalisedField& field, Index row) {
  const T* d = row_of<T>(field.difference, row, field.stride);
  const double squared = sum_features(field.features, [&](Index k) {
    const double value = static_cast<double>(d[k]);
    return value * value;
  });
  const double size = std::hypot(std::sqrt(squared), field.z[row]);  // z² may underflow
  const double norm = size + field.gamma;
  // The norm is 0 at E = 0 and γ = 0. There any finite scale gives v = 0.
  return {size, -std::sqrt(static_cast<double>(field.features)) / (norm == 0 ? 1 : norm)};
}

template <class T>
void write_row(const NormalisedField& field, Index row) {
  const double scale = norm_of<T>(field, row).scale;
  const T* d = row_of<T>(field.difference, row, field.stride);
  T* out = static_cast<T*>(field.field_x) + row * field.field_x_stride;
  // out may be d. Local values let the compiler vectorise nevertheless.
  Index k = 0;
  for (; k + kSums <= field.features; k += kSums) {
    T values[kSums];
    for (Index lane = 0; lane < kSums; ++lane)
      values[lane] = static_cast<T>(scale * static_cast<double>(d[k + lane]));
    std::memcpy(out + k, values, sizeof values);
  }
  for (; k < field.features; ++k) out[k] = static_cast<T>(scale * static_cast<double>(d[k]));
  static_cast<T*>(field.field_z)[row] = static_cast<T>(scale * field.z[row]);
}

// With upstream gradients (G, g), d = x − mean and n = |E|, from ds/dn = s²/√N:
//     k = (G·d + g z) s²/(√N n), 0 at E = 0
//     ∂L/∂d = s G + k d,   ∂L/∂z = s g + k z
// At E = 0 the norm has no gradient. With γ = 0 the field has none there either, and 0 is taken.
template <class T>
void write_gradients(const NormalisedField& field, const NormalisedFieldBackward& io, Index row) {
  const Norm norm = norm_of<T>(field, row);
  const bool at_zero = norm.size == 0;
  const double scale = at_zero && field.gamma == 0 ? 0 : norm.scale;
  const T* d = row_of<T>(field.difference, row, field.stride);
  const T* upstream = row_of<T>(io.grad_field_x, row, io.grad_field_x_stride);
  const double z = field.z[row];
  const double g = static_cast<double>(static_cast<const T*>(io.grad_field_z)[row]);
  const double along = g * z + sum_features(field.features, [&](Index k) {
                         return static_cast<double>(upstream[k]) * static_cast<double>(d[k]);
                       });
  // In this order nothing overflows that is multiplied by a small number afterwards.
  const double factor =
      at_zero ? 0 : along / norm.size * scale / std::sqrt(static_cast<double>(field.features));
  T* out = static_cast<T*>(io.grad_difference) + row * field.features;
  for (Index k = 0; k < field.features; ++k)
    out[k] = static_cast<T>(scale * static_cast<double>(upstream[k]) +
                            factor * (scale * static_cast<double>(d[k])));
  io.grad_z[row] = scale * g + factor * (scale * z);
}

// Calls body(row) for every row, each thread over ranges of rows.
template <class F>
void for_rows(const NormalisedField& field, const F& body) {
  const Index group =
      larger(divide_up(field.rows, field.threads), larger(1, kMinTaskValues / field.features));
  parallel(divide_up(field.rows, group), field.threads, [&](Index task, int) {
    const Index end = smaller((task + 1) * group, field.rows);
    for (Index row = task * group; row < end; ++row) body(row);
  });
}

}  // namespace

void normalised_field(const NormalisedField& field) {
  for_rows(field, [&](Index row) {
    field.type == Type::float64 ? write_row<double>(field, row) : write_row<float>(field, row);
  });
}

void normalised_field_backward(const NormalisedField& field, const NormalisedFieldBackward& io) {
  for_rows(field, [&](Index row) {
    field.type == Type::float64 ? write_gradients<double>(field, io, row)
                                : write_gradients<float>(field, io, row);
  });
}

}  // namespace PFGM_ISA
}  // namespace pfgm
