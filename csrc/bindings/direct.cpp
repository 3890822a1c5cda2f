// posterior_mean, field_fn and a step of the ODE, each from its arguments to its result in one
// call. pfgm/backends/native_direct.py calls them with positional arguments, which cost least.
// Tensors are contiguous. A call returns false where an argument is not allowed; its outputs are
// then undefined, and the caller takes the way through the operators, which says what is wrong.
#include "bindings/direct.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "bindings/interruptible.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// Whether the environment names another backend.
bool other_backend() {
  const char* name = std::getenv("PFGM_BACKEND");
  return name != nullptr && *name != '\0' && std::strcmp(name, "native") != 0;
}

std::size_t bytes_of(Type type) { return type == Type::float64 ? sizeof(double) : sizeof(float); }

// A level for every row: a number, or values in float32 or float64.
class Level {
 public:
  // From a number, or from (address, type, distance between rows).
  explicit Level(const py::handle& given) {
    if (PyFloat_Check(given.ptr())) {
      number_ = PyFloat_AS_DOUBLE(given.ptr());
      return;
    }
    const auto values = py::reinterpret_borrow<py::tuple>(given);
    values_ = pointer<const char>(values[0].cast<Address>());
    type_ = static_cast<Type>(values[1].cast<int>());
    stride_ = values[2].cast<Index>();
  }

  bool is_number() const { return values_ == nullptr; }

  double operator()(Index row) const {
    if (values_ == nullptr) return number_;
    const char* at = values_ + row * stride_ * static_cast<Index>(bytes_of(type_));
    if (type_ == Type::float64) return read<double>(at);
    return read<float>(at);
  }

 private:
  template <class T>
  static double read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  double number_ = 0;
  const char* values_ = nullptr;
  Type type_ = Type::float64;
  Index stride_ = 0;
};

// ---- the posterior mean and the field -------------------------------------------------------

struct Sizes {
  Type type, reference_type;
  Index queries, references, features;
};

// Level times `factor`, as the radius of every query.
std::vector<double> radii(const Level& level, double factor, Index queries) {
  std::vector<double> radius(queries);
  for (Index b = 0; b < queries; ++b) radius[b] = level(b) * factor;
  return radius;
}

Status run_posterior_mean(const Sizes& sizes, Address x, Address y, Address sketch,
                          const std::vector<double>& radius, double dimensions, int threads,
                          const Forward& out) {
  const Problem problem = {sizes.type,
                           sizes.reference_type,
                           sizes.queries,
                           sizes.references,
                           sizes.features,
                           pointer<const void>(x),
                           sizes.features,
                           pointer<const void>(y),
                           sizes.features,
                           radius.data(),
                           dimensions,
                           threads,
                           pointer<const void>(sketch)};
  const Kernels& kernels = cpu_kernels();
  return run_interruptible(sizes.queries, problem,
                           [&] { return kernels.posterior_mean(problem, out); });
}

bool direct_posterior_mean(int type, int reference_type, Index queries, Index references,
                           Index features, Address x, Address y, Address sketch,
                           const py::handle& level, double factor, double dimensions, Address mean,
                           Address logsumexp, int threads) {
  if (other_backend()) return false;
  const Sizes sizes = {static_cast<Type>(type), static_cast<Type>(reference_type), queries,
                       references, features};
  const std::vector<double> radius = radii(Level(level), factor, queries);
  const Forward out = {pointer<void>(mean), pointer<double>(logsumexp), nullptr, nullptr};
  const Status status = run_posterior_mean(sizes, x, y, sketch, radius, dimensions, threads, out);
  return status.failure == Failure::none;
}

bool direct_field(int type, int reference_type, Index queries, Index references, Index features,
                  Address x, Address y, Address sketch, const py::handle& z, double gamma,
                  Address field_x, Address field_z, int threads) {
  if (other_backend()) return false;
  const Sizes sizes = {static_cast<Type>(type), static_cast<Type>(reference_type), queries,
                       references, features};
  const std::vector<double> radius = radii(Level(z), 1, queries);
  const Forward mean = {pointer<void>(field_x), nullptr, nullptr, nullptr};
  const Status status = run_posterior_mean(sizes, x, y, sketch, radius, 1, threads, mean);
  if (status.failure != Failure::none) return false;
  const py::gil_scoped_release released;
  normalised_field({sizes.type, queries, features, pointer<const void>(x), features, radius.data(),
                    pointer<const void>(field_x), features, gamma, pointer<void>(field_x), features,
                    pointer<void>(field_z), threads});
  return true;
}

