// Program: recorded calls, repeated by two threads at once in memory of their own.
#include "check.h"
#include "cpu/program.h"

namespace check {
namespace {

void add_one(uintptr_t from, int64_t count, uintptr_t to) {
  const auto* x = reinterpret_cast<const uint8_t*>(from);
  auto* y = reinterpret_cast<uint8_t*>(to);
  for (int64_t i = 0; i < count; i++) y[i] = static_cast<uint8_t>(x[i] + 1);
}

void program(Random& random) {
  const int64_t count = random.whole(1, 100);
  const Buffer<uint8_t> x(random.many<uint8_t>(count));
  const Buffer<uint8_t> first(count), second(count);
  cnncomp::Program program;
  cnncomp::Program::recording() = &program;
  const auto kernel = cnncomp::recorded(add_one);
  kernel(reinterpret_cast<uintptr_t>(x.data()), count, reinterpret_cast<uintptr_t>(first.data()));
  kernel(reinterpret_cast<uintptr_t>(first.data()), count, reinterpret_cast<uintptr_t>(second.data()));
  cnncomp::Program::recording() = nullptr;
  program.bind(0, 1, 0, 0);
  program.bind(1, 0, 0, 0);
  program.bind(1, 1, 1, 0);
  same_everywhere("program count=" + std::to_string(count), count, false, [&](char* to, int) {
    const Buffer<uint8_t> middle(count);
    program.run(0, 2, {reinterpret_cast<uintptr_t>(middle.data()), reinterpret_cast<uintptr_t>(to)});
  });
}

const Registration all("program", program);

}  // namespace
}  // namespace check
