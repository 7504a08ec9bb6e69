// Kernel calls that are noted once and repeated without Python.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace cnncomp {

// How many floats a channel of a kernel's kOperand-th address, counted from 0, lies behind the one before it; 0: the channels
// follow each other without a gap. For kernels whose images may lie in memory with room after each channel.
template <int kOperand>
struct Pitch {
  int64_t floats = 0;
};

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
  // Whether the kernel of a step has a Pitch for an operand, and what it is from now on.
  bool takes_pitch(int64_t step, int64_t which) const { return steps_.at(step).pitch.at(which) != kNoPitch; }
  void set_pitch(int64_t step, int64_t which, int64_t floats);
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
    (note_address(step, args), ...);
    step.slot.assign(step.address.size(), kNoSlot);
    step.pitch.assign(step.address.size(), kNoPitch);
    (note_pitch(step, args), ...);
    step.call = [kernel, values = std::make_tuple(args...)](const uintptr_t* address, const int64_t* pitch) {
      call(kernel, values, address, pitch, std::index_sequence_for<A...>());
    };
    steps_.push_back(std::move(step));
  }

 private:
  static constexpr int32_t kNoSlot = -1;
  static constexpr int64_t kNoPitch = -1;
  struct Step {
    std::vector<uintptr_t> address;  // of each operand, or its offset in a slot
    std::vector<int32_t> slot;
    std::vector<int64_t> pitch;  // of each operand
    std::function<void(const uintptr_t*, const int64_t*)> call;
    void (*kernel)() = nullptr;
    bool leaves = false;
  };

  template <class T>
  static void note_address(Step& step, const T& value) {
    if constexpr (std::is_same_v<T, uintptr_t>) step.address.push_back(value);
  }
  template <class T>
  static void note_pitch(Step&, const T&) {}
  template <int kOperand>
  static void note_pitch(Step& step, const Pitch<kOperand>& pitch) {
    step.pitch.at(kOperand) = pitch.floats;
  }

  // How many of the first `count` types are addresses.
  template <class... A>
  static constexpr size_t rank(size_t count) {
    const bool is_address[] = {std::is_same_v<A, uintptr_t>...};
    size_t found = 0;
    for (size_t i = 0; i < count; i++) found += is_address[i];
    return found;
  }
  template <class... A, size_t... I>
  static void call(void (*kernel)(A...), const std::tuple<A...>& values, const uintptr_t* address, const int64_t* pitch,
                   std::index_sequence<I...>) {
    kernel(operand<rank<A...>(I)>(std::get<I>(values), address, pitch)...);
  }
  template <size_t kRank, class T>
  static T operand(const T& value, const uintptr_t* address, const int64_t*) {
    if constexpr (std::is_same_v<T, uintptr_t>) {
      return address[kRank];
    } else {
      return value;
    }
  }
  template <size_t kRank, int kOperand>
  static Pitch<kOperand> operand(const Pitch<kOperand>&, const uintptr_t*, const int64_t* pitch) {
    return {pitch[kOperand]};
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
