#include "quantize.h"

#include <algorithm>

#include "int8_kernels.h"
#include "parallel.h"

namespace cnncomp {

void quantize(const QuantizeArgs& a) {
  const Int8Kernels& kernels = int8_kernels();
  const QuantizeRange range{a.inv_scale, a.out_signed ? -128.0f : 0.0f, a.out_signed ? 127.0f : 255.0f};
  const int64_t pixels = a.h * a.w, size = a.n * a.c * pixels;
  constexpr int64_t kElements = 1 << 15;  // of a task: what the second-level cache holds of floats and bytes
  if (size == 0) return;
  if (a.channels_last || a.c == 1 || pixels == 1) {
    const int64_t tasks = (size + kElements - 1) / kElements;
    parallel_for(a.num_threads, tasks, [&](int64_t i) {
      const int64_t begin = i * kElements;
      kernels.quantize_flat(a.x + begin, std::min(kElements, size - begin), range, a.out + begin);
    });
    return;
  }
  const int64_t run = std::max<int64_t>(64, kElements / a.c / 16 * 16), runs = (pixels + run - 1) / run;
  parallel_for(a.num_threads, a.n * runs, [&](int64_t i) {
    const int64_t n = i / runs, begin = i % runs * run, first = n * a.c * pixels;
    kernels.quantize_planes(a.x + first + begin, pixels, a.c, std::min(run, pixels - begin), range,
                            a.out + first + begin * a.c);
  });
}

}  // namespace cnncomp
