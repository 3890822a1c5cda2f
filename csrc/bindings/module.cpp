// The extension module pfgm._native: it takes raw addresses and sizes and returns a status. Only
// pfgm/backends/native.py, native_calls.py and native_parts.py call it, after checking every
// shape, type and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <string>
#include <utility>

#include "api/devices.h"
#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"
#include "bindings/direct.h"
#include "bindings/interruptible.h"
#include "bindings/structs.h"

namespace py = pybind11;

namespace pfgm {
namespace {

using Result = std::pair<int, std::int64_t>;  // failure code, first query that failed

// Memory: address and bytes.
using Memory = std::pair<Address, std::int64_t>;

Kept kept_in(Memory memory) { return {pointer<void>(memory.first), memory.second}; }

Forward forward(Address mean, Address logsumexp, Address nearest, Address total, Address sums,
                Memory kept) {
  return {pointer<void>(mean),    pointer<double>(logsumexp), pointer<double>(nearest),
          pointer<double>(total), pointer<double>(sums),      kept_in(kept)};
}

Backward backward(Address grad_mean, Address grad_logsumexp, Address mean, Address nearest,
                  Address total, Address grad_x, Address grad_radius, Address grad_references,
                  Address sums, Address moments, Address pulls, Memory kept) {
  return {pointer<const void>(grad_mean), pointer<const double>(grad_logsumexp),
          pointer<const void>(mean),      pointer<const double>(nearest),
          pointer<const double>(total),   pointer<void>(grad_x),
          pointer<double>(grad_radius),   pointer<void>(grad_references),
          pointer<double>(sums),          pointer<double>(moments),
          pointer<double>(pulls),         kept_in(kept)};
}

// A pass over all references, by the kernels of this machine.
template <auto kPass, class Io>
Result run_pass(const Problem& problem, const Io& io) {
  const auto pass = cpu_kernels().*kPass;
  const Status status = run_interruptible(problem, [&] { return pass(problem, io); });
  return {static_cast<int>(status.failure), status.row};
}

// A problem of which only sizes, types and references matter.
Problem outline(int type, int reference_type, std::int64_t queries, std::int64_t references,
                std::int64_t features, StridedRows y, int threads) {
  return problem(type, reference_type, queries, references, features, 0, 0, y.first, y.second, 0, 0,
                 threads, 0, 0, false);
}

std::int64_t kept_bytes(int type, int reference_type, std::int64_t queries, std::int64_t references,
                        std::int64_t features) {
  return cpu_kernels().kept_bytes(
      outline(type, reference_type, queries, references, features, {0, 0}, 1));
}

#ifdef PFGM_HAS_CUDA
std::int64_t kept_bytes_cuda(int type, int reference_type, std::int64_t queries,
                             std::int64_t references, std::int64_t features) {
  return posterior_mean_kept_cuda(
      outline(type, reference_type, queries, references, features, {0, 0}, 1));
}
#endif

std::int64_t sketch_bytes(int type, int reference_type, std::int64_t references,
                          std::int64_t features) {
  return cpu_kernels().sketch_bytes(
      outline(type, reference_type, 0, references, features, {0, 0}, 1));
}

void run_sketch(int type, int reference_type, std::int64_t references, std::int64_t features,
                StridedRows y, Address out, int threads) {
  const Kernels& kernels = cpu_kernels();
  const Problem problem = outline(type, reference_type, 1, references, features, y, threads);
  const Status status =
      run_interruptible(problem, [&] { return kernels.sketch(problem, pointer<void>(out)); });
  if (status.failure == Failure::memory) throw std::bad_alloc();
}

void run_normalised_field_backward(const NormalisedField& field, StridedRows grad_field_x,
                                   Address grad_field_z, Address grad_difference, Address grad_z) {
  const py::gil_scoped_release released;
  normalised_field_backward(field, {pointer<const void>(grad_field_x.first), grad_field_x.second,
                                    pointer<const void>(grad_field_z),
                                    pointer<void>(grad_difference), pointer<double>(grad_z)});
}

py::dict build_info() {
  py::dict info;
  info["source_digest"] = PFGM_SOURCE_DIGEST;
  info["compiler"] = PFGM_COMPILER;
#ifdef PFGM_HAS_CUDA
  info["cuda_architectures"] = PFGM_CUDA_ARCHITECTURES;
  info["cuda_driver"] = PFGM_CUDA_DRIVER;
  info["nvcc"] = PFGM_NVCC;
  info["without_cuda"] = py::none();
#else
  info["cuda_architectures"] = py::none();
  info["cuda_driver"] = py::none();
  info["nvcc"] = py::none();
  info["without_cuda"] = PFGM_WITHOUT_CUDA;
#endif
  return info;
}

}  // namespace
}  // namespace pfgm

