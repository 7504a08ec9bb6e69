// Python function that lays float images side by side. Addresses come as integers.
#include <algorithm>
#include <cstring>

#include "bindings.h"
#include "driver.h"
#include "parallel.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

// Parts of rows, so that one long row has work for all threads.
void copy(uintptr_t x, int64_t rows, int64_t length, uintptr_t out, int64_t out_pitch, int num_threads) {
  constexpr int64_t kPart = 32768;  // floats
  const int64_t parts = ceil_div(length, kPart);
  parallel_for(num_threads, rows * parts, [=](int64_t task) {
    const int64_t row = task / parts, begin = task % parts * kPart;
    std::memcpy(at<float>(out) + row * out_pitch + begin, at<const float>(x) + row * length + begin,
                std::min(kPart, length - begin) * sizeof(float));
  });
}

}  // namespace

void bind_concat(py::module_& module) {
  using py::arg;
  module.def("copy_rows", recorded(copy), arg("x"), arg("rows"), arg("length"), arg("out"), arg("out_pitch"),
             arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
