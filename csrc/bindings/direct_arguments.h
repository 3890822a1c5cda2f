// Arguments of the direct calls (direct.cpp, direct_cuda.cpp), and which of them are allowed.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "api/levels.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"
#include "bindings/interruptible.h"

namespace pfgm {

// Whether the environment names another backend.
inline bool other_backend() {
  const char* name = std::getenv("PFGM_BACKEND");
  return name != nullptr && *name != '\0' && std::strcmp(name, "native") != 0;
}

inline std::size_t bytes_of(Type type) {
  return type == Type::float64 ? sizeof(double) : sizeof(float);
}

// From a number, or from (address, type, distance between rows).
inline Level level_from(const py::handle& given) {
  if (PyFloat_Check(given.ptr())) return {PyFloat_AS_DOUBLE(given.ptr()), nullptr, Type(), 0};
  const auto values = py::reinterpret_borrow<py::tuple>(given);
  return {0, pointer<const void>(values[0].cast<Address>()),
          static_cast<Type>(values[1].cast<int>()), values[2].cast<std::int64_t>()};
}

// A level in host memory, which need not be aligned.
inline double level_of(const Level& level, std::int64_t row) {
  if (level.values == nullptr) return level.number;
  const auto read = [&](auto value) {
    const auto at = row * level.stride * static_cast<std::int64_t>(sizeof value);
    std::memcpy(&value, static_cast<const char*>(level.values) + at, sizeof value);
    return static_cast<double>(value);
  };
  return level.type == Type::float64 ? read(double()) : read(float());
}

// The levels of a step. A method with two levels has a third that it does not use.
struct GivenLevels {
  Method method;
  Level z, z_next, z_previous;

  bool are_numbers() const {
    return z.values == nullptr && z_next.values == nullptr && z_previous.values == nullptr;
  }

  // What the step computes from the levels of a row in host memory, if they are allowed: positive
  // and within the range of the points' type.
  bool find(std::int64_t row, Type type, StepLevels* out) const {
    const double most = type == Type::float64
                            ? std::numeric_limits<double>::max()
                            : static_cast<double>(std::numeric_limits<float>::max());
    const auto positive = [&](double level) { return level > 0 && level <= most; };
    const double at = level_of(z, row), to = level_of(z_next, row),
                 from = level_of(z_previous, row);
    if (!positive(at) || !(positive(to) || (method == Method::euler && to == 0))) return false;
    if (method == Method::multistep && (!positive(from) || from == at)) return false;
    *out = step_levels(method, at, to, from);
    return true;
  }
};

struct StepLaw {
  double gamma, z_exp;
  bool exact;

  bool allowed() const {
    return gamma >= 0 && std::isfinite(gamma) && z_exp >= 0 && std::isfinite(z_exp);
  }
};

// The tensors of a step, (rows, features) but for field_z; 0 for one that there is not.
struct StepTensors {
  Type type;
  std::int64_t rows, features;
  Address x, slope, field_z, history, next, mean;

  // Whether each output is one of the inputs or separate from it, and separate from the other.
  bool outputs_allowed() const {
    const std::size_t of_z = rows * bytes_of(type), bytes = features * of_z;
    for (const Address out : {next, mean}) {
      if (out == 0) continue;
      for (const Address in : {x, slope, history})
        if (in != 0 && in != out && !apart(out, bytes, in, bytes)) return false;
      if (field_z != 0 && !apart(out, bytes, field_z, of_z)) return false;
    }
    return mean == 0 || apart(next, bytes, mean, bytes);
  }

  OdeStep step(const double* levels, std::int64_t level_stride, const StepLaw& law,
               int threads) const {
    return {type,
            rows,
            features,
            pointer<const void>(x),
            features,
            pointer<const void>(slope),
            features,
            pointer<const void>(field_z),
            pointer<const void>(history),
            features,
            levels,
            level_stride,
            law.gamma,
            law.z_exp,
            law.exact,
            pointer<void>(next),
            features,
            pointer<void>(mean),
            features,
            threads};
  }

 private:
  static bool apart(Address a, std::size_t bytes_of_a, Address b, std::size_t bytes_of_b) {
    return a + bytes_of_a <= b || b + bytes_of_b <= a;
  }
};

}  // namespace pfgm
