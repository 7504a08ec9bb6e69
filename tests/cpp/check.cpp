// The driver: `check after|before|heap ROUNDS [SEED] [KERNEL]` runs the checks on random shapes.
#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cpu/cpuid.h"
#include "cpu/parallel.h"

namespace check {

Guard guard = Guard::heap;

Memory::Memory(size_t bytes) : size_(bytes) {
  if (guard == Guard::heap) {
    data_ = base_ = static_cast<char*>(std::malloc(bytes));
    if (data_ == nullptr && bytes > 0) throw std::bad_alloc();
    return;
  }
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inside = (bytes + page - 1) / page * page;
  mapped_ = inside + 2 * page;
  void* map = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(map);
  if (inside > 0 && mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  data_ = base_ + page + (guard == Guard::after ? inside - bytes : 0);
}

Memory::Memory(Memory&& other) noexcept
    : size_(other.size_),
      mapped_(std::exchange(other.mapped_, 0)),
      data_(other.data_),
      base_(std::exchange(other.base_, nullptr)) {}

Memory::~Memory() {
  if (mapped_ == 0) {
    std::free(base_);
  } else {
    munmap(base_, mapped_);
  }
}

ConvSizes::ConvSizes(Random& random) {
  do {
    n = random.whole(1, 3);
    h = random.whole(1, 18);
    w = random.whole(1, 18);
    r = random.one_of<int64_t>({1, 1, 2, 3, 3, 5});
    s = random.chance(0.7) ? r : random.whole(1, 4);
    stride_h = random.whole(1, 3);
    stride_w = random.chance(0.7) ? stride_h : random.whole(1, 9);
    pad_h = random.whole(0, 2);
    pad_w = random.chance(0.7) ? pad_h : random.whole(0, 3);
    dil_h = random.one_of<int64_t>({1, 1, 2});
    dil_w = random.chance(0.7) ? dil_h : 1;
    p = (h + 2 * pad_h - dil_h * (r - 1) - 1);
    q = (w + 2 * pad_w - dil_w * (s - 1) - 1);
  } while (p < 0 || q < 0);
  p = p / stride_h + 1;
  q = q / stride_w + 1;
  groups = random.one_of<int64_t>({1, 1, 2, 3});
  c = groups * random.whole(1, random.chance(0.2) ? 3 : 40);
  k = groups * random.whole(1, 70);
}

std::string ConvSizes::text() const {
  const std::pair<const char*, int64_t> values[] = {
      {"n", n}, {"c", c}, {"h", h}, {"w", w}, {"k", k}, {"r", r}, {"s", s}, {"stride_h", stride_h}, {"stride_w", stride_w},
      {"pad_h", pad_h}, {"pad_w", pad_w}, {"dil_h", dil_h}, {"dil_w", dil_w}, {"groups", groups}};
  std::string out;
  for (const auto& [name, value] : values) out += std::string(" ") + name + "=" + std::to_string(value);
  return out;
}

namespace {

void equal(const std::string& what, const char* got, const char* expected, int64_t bytes, bool floats) {
  if (!floats) {
    for (int64_t i = 0; i < bytes; i++) {
      if (got[i] != expected[i]) throw std::runtime_error(what + ": byte " + std::to_string(i) + " differs");
    }
    return;
  }
  for (int64_t i = 0; i < bytes / 4; i++) {
    float a, b;
    std::memcpy(&a, got + 4 * i, 4);
    std::memcpy(&b, expected + 4 * i, 4);
    if (a != b && !(std::fabs(a - b) <= 1e-4f * (1 + std::fabs(b)))) {  // infinities are equal, too
      throw std::runtime_error(what + ": float " + std::to_string(i) + ": got " + std::to_string(a) + ", expected " +
                               std::to_string(b));
    }
  }
}

Buffer<char> result(int64_t bytes, const std::function<void(char*, int)>& run, int threads) {
  Buffer<char> out(bytes);
  if (bytes > 0) std::memset(out.data(), 0xcd, static_cast<size_t>(bytes));
  run(out.data(), threads);
  return out;
}

void at_once(const std::string& what, const Buffer<char>& expected, const std::function<void(char*, int)>& run) {
  std::exception_ptr errors[2];
  std::vector<std::thread> callers;
  for (auto& error : errors) {
    callers.emplace_back([&] {
      try {
        const Buffer<char> out = result(expected.size(), run, 2);
        equal(what + ", two callers", out.data(), expected.data(), expected.size(), false);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

void same_everywhere(const std::string& what, int64_t out_bytes, bool floats,
                     const std::function<void(char*, int)>& run) {
  cnncomp::set_isa("baseline");
  const Buffer<char> expected = result(out_bytes, run, 1);
  for (const cnncomp::Isa isa : cnncomp::isa_available()) {
    const std::string name = cnncomp::isa_name(isa);
    cnncomp::set_isa(name);
    const Buffer<char> one = result(out_bytes, run, 1), three = result(out_bytes, run, 3);
    equal(what + ", " + name, one.data(), expected.data(), out_bytes, floats);
    equal(what + ", " + name + ", threads", three.data(), one.data(), out_bytes, false);
    if (isa == cnncomp::isa_available().back()) at_once(what + ", " + name, one, run);
  }
}

namespace {

std::vector<std::pair<std::string, Check>>& checks() {
  static std::vector<std::pair<std::string, Check>> list;
  return list;
}

thread_local bool inside = false;
thread_local int number = 0;  // of the thread in its team

// In place of the OpenMP runtime, which ThreadSanitizer does not understand: as many threads as asked for.
void parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> pool;
  for (unsigned i = 1; i < threads; i++) {
    pool.emplace_back([=] {
      inside = true;
      number = static_cast<int>(i);
      work(data);
    });
  }
  inside = true;
  work(data);
  inside = false;
  for (auto& thread : pool) thread.join();
}

int in_parallel() { return inside; }
int thread_num() { return number; }

// Shows that guard pages work: run only when it is named.
void overrun(Random&) {
  const Buffer<char> buffer(10);
  *const_cast<volatile char*>(guard == Guard::after ? buffer.data() + 10 : buffer.data() - 1) = 1;
}

char running[200] = "no check yet";

void touched_guard(int signal) {
  constexpr char kText[] = "failed: memory outside of a buffer was touched: ";
  // Only what is safe in a signal handler.
  if (write(STDERR_FILENO, kText, sizeof(kText) - 1) < 0 || write(STDERR_FILENO, running, std::strlen(running)) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0) {
    _exit(signal);
  }
  _exit(1);
}

int run(int argc, char** argv) {
  const std::string where = argc > 1 ? argv[1] : "";
  if (argc < 3 || (where != "after" && where != "before" && where != "heap")) {
    std::fprintf(stderr, "usage: %s after|before|heap ROUNDS [SEED] [KERNEL]\n", argv[0]);
    return 2;
  }
  guard = where == "after" ? Guard::after : where == "before" ? Guard::before : Guard::heap;
  const int64_t rounds = std::atoll(argv[2]), seed = argc > 3 ? std::atoll(argv[3]) : 0;
  const std::string only = argc > 4 ? argv[4] : "";
  cnncomp::set_openmp(reinterpret_cast<uintptr_t>(&parallel), reinterpret_cast<uintptr_t>(&in_parallel),
                       reinterpret_cast<uintptr_t>(&thread_num));
  if (guard != Guard::heap) {  // there, the sanitizers have a handler of their own
    std::signal(SIGSEGV, touched_guard);
    std::signal(SIGBUS, touched_guard);
  }
  int64_t done = 0;
  if (only == "overrun") checks() = {{only, overrun}};
  for (const auto& [kernel, check] : checks()) {
    if (!only.empty() && kernel != only) continue;
    for (int64_t i = 0; i < rounds; i++, done++) {
      std::snprintf(running, sizeof(running), "%s, seed %lld", kernel.c_str(), static_cast<long long>(seed + i));
      Random random(static_cast<uint64_t>(seed + i));
      check(random);
    }
  }
  std::printf("%lld checks passed (%s)\n", static_cast<long long>(done), where.c_str());
  return done > 0 ? 0 : 2;
}

}  // namespace

Registration::Registration(const char* kernel, Check check) { checks().emplace_back(kernel, check); }

}  // namespace check

int main(int argc, char** argv) {
  try {
    return check::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s (%s)\n", error.what(), check::running);
    return 1;
  }
}
