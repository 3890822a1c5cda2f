// The functions of direct.cpp on a CUDA device, on a stream. All tensors but references are
// float32, and values on the device are not checked. Workspace is memory of torch's allocator. The
// caller may free it as soon as the kernels are enqueued: the allocator gives it only to work that
// follows on the same stream.
#include <cstddef>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"
#include "bindings/direct.h"
#include "bindings/direct_arguments.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// `allocate` returns a tensor of so many bytes.
class Workspace {
 public:
  Workspace(const py::object& allocate, std::size_t bytes)
      : tensor_(allocate(bytes)),
        begin_(tensor_.attr("data_ptr")().cast<Address>()),
        bytes_(bytes) {}

  CudaWorkspace from(std::size_t offset) const {
    return {pointer<void>(begin_ + offset), bytes_ - offset};
  }
  double* doubles(std::size_t offset) const { return pointer<double>(begin_ + offset); }

 private:
  const py::object tensor_;
  const Address begin_;
  const std::size_t bytes_;
};

// ---- the posterior mean and the field -------------------------------------------------------

// The posterior mean of points whose radii are level × factor. The workspace begins with columns
// of a double for each query: radius, nearest, total and, where it is not wanted, the log-sum-exp.
class MeanCall {
 public:
  MeanCall(int type, int reference_type, Index queries, Index references, Index features, Address x,
           Address y, double dimensions, int precision, bool difference, int device, Address stream)
      : place_{device, stream},
        column_((static_cast<std::size_t>(queries) * sizeof(double) + 255) / 256 * 256) {
    problem_ = {static_cast<Type>(type),
                static_cast<Type>(reference_type),
                queries,
                references,
                features,
                pointer<const void>(x),
                features,
                pointer<const void>(y),
                features,
                nullptr,
                dimensions,
                1,
                nullptr,
                0,
                static_cast<Precision>(precision),
                difference};
  }

  std::size_t workspace() const {
    return 4 * column_ + posterior_mean_workspace_cuda(problem_, place_, false);
  }

  // Returns the radii.
  const double* enqueue(const Level& level, double factor, Address mean, Address logsumexp,
                        const Workspace& memory) {
    double* radius = memory.doubles(0);
    expand_level_cuda(level, factor, problem_.queries, radius, place_);
    problem_.radius = radius;
    const Forward out = {pointer<void>(mean),
                         logsumexp ? pointer<double>(logsumexp) : memory.doubles(3 * column_),
                         memory.doubles(column_), memory.doubles(2 * column_)};
    posterior_mean_cuda(problem_, out, place_, memory.from(4 * column_));
    return radius;
  }

  const CudaPlace& place() const { return place_; }

 private:
  Problem problem_;
  CudaPlace place_;
  std::size_t column_;  // bytes
};

bool direct_posterior_mean_cuda(int type, int reference_type, Index queries, Index references,
                                Index features, Address x, Address y, const py::handle& level,
                                double factor, double dimensions, Address mean, Address logsumexp,
                                int precision, int device, Address stream,
                                const py::object& allocate) {
  if (other_backend()) return false;
  const Level given = level_from(level);
  MeanCall call(type, reference_type, queries, references, features, x, y, dimensions, precision,
                false, device, stream);
  const Workspace memory(allocate, call.workspace());
  const py::gil_scoped_release released;
  call.enqueue(given, factor, mean, logsumexp, memory);
  return true;
}

bool direct_field_cuda(int type, int reference_type, Index queries, Index references,
                       Index features, Address x, Address y, const py::handle& z, double gamma,
                       Address field_x, Address field_z, int precision, int device, Address stream,
                       const py::object& allocate) {
  if (other_backend()) return false;
  const Level given = level_from(z);
  MeanCall call(type, reference_type, queries, references, features, x, y, 1, precision, true,
                device, stream);
  const Workspace memory(allocate, call.workspace());
  const py::gil_scoped_release released;
  const double* radius = call.enqueue(given, 1, field_x, 0, memory);
  normalised_field_cuda(
      {static_cast<Type>(type), queries, features, pointer<const void>(field_x), features, radius,
       gamma, pointer<void>(field_x), features, pointer<void>(field_z), 1},
      call.place());
  return true;
}

// ---- a step of the ODE ----------------------------------------------------------------------

// `row_levels` is memory for the levels of each row, (3, rows); 0 where all levels are numbers.
bool direct_step_cuda(int method, int type, Index rows, Index features, Address x, Address slope,
                      Address field_z, Address history, const py::handle& z,
                      const py::handle& z_next, const py::handle& z_previous, double gamma,
                      double z_exp, bool exact, Address next, Address mean, int device,
                      Address stream, Address row_levels) {
  if (other_backend()) return false;
  const StepTensors tensors = {
      static_cast<Type>(type), rows, features, x, slope, field_z, history, next, mean};
  const StepLaw law = {gamma, z_exp, exact};
  if (!law.allowed() || !tensors.outputs_allowed()) return false;
  const GivenLevels given = {static_cast<Method>(method), level_from(z), level_from(z_next),
                             level_from(z_previous)};
  const CudaPlace place = {device, stream};
  if (given.are_numbers()) {
    StepLevels shared;
    if (!given.find(0, tensors.type, &shared)) return false;
    const double levels[] = {shared.z, shared.toward, shared.blend};
    const py::gil_scoped_release released;
    ode_step_cuda(tensors.step(levels, 0, law, 1), place);
    return true;
  }
  double* levels = pointer<double>(row_levels);
  const py::gil_scoped_release released;
  step_levels_cuda(given.method, given.z, given.z_next, given.z_previous, rows, levels, place);
  ode_step_cuda(tensors.step(levels, 1, law, 1), place);
  return true;
}

}  // namespace

void bind_direct_cuda(py::module_& module) {
  module.def("direct_posterior_mean_cuda", &direct_posterior_mean_cuda);
  module.def("direct_field_cuda", &direct_field_cuda);
  module.def("direct_step_cuda", &direct_step_cuda);
}

}  // namespace pfgm
