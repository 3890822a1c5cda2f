// posterior_mean, field_fn and a step of the ODE, each from its arguments to its result in one
// call, on the CPU, or on a CUDA device if one is given.
// pfgm/backends/native_calls.py calls them with positional arguments, which cost least. Tensors are
// contiguous, but for the rows of references; 0 is the address of one that is absent.
//
// A call returns false where an argument is not allowed. Its outputs are then undefined, and the
// caller takes the way through the operators, which says what is wrong. Values on a device are not
// checked.
#include "bindings/direct.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "api/levels.h"
#include "bindings/interruptible.h"
#include "bindings/structs.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// Whether the environment names another backend.
bool other_backend() {
  const char* name = std::getenv("PFGM_BACKEND");
  return name != nullptr && *name != '\0' && std::strcmp(name, "native") != 0;
}

// From a number, or from (address, type, distance between rows, tensor).
Level level_from(const py::handle& level) {
  if (PyFloat_Check(level.ptr())) return {PyFloat_AS_DOUBLE(level.ptr()), nullptr, Type(), 0};
  const auto values = py::reinterpret_borrow<py::tuple>(level);
  return {0, pointer<const void>(values[0].cast<Address>()),
          static_cast<Type>(values[1].cast<int>()), values[2].cast<Index>()};
}

// A level in host memory, which need not be aligned.
double level_of(const Level& level, Index row) {
  if (level.values == nullptr) return level.number;
  const auto read = [&](auto value) {
    const auto at = row * level.stride * static_cast<Index>(sizeof value);
    std::memcpy(&value, static_cast<const char*>(level.values) + at, sizeof value);
    return static_cast<double>(value);
  };
  return level.type == Type::float64 ? read(double()) : read(float());
}

// ---- the posterior mean and the field -------------------------------------------------------

// Where results go: the mean, or the field's v_x and v_z.
struct Results {
  Address mean_or_field_x, logsumexp, field_z;
  double gamma;

  // The field from x − mean, which it replaces.
  NormalisedField field(const Problem& problem) const {
    const StridedRows rows = {mean_or_field_x, problem.features};
    return pfgm::field(static_cast<int>(problem.type), problem.queries, problem.features, rows,
                       reinterpret_cast<Address>(problem.radius), gamma, rows, field_z,
                       problem.threads);
  }
};

bool mean_on_cpu(Problem problem, const Level& level, double factor, const Results& out) {
  std::vector<double> radius(problem.queries);
  for (Index b = 0; b < problem.queries; ++b) radius[b] = level_of(level, b) * factor;
  problem.radius = radius.data();
  const Forward io = {pointer<void>(out.mean_or_field_x), pointer<double>(out.logsumexp), nullptr,
                      nullptr};
  const Kernels& kernels = cpu_kernels();
  return run_interruptible(problem, [&] {
    if (kernels.posterior_mean(problem, io).failure != Failure::none) return false;
    if (out.field_z != 0) normalised_field(out.field(problem));
    return true;
  });
}

#ifdef PFGM_HAS_CUDA
// `allocate` returns a tensor of so many bytes, in memory of torch's allocator. It may be freed as
// soon as the kernels are enqueued: the allocator gives it only to work that follows on the same
// stream. It begins with columns of a double for each query: radius, nearest, total and, where it
// is not wanted, the log-sum-exp.
void mean_on_gpu(Problem problem, const Level& level, double factor, const Results& out,
                 const CudaStream& stream, const py::object& allocate) {
  const std::size_t column = (problem.queries * sizeof(double) + 255) / 256 * 256;
  const std::size_t bytes = posterior_mean_workspace_cuda(problem, stream, false);
  const py::object memory = allocate(4 * column + bytes);
  const auto begin = memory.attr("data_ptr")().cast<Address>();
  const auto doubles = [&](int k) { return pointer<double>(begin + k * column); };
  const py::gil_scoped_release released;
  expand_level_cuda(level, factor, problem.queries, doubles(0), stream);
  problem.radius = doubles(0);
  const Forward io = {pointer<void>(out.mean_or_field_x),
                      out.logsumexp != 0 ? pointer<double>(out.logsumexp) : doubles(3), doubles(1),
                      doubles(2)};
  posterior_mean_cuda(problem, io, stream, {doubles(4), bytes});
  if (out.field_z != 0) normalised_field_cuda(out.field(problem), stream);
}
#endif

