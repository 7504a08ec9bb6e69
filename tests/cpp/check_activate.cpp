// activate, affine_rows and copy_rows.
#include "check.h"
#include "cpu/activate.h"

namespace check {
namespace {

void activate(Random& random) {
  const int64_t rows = random.whole(1, 50), length = random.one_of<int64_t>({1, 49, 196, random.whole(1, 300), 20000});
  const int64_t x_pitch = length + random.whole(0, 20), out_pitch = length + random.whole(0, 20), channels = random.whole(1, rows);
  const Buffer<float> x(random.many<float>(rows * x_pitch)), scale(random.many<float>(channels)), shift(random.many<float>(channels));
  const bool with_shift = random.chance(0.5);
  const auto kind = static_cast<cnncomp::Activation>(random.whole(0, cnncomp::kActivations - 1));
  const std::string what = " rows=" + std::to_string(rows) + " length=" + std::to_string(length);
  const auto check = [&](const char* name, auto kernel) {
    same_everywhere(name + what, rows * length * 4, true, [&](char* to, int threads) {
      const Gapped out(rows, length, out_pitch);
      kernel(cnncomp::ActivateArgs{x.data(), rows, length, out.data(), threads, x_pitch, out_pitch});
      out.copy(to);
    });
  };
  check("activate", [&](const cnncomp::ActivateArgs& a) { cnncomp::activate(a, kind); });
  check("affine_rows", [&](const cnncomp::ActivateArgs& a) {
    cnncomp::affine_rows(a, {scale.data(), with_shift ? shift.data() : nullptr, channels, -0.5f, 0.5f});
  });
  check("copy_rows", [](const cnncomp::ActivateArgs& a) { cnncomp::copy_rows(a); });
  const Buffer<uint8_t> bytes(random.many<uint8_t>(rows * length));
  same_everywhere("copy_byte_rows" + what, (rows - 1) * out_pitch + length, false, [&](char* to, int threads) {
    std::memset(to, 0, (rows - 1) * out_pitch + length);
    cnncomp::copy_byte_rows(bytes.data(), rows, length, reinterpret_cast<uint8_t*>(to), out_pitch, threads);
  });
}

const Registration all("activate", activate);

}  // namespace
}  // namespace check
