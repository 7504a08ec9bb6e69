// Each kernel family adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "program.h"

// Python sees a pitch as the number that it is.
template <int kOperand>
struct pybind11::detail::type_caster<cnncomp::Pitch<kOperand>> {
  PYBIND11_TYPE_CASTER(cnncomp::Pitch<kOperand>, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<int64_t> number;
    if (!number.load(source, convert)) return false;
    value.floats = static_cast<int64_t>(number);
    return true;
  }
  static handle cast(const cnncomp::Pitch<kOperand>& pitch, return_value_policy, handle) {
    return PyLong_FromLongLong(pitch.floats);
  }
};

namespace cnncomp {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_activate(pybind11::module_& m);
void bind_int8(pybind11::module_& m);
void bind_conv2d_depthwise(pybind11::module_& m);
void bind_conv2d_sparse(pybind11::module_& m);
void bind_linear_dense(pybind11::module_& m);
void bind_pool2d(pybind11::module_& m);
void bind_program(pybind11::module_& m);

}  // namespace cnncomp
