#include "activate.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "activate_kernel.h"
#include "cpuid.h"
#include "driver.h"
#include "parallel.h"
#include "pitch.h"

namespace cnncomp {
namespace {

constexpr int64_t kTogether = 16384;  // floats of a task

const ActivateKernels& kernels() {
  return CNNCOMP_FP32_KERNELS(kActivate);
}

// row(i, x, length, out) for each row, or part of a long one.
template <class Row>
void for_rows(const char* name, const ActivateArgs& a, Row row) {
  const int64_t x_pitch = checked_pitch(name, a.x_pitch, a.length), out_pitch = checked_pitch(name, a.out_pitch, a.length);
  const int64_t part = std::clamp<int64_t>(a.length, 1, kTogether), parts = ceil_div(a.length, part);
  const int64_t together = kTogether / part;  // short rows
  parallel_for(a.num_threads, ceil_div(a.rows, together) * parts, [&](int64_t task) {
    const int64_t begin = task % parts * part, length = std::min(part, a.length - begin), first = task / parts * together;
    for (int64_t i = first; i < std::min(a.rows, first + together); i++) {
      row(i, a.x + i * x_pitch + begin, length, a.out + i * out_pitch + begin);
    }
  });
}

}  // namespace

void activate(const ActivateArgs& a, Activation activation) {
  const int kind = static_cast<int>(activation);
  if (kind < 0 || kind >= kActivations) throw std::invalid_argument("activate: no activation " + std::to_string(kind));
  const auto kernel = kernels().activate[kind];
  ActivateArgs whole = a;
  if ((a.x_pitch == 0 || a.x_pitch == a.length) && a.x_pitch == a.out_pitch) {  // without gaps, all rows are one
    whole = {a.x, 1, a.rows * a.length, a.out, a.num_threads};
  }
  for_rows("activate", whole, [=](int64_t, const float* x, int64_t length, float* out) { kernel(x, length, out); });
}

void affine_rows(const ActivateArgs& a, const AffineRows& map) {
  const auto kernel = kernels().affine;
  for_rows("affine_rows", a, [=](int64_t i, const float* x, int64_t length, float* out) {
    const int64_t c = i % map.channels;
    kernel(x, length, map.scale[c], map.shift != nullptr ? map.shift[c] : 0.0f, map.lo, map.hi, out);
  });
}

void copy_rows(const ActivateArgs& a) {
  for_rows("copy_rows", a, [](int64_t, const float* x, int64_t length, float* out) { std::memcpy(out, x, length * sizeof(float)); });
}

void copy_byte_rows(const uint8_t* x, int64_t rows, int64_t length, uint8_t* out, int64_t out_pitch, int num_threads) {
  if (out_pitch < length) throw std::invalid_argument("copy_byte_rows: rows would overlap");
  constexpr int64_t kBytes = 16 << 10;  // of a task
  const int64_t tasks = std::min(rows, ceil_div(rows * length, kBytes));
  parallel_for(num_threads, tasks, [&](int64_t task) {
    const int64_t end = rows * (task + 1) / tasks;
    for (int64_t row = rows * task / tasks; row < end; row++) std::memcpy(out + row * out_pitch, x + row * length, length);
  });
}

}  // namespace cnncomp
