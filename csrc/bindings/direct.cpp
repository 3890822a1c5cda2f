// posterior_mean, field_fn and a step of the ODE, each from its arguments to its result in one
// call. pfgm/backends/native_direct.py calls them with positional arguments, which cost least.
// Tensors are contiguous. A call returns false where an argument is not allowed; its outputs are
// then undefined, and the caller takes the way through the operators, which says what is wrong.
#include "bindings/direct.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "bindings/direct_arguments.h"
#include "bindings/interruptible.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// ---- the posterior mean and the field -------------------------------------------------------

struct Sizes {
  Type type, reference_type;
  Index queries, references, features;
};

// Level times `factor`, as the radius of every query.
std::vector<double> radii(const Level& level, double factor, Index queries) {
  std::vector<double> radius(queries);
  for (Index b = 0; b < queries; ++b) radius[b] = level_of(level, b) * factor;
  return radius;
}

Status run_posterior_mean(const Sizes& sizes, Address x, Address y, Address sketch,
                          const std::vector<double>& radius, double dimensions, bool difference,
                          int threads, const Forward& out) {
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
                           pointer<const void>(sketch),
                           0,
                           Precision::high,
                           difference};
  const Kernels& kernels = cpu_kernels();
  return run_interruptible(sizes.queries, problem,
                           [&] { return kernels.posterior_mean(problem, out); });
}

bool direct_posterior_mean(int type, int reference_type, Index queries, Index references,
                           Index features, Address x, Address y, const py::handle& level,
                           double factor, double dimensions, Address mean, Address logsumexp,
                           Address sketch, int threads) {
  if (other_backend()) return false;
  const Sizes sizes = {static_cast<Type>(type), static_cast<Type>(reference_type), queries,
                       references, features};
  const std::vector<double> radius = radii(level_from(level), factor, queries);
  const Forward out = {pointer<void>(mean), pointer<double>(logsumexp), nullptr, nullptr};
  const Status status =
      run_posterior_mean(sizes, x, y, sketch, radius, dimensions, false, threads, out);
  return status.failure == Failure::none;
}

bool direct_field(int type, int reference_type, Index queries, Index references, Index features,
                  Address x, Address y, const py::handle& z, double gamma, Address field_x,
                  Address field_z, Address sketch, int threads) {
  if (other_backend()) return false;
  const Sizes sizes = {static_cast<Type>(type), static_cast<Type>(reference_type), queries,
                       references, features};
  const std::vector<double> radius = radii(level_from(z), 1, queries);
  const Forward difference = {pointer<void>(field_x), nullptr, nullptr, nullptr};
  const Status status =
      run_posterior_mean(sizes, x, y, sketch, radius, 1, true, threads, difference);
  if (status.failure != Failure::none) return false;
  const py::gil_scoped_release released;
  normalised_field({sizes.type, queries, features, pointer<const void>(field_x), features,
                    radius.data(), gamma, pointer<void>(field_x), features, pointer<void>(field_z),
                    threads});
  return true;
}

// ---- a step of the ODE ----------------------------------------------------------------------

bool direct_step(int method, int type, Index rows, Index features, Address x, Address slope,
                 Address field_z, Address history, const py::handle& z, const py::handle& z_next,
                 const py::handle& z_previous, double gamma, double z_exp, bool exact, Address next,
                 Address mean, int threads) {
  if (other_backend()) return false;
  const StepTensors tensors = {
      static_cast<Type>(type), rows, features, x, slope, field_z, history, next, mean};
  const StepLaw law = {gamma, z_exp, exact};
  if (!law.allowed() || !tensors.outputs_allowed()) return false;
  const GivenLevels given = {static_cast<Method>(method), level_from(z), level_from(z_next),
                             level_from(z_previous)};
  const bool shared = given.are_numbers();
  const Index count = shared ? 1 : rows;
  std::vector<double> levels(3 * count);
  for (Index b = 0; b < count; ++b) {
    StepLevels found;
    if (!given.find(b, tensors.type, &found)) return false;
    levels[b] = found.z;
    levels[count + b] = found.toward;
    levels[2 * count + b] = found.blend;
  }
  const py::gil_scoped_release released;
  ode_step(tensors.step(levels.data(), shared ? 0 : 1, law, threads));
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

// ---- a sample of memory ---------------------------------------------------------------------

// A number that changes with any byte of a window of 64 bytes: of the 16 to 64 windows that are
// spread over the memory, or of all bytes if they are few. Where a window lies in its share of the
// memory looks random, so that windows do not follow the rows.
std::uint64_t direct_sample(Address values, Index bytes) {
  constexpr Index kWindow = 64, kFew = 1024, kShare = 8192, kFewest = kFew / kWindow, kMost = 64;
  constexpr std::uint64_t kMixing = 0x9e3779b97f4a7c15u;
  const auto* memory = pointer<const unsigned char>(values);
  if (memory == nullptr) return 0;
  std::uint64_t sum = 0;
  const auto take = [&sum, memory](Index begin, Index end) {
    for (Index i = begin; i < end; i += sizeof sum) {
      std::uint64_t word = 0;
      std::memcpy(&word, memory + i, std::min<Index>(sizeof word, end - i));
      sum = (sum ^ word) * kMixing;
      sum ^= sum >> 32;
    }
  };
  if (bytes <= kFew) {
    take(0, bytes);
    return sum;
  }
  const Index windows = std::clamp(bytes / kShare, kFewest, kMost);
  for (Index w = 0; w < windows; ++w) {
    const Index begin = bytes * w / windows, end = bytes * (w + 1) / windows;
    const Index places = end - begin - kWindow + 1;
    const Index place = begin + static_cast<Index>((w * kMixing >> 32) % places);
    take(place, place + kWindow);
  }
  return sum;
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("direct_posterior_mean", &direct_posterior_mean);
  module.def("direct_field", &direct_field);
  module.def("direct_step", &direct_step);
  module.def("direct_all_finite", &direct_all_finite);
  module.def("direct_sample", &direct_sample);
}

}  // namespace pfgm
