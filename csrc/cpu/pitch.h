// Channels of images with room behind them. Not for files compiled per instruction set, nor for those that are compiled without
// exceptions, as the tests' ARM program is.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cnncomp {

// Floats from a channel of `pixels` to the next one; 0 says that there is no gap. Throws std::invalid_argument, with the operator's
// name in front, where channels would overlap.
inline int64_t checked_pitch(const char* name, int64_t pitch, int64_t pixels) {
  if (pitch != 0 && pitch < pixels) {
    throw std::invalid_argument(std::string(name) + ": a pitch of " + std::to_string(pitch) + " for channels of " +
                                std::to_string(pixels) + " floats");
  }
  return pitch == 0 ? pixels : pitch;
}

inline void check_same_pitch(const char* name, int64_t residual, int64_t out) {
  if (residual != out) throw std::invalid_argument(std::string(name) + ": a residual and an output of different pitches");
}

}  // namespace cnncomp