// The mean, or the field if `field_z` is given. The sketch is None or a tensor, which the call
// keeps. Radii are level × factor. `gpu` is None, or a device, a stream and the function that
// allocates.
bool direct_mean(Index queries, Index references, Index features, int type, int reference_type,
                 Address x, Address y, Index y_stride, const py::handle& level,
                 const py::object& sketch, int threads, [[maybe_unused]] const py::object& gpu,
                 double factor, double dimensions, double gamma, Address result, Address logsumexp,
                 Address field_z) {
  if (other_backend()) return false;
  const Problem problem = pfgm::problem(
      type, reference_type, queries, references, features, x, features, y, y_stride, 0, dimensions,
      threads, sketch.is_none() ? 0 : sketch.attr("data_ptr")().cast<Address>(), 0, field_z != 0);
  const Results out = {result, logsumexp, field_z, gamma};
#ifdef PFGM_HAS_CUDA
  if (!gpu.is_none()) {
    const auto [device, stream, allocate] = gpu.cast<std::tuple<int, Address, py::object>>();
    mean_on_gpu(problem, level_from(level), factor, out, {device, stream}, allocate);
    return true;
  }
#endif
  return mean_on_cpu(problem, level_from(level), factor, out);
}

// ---- a step of the ODE ----------------------------------------------------------------------

// The levels of a step. A method with two levels has a third that it does not use.
struct ThreeLevels {
  Method method;
  Level z, z_next, z_previous;

  bool are_numbers() const {
    return z.values == nullptr && z_next.values == nullptr && z_previous.values == nullptr;
  }

  // What the step computes from the levels of a row in host memory, if they are allowed: positive
  // and within the range of the points' type.
  bool find(Index row, Type type, StepLevels* out) const {
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

bool finite_and_not_negative(double value) { return value >= 0 && std::isfinite(value); }

// Whether each output is one of the inputs or separate from it, and separate from the other.
bool outputs_allowed(const OdeStep& step) {
  const std::size_t column =
      step.rows * (step.type == Type::float64 ? sizeof(double) : sizeof(float));
  const std::size_t bytes = step.features * column;
  const auto apart = [](const void* a, std::size_t a_bytes, const void* b, std::size_t b_bytes) {
    const auto first = reinterpret_cast<Address>(a), second = reinterpret_cast<Address>(b);
    return first + a_bytes <= second || second + b_bytes <= first;
  };
  for (const void* out : {step.next, step.mean}) {
    if (out == nullptr) continue;
    for (const void* in : {step.x, step.slope, step.history})
      if (in != nullptr && in != out && !apart(out, bytes, in, bytes)) return false;
    if (step.field_z != nullptr && !apart(out, bytes, step.field_z, column)) return false;
  }
  return step.mean == nullptr || apart(step.next, bytes, step.mean, bytes);
}

// `gpu` is None, or a device, a stream and memory for the levels of each row, (3, rows); 0 where
// all levels are numbers.
bool direct_step(int method, int type, Index rows, Index features, Address x, Address slope,
                 Address field_z, Address history, const py::handle& z, const py::handle& z_next,
                 const py::handle& z_previous, double gamma, double z_exp, bool exact, Address next,
                 Address mean, int threads, [[maybe_unused]] const py::object& gpu) {
  if (other_backend() || !finite_and_not_negative(gamma) || !finite_and_not_negative(z_exp))
    return false;
  OdeStep step = pfgm::step(type, rows, features, {x, features}, {slope, features}, field_z,
                            {history, features}, 0, 1, gamma, z_exp, exact, {next, features},
                            {mean, features}, threads);
  if (!outputs_allowed(step)) return false;
  const ThreeLevels levels = {static_cast<Method>(method), level_from(z), level_from(z_next),
                              level_from(z_previous)};
#ifdef PFGM_HAS_CUDA
  CudaStream gpu_stream{};
  if (!gpu.is_none()) {
    const auto [device, stream, row_levels] = gpu.cast<std::tuple<int, Address, Address>>();
    gpu_stream = {device, stream};
    if (!levels.are_numbers()) {
      step.levels = pointer<double>(row_levels);
      const py::gil_scoped_release released;
      step_levels_cuda(levels.method, levels.z, levels.z_next, levels.z_previous, rows,
                       pointer<double>(row_levels), gpu_stream);
      ode_step_cuda(step, gpu_stream);
      return true;
    }
  }
  const bool on_gpu = !gpu.is_none();
#endif
  step.level_stride = levels.are_numbers() ? 0 : 1;
  const Index count = levels.are_numbers() ? 1 : rows;
  std::vector<double> values(3 * count);
  for (Index b = 0; b < count; ++b) {
    StepLevels at_row;
    if (!levels.find(b, step.type, &at_row)) return false;
    values[b] = at_row.z;
    values[count + b] = at_row.toward;
    values[2 * count + b] = at_row.blend;
  }
  step.levels = values.data();
  const py::gil_scoped_release released;
#ifdef PFGM_HAS_CUDA
  if (on_gpu) {
    ode_step_cuda(step, gpu_stream);
    return true;
  }
#endif
  ode_step(step);
  return true;
}

}  // namespace

void bind_direct(py::module_& module) {
  module.def("direct_mean", &direct_mean);
  module.def("direct_step", &direct_step);
}

}  // namespace pfgm
