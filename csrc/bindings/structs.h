// The structs of csrc/api from addresses and sizes.
#pragma once
#include <cstdint>
#include <utility>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"
#include "bindings/interruptible.h"

namespace pfgm {

inline Problem problem(int type, int reference_type, std::int64_t queries, std::int64_t references,
                       std::int64_t features, Address x, std::int64_t x_stride, Address y,
                       std::int64_t y_stride, Address radius, double dimensions, int threads,
                       Address sketch, std::int64_t all_references, bool difference) {
  return {static_cast<Type>(type),
          static_cast<Type>(reference_type),
          queries,
          references,
          features,
          pointer<const void>(x),
          x_stride,
          pointer<const void>(y),
          y_stride,
          pointer<const double>(radius),
          dimensions,
          threads,
          pointer<const void>(sketch),
          all_references,
          difference};
}

// Address of a tensor and the distance between its rows.
using StridedRows = std::pair<Address, std::int64_t>;

inline OdeStep step(int type, std::int64_t rows, std::int64_t features, StridedRows x,
                    StridedRows slope, Address field_z, StridedRows history, Address levels,
                    std::int64_t level_stride, double gamma, double z_exp, bool exact,
                    StridedRows next, StridedRows mean, int threads) {
  return {static_cast<Type>(type),
          rows,
          features,
          pointer<const void>(x.first),
          x.second,
          pointer<const void>(slope.first),
          slope.second,
          pointer<const void>(field_z),
          pointer<const void>(history.first),
          history.second,
          pointer<const double>(levels),
          level_stride,
          gamma,
          z_exp,
          exact,
          pointer<void>(next.first),
          next.second,
          pointer<void>(mean.first),
          mean.second,
          threads};
}

inline NormalisedField field(int type, std::int64_t rows, std::int64_t features,
                             StridedRows difference, Address z, double gamma, StridedRows field_x,
                             Address field_z, int threads) {
  return {static_cast<Type>(type),
          rows,
          features,
          pointer<const void>(difference.first),
          difference.second,
          pointer<const double>(z),
          gamma,
          pointer<void>(field_x.first),
          field_x.second,
          pointer<void>(field_z),
          threads};
}

}  // namespace pfgm
