#include "max_pool2d_int8.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "driver.h"
#include "int8_kernels.h"
#include "parallel.h"

namespace cnncomp {

void max_pool2d_int8(const MaxPool2dInt8Args& a) {
  const auto max_rows = a.x_signed ? int8_kernels().max_rows_s8 : int8_kernels().max_rows_u8;
  const int64_t out_h = pooled_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, a.ceil_mode);
  const int64_t out_w = pooled_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, a.ceil_mode);
  parallel_for(a.num_threads, a.n * out_h, [&](int64_t i) {
    const int64_t n = i / out_h, p = i % out_h;
    std::vector<const uint8_t*> lines, rows(a.r * a.s);  // of the image under the window; of one pixel's taps
    for (int64_t r = 0; r < a.r; r++) {
      const int64_t h = p * a.stride_h - a.pad_h + r * a.dil_h;
      if (h >= 0 && h < a.h) lines.push_back(a.x + (n * a.h + h) * a.w * a.c);
    }
    uint8_t* out = a.out + i * out_w * a.c;
    for (int64_t q = 0; q < out_w; q++, out += a.c) {
      const int64_t w = q * a.stride_w - a.pad_w;
      const int64_t first = w < 0 ? ceil_div(-w, a.dil_w) : 0, end = w < a.w ? std::min(a.s, ceil_div(a.w - w, a.dil_w)) : 0;
      int64_t count = 0;
      for (const uint8_t* line : lines)
        for (int64_t s = first; s < end; s++) rows[count++] = line + (w + s * a.dil_w) * a.c;
      if (count > 0) {
        max_rows(rows.data(), count, a.c, out);
      } else {
        std::memset(out, a.x_signed ? -128 : 0, a.c);
      }
    }
  });
}

}  // namespace cnncomp