PYBIND11_MODULE(_native, module) {
  using namespace pfgm;
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<Problem>(module, "Problem", py::module_local())
      .def(py::init(&problem), py::kw_only(), py::arg("type"), py::arg("reference_type"),
           py::arg("queries"), py::arg("references"), py::arg("features"), py::arg("x"),
           py::arg("x_stride"), py::arg("y"), py::arg("y_stride"), py::arg("radius"),
           py::arg("dimensions"), py::arg("threads"), py::arg("sketch") = 0,
           py::arg("all_references") = 0, py::arg("difference") = false);
  py::class_<Forward>(module, "Forward", py::module_local())
      .def(py::init(&forward), py::kw_only(), py::arg("mean"), py::arg("logsumexp"),
           py::arg("nearest"), py::arg("total"), py::arg("sums") = 0, py::arg("kept") = Memory());
  py::class_<Backward>(module, "Backward", py::module_local())
      .def(py::init(&backward), py::kw_only(), py::arg("grad_mean"), py::arg("grad_logsumexp"),
           py::arg("mean"), py::arg("nearest"), py::arg("total"), py::arg("grad_x"),
           py::arg("grad_radius"), py::arg("grad_references"), py::arg("sums") = 0,
           py::arg("moments") = 0, py::arg("pulls") = 0, py::arg("kept") = Memory());
  py::class_<OdeStep>(module, "OdeStep", py::module_local())
      .def(py::init(&step), py::kw_only(), py::arg("type"), py::arg("rows"), py::arg("features"),
           py::arg("x"), py::arg("slope"), py::arg("field_z"), py::arg("history"),
           py::arg("levels"), py::arg("level_stride"), py::arg("gamma"), py::arg("z_exp"),
           py::arg("exact"), py::arg("next"), py::arg("mean"), py::arg("threads"));
  module.def("posterior_mean", &run_pass<&Kernels::posterior_mean, Forward>);
  module.def("posterior_mean_backward", &run_pass<&Kernels::posterior_mean_backward, Backward>);
  module.def("posterior_mean_pulls", &run_pass<&Kernels::posterior_mean_pulls, Backward>);
  module.def("any_ill_conditioned", [](const Problem& problem, const Backward& io) {
    return cpu_kernels().any_ill_conditioned(problem, io);
  });
  module.def("chunk_rows", [](std::int64_t features, int reference_type) {
    return cpu_kernels().chunk_rows(features, static_cast<Type>(reference_type));
  });
  module.def("kept_bytes", &kept_bytes, py::kw_only(), py::arg("type"), py::arg("reference_type"),
             py::arg("queries"), py::arg("references"), py::arg("features"));
  module.def("sketch_bytes", &sketch_bytes, py::kw_only(), py::arg("type"),
             py::arg("reference_type"), py::arg("references"), py::arg("features"));
  module.def("sketch", &run_sketch, py::kw_only(), py::arg("type"), py::arg("reference_type"),
             py::arg("references"), py::arg("features"), py::arg("y"), py::arg("out"),
             py::arg("threads"));
  // Not interrupted: the step goes over memory once and may overwrite its inputs.
  module.def("ode_step", &ode_step, released);
  py::class_<NormalisedField>(module, "NormalisedField", py::module_local())
      .def(py::init(&field), py::kw_only(), py::arg("type"), py::arg("rows"), py::arg("features"),
           py::arg("difference"), py::arg("z"), py::arg("gamma"), py::arg("field_x"),
           py::arg("field_z"), py::arg("threads"));
  module.def("normalised_field", &normalised_field, released);
  module.def("normalised_field_backward", &run_normalised_field_backward, py::arg("field"),
             py::kw_only(), py::arg("grad_field_x"), py::arg("grad_field_z"),
             py::arg("grad_difference"), py::arg("grad_z"));
  bind_direct(module);
  bind_values(module);
#ifdef PFGM_HAS_CUDA
  py::class_<CudaStream>(module, "CudaStream", py::module_local())
      .def(py::init<int, std::uintptr_t>(), py::kw_only(), py::arg("device"), py::arg("handle"));
  module.def("kept_bytes_cuda", &kept_bytes_cuda, py::kw_only(), py::arg("type"),
             py::arg("reference_type"), py::arg("queries"), py::arg("references"),
             py::arg("features"));
  module.def("posterior_mean_workspace_cuda", &posterior_mean_workspace_cuda, released,
             py::arg("problem"), py::arg("stream"), py::arg("backward"), py::arg("kept") = 0);
  py::class_<CudaWorkspace>(module, "CudaWorkspace", py::module_local())
      .def(py::init([](Address at, std::size_t bytes) {
             return CudaWorkspace{pointer<void>(at), bytes};
           }),
           py::kw_only(), py::arg("at"), py::arg("bytes"));
  module.def("posterior_mean_cuda", &posterior_mean_cuda, released);
  module.def("posterior_mean_backward_cuda", &posterior_mean_backward_cuda, released);
  module.def("cuda_problem", &cuda_problem, released);
  module.def("ode_step_cuda", &ode_step_cuda, released);
  module.def("normalised_field_cuda", &normalised_field_cuda, released);
  // For tests: smaller blocks and chunks.
  module.def(
      "limit_cuda",
      [](std::int64_t pairs, std::int64_t parts, std::int64_t queries, std::int64_t references,
         std::int64_t halved) { limit_cuda({pairs, parts, queries, references, halved}); },
      py::kw_only(), py::arg("pairs") = CudaLimits().pairs, py::arg("parts") = CudaLimits().parts,
      py::arg("queries") = CudaLimits().queries, py::arg("references") = CudaLimits().references,
      py::arg("halved") = CudaLimits().halved);
#endif
  module.def("cpu_isa", [] { return std::string(cpu_kernels().isa); });
  module.def("cuda_devices", [] {
    const CudaDevices devices = cuda_devices();
    return py::make_tuple(devices.names, devices.error);
  });
  module.def("cuda_versions", [] {
    const CudaVersions versions = cuda_versions();
    return py::make_tuple(versions.runtime, versions.driver);
  });
  module.def("build_info", &build_info);
}
