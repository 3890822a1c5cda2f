// Parts of the extension module.
#pragma once
#include <pybind11/pybind11.h>

namespace pfgm {

// Whole functions of the package in one call, for plain tensors on the CPU or on a CUDA device.
void bind_direct(pybind11::module_& module);
void bind_values(pybind11::module_& module);

}  // namespace pfgm
