// Kernel calls that are noted once and repeated without Python.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace cnncomp {

// A list of kernel calls. While it records, every kernel that Python calls on this thread is noted with its arguments.
// Afterwards each address among them is either left as it is or bound to a slot and an offset, and `run` repeats the calls
// with other memory in the slots.
class Program {
 public:
  static Program*& recording();  // of this thread; null for none

  int64_t size() const { return static_cast<int64_t>(steps_.size()); }
  void truncate(int64_t size);
  const std::vector<uintptr_t>& addresses(int64_t step) const { return steps_.at(step).address; }
  void bind(int64_t step, int64_t which, int32_t slot, int64_t offset);
  // Lets a step leave its work to the next one, which reads what it gives and nobody else does. Both are calls of one kernel,
  // that looks at leaving().
  void leave(int64_t step);
  // Whether the kernel that is called on this thread need only note its arguments, for the next call.
  static bool& leaving();
  // Steps [first, last). Safe on several threads at once.
  void run(int64_t first, int64_t last, const std::vector<uintptr_t>& slots) const;

  template <class... A>
  void add(void (*kernel)(A...), A... args) {
    Step step;
    step.kernel = reinterpret_cast<void (*)()>(kernel);
    ((std::is_same_v<A, uintptr_t> ? step.address.push_back(static_cast<uintptr_t>(args)) : void()), ...);
    step.slot.assign(step.address.size(), kNoSlot);
    step.call = [kernel, values = std::make_tuple(args...)](const uintptr_t* address) {
      call(kernel, values, address, std::index_sequence_for<A...>());
    };
    steps_.push_back(std::move(step));
  }

 private:
  static constexpr int32_t kNoSlot = -1;
  struct Step {
    std::vector<uintptr_t> address;  // of each operand, or its offset in a slot
    std::vector<int32_t> slot;
    std::function<void(const uintptr_t*)> call;
    void (*kernel)() = nullptr;
    bool leaves = false;
  };

  // How many of the first `count` types are addresses.
  template <class... A>
  static constexpr size_t rank(size_t count) {
    const bool is_address[] = {std::is_same_v<A, uintptr_t>...};
    size_t found = 0;
    for (size_t i = 0; i < count; i++) found += is_address[i];
    return found;
  }
  template <class... A, size_t... I>
  static void call(void (*kernel)(A...), const std::tuple<A...>& values, const uintptr_t* address,
                   std::index_sequence<I...>) {
    kernel(operand<A, rank<A...>(I)>(std::get<I>(values), address)...);
  }
  template <class T, size_t kRank>
  static T operand(const T& value, const uintptr_t* address) {
    if constexpr (std::is_same_v<T, uintptr_t>) {
      return address[kRank];
    } else {
      return value;
    }
  }

  std::vector<Step> steps_;
};

// The kernel, noted in the program that records on this thread, if any.
template <class... A>
auto recorded(void (*kernel)(A...)) {
  return [kernel](A... args) {
    if (Program* program = Program::recording()) program->add(kernel, args...);
    kernel(args...);
  };
}

}  // namespace cnncomp
