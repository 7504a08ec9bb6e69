// Python's side of Program.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "program.h"

namespace py = pybind11;

namespace cnncomp {

void bind_program(py::module_& module) {
  using py::arg;
  py::class_<Program>(module, "Program")
      .def(py::init())
      .def("__len__", &Program::size)
      .def(
          "record", [](Program& self, bool on) { Program::recording() = on ? &self : nullptr; }, arg("on"))
      .def("truncate", &Program::truncate, arg("size"))
      .def("addresses", &Program::addresses, arg("step"))
      .def("bind", &Program::bind, arg("step"), arg("which"), arg("slot"), arg("offset"))
      .def("takes_pitch", &Program::takes_pitch, arg("step"), arg("which"))
      .def("set_pitch", &Program::set_pitch, arg("step"), arg("which"), arg("floats"))
      .def("leave", &Program::leave, arg("step"))
      .def("run", &Program::run, arg("first"), arg("last"), arg("slots"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
