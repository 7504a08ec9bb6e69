#include "program.h"

#include <stdexcept>

namespace cnncomp {

Program*& Program::recording() {
  static thread_local Program* program = nullptr;
  return program;
}

void Program::truncate(int64_t size) {
  if (size < 0 || size > this->size()) throw std::out_of_range("Program: no such step");
  steps_.erase(steps_.begin() + size, steps_.end());
}

void Program::bind(int64_t step, int64_t which, int32_t slot, int64_t offset) {
  Step& s = steps_.at(step);
  if (slot < 0) throw std::out_of_range("Program: no such slot");
  s.slot.at(which) = slot;
  s.address.at(which) = static_cast<uintptr_t>(offset);
}

void Program::set_pitch(int64_t step, int64_t which, int64_t floats) {
  if (!takes_pitch(step, which)) throw std::invalid_argument("Program: an operand without a pitch");
  if (floats < 0) throw std::invalid_argument("Program: a pitch below 0");
  steps_[step].pitch[which] = floats;
}

void Program::leave(int64_t step) {
  if (step < 0 || step + 1 >= size()) throw std::out_of_range("Program: no step to leave work to");
  if (steps_[step].kernel != steps_[step + 1].kernel) throw std::invalid_argument("Program: steps of different kernels");
  steps_[step].leaves = true;
}

bool& Program::leaving() {
  static thread_local bool leaving = false;
  return leaving;
}

void Program::run(int64_t first, int64_t last, const std::vector<uintptr_t>& slots) const {
  if (first < 0 || last > size()) throw std::out_of_range("Program: no such step");
  constexpr size_t kMaxOperands = 16;
  uintptr_t address[kMaxOperands];
  for (int64_t i = first; i < last; i++) {
    const Step& s = steps_[i];
    if (s.address.size() > kMaxOperands) throw std::out_of_range("Program: too many operands");
    for (size_t j = 0; j < s.address.size(); j++) {
      address[j] = s.slot[j] == kNoSlot ? s.address[j] : slots.at(s.slot[j]) + s.address[j];
    }
    // The next step is there, so that nothing is left at the end.
    leaving() = s.leaves && i + 1 < last;
    s.call(address, s.pitch.data());
    leaving() = false;
  }
}

}  // namespace cnncomp
