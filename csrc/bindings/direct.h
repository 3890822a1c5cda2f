// Whole functions of the package in one call, for plain tensors in CPU memory or on a CUDA device.
#pragma once
#include <pybind11/pybind11.h>

namespace pfgm {

void bind_direct(pybind11::module_& module);
void bind_direct_cuda(pybind11::module_& module);

}  // namespace pfgm
