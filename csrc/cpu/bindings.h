// Each kernel family adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace cnncomp {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_int8(pybind11::module_& m);
void bind_conv2d_depthwise(pybind11::module_& m);
void bind_conv2d_sparse(pybind11::module_& m);
void bind_linear_dense(pybind11::module_& m);
void bind_pool2d(pybind11::module_& m);
void bind_program(pybind11::module_& m);

}  // namespace cnncomp
