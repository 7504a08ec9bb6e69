// What the checks of the C++ core share: buffers between guard pages, random shapes, and the comparison of all instruction sets.
//
// A kernel's check is one file, check_<kernel>.cpp, that ends with a Registration; nothing else has to know of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

// Where the page that must not be touched lies: right after each buffer, right before, or nowhere: then the buffer is on the
// heap, exactly as long as asked for, where AddressSanitizer watches it.
enum class Guard { after, before, heap };
extern Guard guard;

// Memory of `bytes`; see Guard. Throws std::bad_alloc.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0, mapped_ = 0;
  char *data_ = nullptr, *base_ = nullptr;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(static_cast<size_t>(count) * sizeof(T)), count_(count) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) {
    if (!values.empty()) std::memcpy(memory_.data(), values.data(), memory_.size());
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  int64_t size() const { return count_; }

 private:
  Memory memory_;
  int64_t count_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  // In [low, high].
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[whole(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // Floats in [-1, 1], or any 8-bit values.
  template <class T>
  std::vector<T> many(int64_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    for (T& v : out) {
      if constexpr (std::is_floating_point_v<T>) {
        v = real(-1, 1);
      } else {
        v = static_cast<T>(whole(0, 255));
      }
    }
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

// int8 weights, of which all are large, few, or none: which kernels run depends on whether two products of bytes leave 16 bits.
class RandomWeight {
 public:
  explicit RandomWeight(Random& random) : random_(random), large_(random.one_of({1.0, 0.03, 0.0})) {}
  int8_t operator()() {
    const auto any = static_cast<int8_t>(random_.one_of<int64_t>({-127, 127, random_.whole(-127, 127)}));
    return random_.chance(large_) ? any : static_cast<int8_t>(any / 4);
  }

 private:
  Random& random_;
  double large_;
};

// The sizes of a random convolution that has an output; `groups` divides c and k.
struct ConvSizes {
  int64_t n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, p, q;
  explicit ConvSizes(Random& random);
  std::string text() const;
};

// Calls `run(out, threads)` on every instruction set that this CPU has, with one and with three threads, and at last from two
// threads at once. All must give the same bytes; with `floats`, instruction sets may differ by rounding, and only the
// numbers of threads must give the same bytes. Throws std::runtime_error, with `what`.
void same_everywhere(const std::string& what, int64_t out_bytes, bool floats,
                     const std::function<void(char* out, int threads)>& run);

// Rows of an output with gaps between them, and the copy of it that is to be compared: gaps may hold anything.
class Gapped {
 public:
  Gapped(int64_t rows, int64_t length, int64_t pitch) : rows_(rows), length_(length), pitch_(pitch), memory_(rows * pitch) {}
  float* data() const { return memory_.data(); }
  void copy(char* to) const {
    for (int64_t i = 0; i < rows_; i++) std::memcpy(to + i * length_ * 4, memory_.data() + i * pitch_, length_ * 4);
  }

 private:
  int64_t rows_, length_, pitch_;
  Buffer<float> memory_;
};

using Check = void (*)(Random&);
struct Registration {
  Registration(const char* kernel, Check check);
};

}  // namespace check
