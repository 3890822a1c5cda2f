// Addresses of tensors, and calls that a signal interrupts.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "api/posterior_mean.h"
#include "api/watch.h"

namespace pfgm {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls of fewer queries × references × features take at most milliseconds and are not interrupted.
constexpr double kInterruptible = 1 << 26;
constexpr std::int64_t kInterval = 100;  // milliseconds between two checks for a signal

// Whether a signal handler has raised an exception. The exception stays set as Python's error.
inline bool interrupted() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Python handles signals in the main thread. Other threads need not take the GIL to check.
inline bool on_main_thread() {
  const py::object main = py::module_::import("threading").attr("main_thread")();
  return main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

// Runs without the GIL. If a signal handler raises (Ctrl-C raises KeyboardInterrupt), this raises
// the same exception, and outputs are incomplete.
template <class Run>
auto run_interruptible(const Problem& problem, const Run& run) {
  const double size = static_cast<double>(problem.queries) *
                      static_cast<double>(problem.references) *
                      static_cast<double>(problem.features);
  const bool watched = size >= kInterruptible && on_main_thread();
  try {
    const py::gil_scoped_release release;
    std::optional<Watch> watch;
    if (watched) watch.emplace(&interrupted, kInterval);
    return run();
  } catch (const Stopped&) {
    throw py::error_already_set();
  }
}

}  // namespace pfgm