// ---- a step of the ODE ----------------------------------------------------------------------

enum class Method : int { euler = 0, heun = 1, multistep = 2 };

struct StepLevels {
  double z, toward, blend;
};

// z, toward and blend of a step (api/ode_step.h) from its levels, as in pfgm/functional/steps.py.
// Returns whether the levels are allowed.
bool step_levels(Method method, double z, double z_next, double z_previous, StepLevels* out) {
  const auto positive = [](double level) { return level > 0 && std::isfinite(level); };
  if (!positive(z) || !(positive(z_next) || (method == Method::euler && z_next == 0))) return false;
  if (method == Method::euler) {
    *out = {z, (z - z_next) / z, 0};
  } else if (method == Method::heun) {
    *out = {z_next, (z - z_next) / (2 * z_next), 0.5};
  } else {
    if (!positive(z_previous) || z_previous == z) return false;
    const double w = std::log(z / z_next) / (2 * std::log(z_previous / z));
    const double length = (z - z_next) / z;
    *out = {z, length * (1 + w), -length * w};
  }
  return true;
}

// Whether a tensor that is written may share memory with one that is read: only all of it.
bool separate_or_same(Address out, Address in, std::size_t bytes) {
  return out == in || out + bytes <= in || in + bytes <= out;
}

bool direct_step(int method, int type, Index rows, Index features, Address x, Address slope,
                 Address field_z, Address history, const py::handle& z, const py::handle& z_next,
                 const py::handle& z_previous, double gamma, double z_exp, bool exact, Address next,
                 Address mean, int threads) {
  if (other_backend()) return false;
  const Type kind = static_cast<Type>(type);
  const Level at(z), to(z_next), from(z_previous);
  const bool shared = at.is_number() && to.is_number() && from.is_number();
  const Index count = shared ? 1 : rows;
  std::vector<double> levels(3 * count);
  for (Index b = 0; b < count; ++b) {
    StepLevels found;
    if (!step_levels(static_cast<Method>(method), at(b), to(b), from(b), &found)) return false;
    levels[b] = found.z;
    levels[count + b] = found.toward;
    levels[2 * count + b] = found.blend;
  }
  if (!(gamma >= 0 && std::isfinite(gamma) && z_exp >= 0 && std::isfinite(z_exp))) return false;
  const std::size_t bytes = rows * features * bytes_of(kind);
  for (const Address out : {next, mean}) {
    if (out == 0) continue;
    for (const Address in : {x, slope, history})
      if (in != 0 && !separate_or_same(out, in, bytes)) return false;
    const std::size_t of_z = rows * bytes_of(kind);
    if (field_z != 0 && !(out + bytes <= field_z || field_z + of_z <= out)) return false;
  }
  if (mean != 0 && !(next + bytes <= mean || mean + bytes <= next)) return false;
  const py::gil_scoped_release released;
  ode_step({kind,
            rows,
            features,
            pointer<const void>(x),
            features,
            pointer<const void>(slope),
            features,
            pointer<const void>(field_z),
            pointer<const void>(history),
            features,
            levels.data(),
            shared ? 0 : 1,
            gamma,
            z_exp,
            exact,
            pointer<void>(next),
            features,
            pointer<void>(mean),
            features,
            threads});
  return true;
}

// ---- finite values --------------------------------------------------------------------------

// Whether x − x is 0 for all values: it is NaN for NaN and for infinity.
template <class T>
bool all_finite(const T* values, Index count) {
  constexpr Index kLanes = 16;
  T off[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (Index lane = 0; lane < kLanes; ++lane) off[lane] += values[i + lane] - values[i + lane];
  for (; i < count; ++i) off[0] += values[i] - values[i];
  for (Index lane = 1; lane < kLanes; ++lane) off[0] += off[lane];
  return off[0] == 0;
}

bool direct_all_finite(int type, Address values, Index count) {
  return static_cast<Type>(type) == Type::float64 ? all_finite(pointer<const double>(values), count)
                                                  : all_finite(pointer<const float>(values), count);
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("direct_posterior_mean", &direct_posterior_mean);
  module.def("direct_field", &direct_field);
  module.def("direct_step", &direct_step);
  module.def("direct_all_finite", &direct_all_finite);
}

}  // namespace pfgm
