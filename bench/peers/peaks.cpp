// What one core can do at most, as JSON: multiply-adds per second by kind, and read bandwidth per level of the memory.
// Compiled with -O3 -march=native by peaks.py.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The most that `work(n)` (n rounds) does per second, of several tries, where a round does `per_round`.
template <class Work>
double best_rate(double per_round, Work work) {
  int64_t rounds = 1;
  double best = 0;
  for (int tries = 0; tries < 15;) {
    const double start = now();
    work(rounds);
    const double seconds = now() - start;
    if (seconds < 0.02) {
      rounds *= 2;
      continue;
    }
    if (const double rate = per_round * rounds / seconds; rate > best) best = rate;
    ++tries;
  }
  return best;
}

// Enough independent sums to hide the latency; the empty asm keeps each in a register and stops the compiler from combining them.
constexpr int kSums = 12;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
#if defined(__x86_64__)
#define KEEP(v) asm volatile("" : "+x"(v))
#if defined(__AVX512F__)
#undef KEEP
#define KEEP(v) asm volatile("" : "+v"(v))
#endif
#elif defined(__aarch64__)
#define KEEP(v) asm volatile("" : "+w"(v))
#else
#define KEEP(v) asm volatile("" : "+m"(v))
#endif

using Floats [[gnu::vector_size(kBytes)]] = float;

double fma_fp32() {
  return best_rate(kSums * (kBytes / 4), [](int64_t rounds) {
    Floats sums[kSums] = {}, a = Floats{} + 1.0f, b = Floats{} + 1e-9f;
    KEEP(b);
    for (int64_t i = 0; i < rounds; ++i)
      for (auto& sum : sums) {
        KEEP(a);  // or the product is taken once
        sum += a * b;
        KEEP(sum);
      }
  });
}

template <class V, class Step>
double integers(int per_step, V ones, Step step) {
  return best_rate(kSums * per_step, [=](int64_t rounds) {
    V sums[kSums], a = ones, b = ones;
    for (auto& sum : sums) sum = ones;
    KEEP(b);
    for (int64_t i = 0; i < rounds; ++i)
      for (auto& sum : sums) {
        KEEP(a);
        sum = step(sum, a, b);
        KEEP(sum);
      }
  });
}

/// Bytes per second read, again and again, from `bytes` of memory.
double read_bandwidth(size_t bytes) {
  const size_t n = bytes / kBytes / 8 * 8;
  void* raw = std::aligned_alloc(4096, (n * kBytes + 4095) / 4096 * 4096);
  if (raw == nullptr) return 0;
  std::memset(raw, 1, n * kBytes);
  const Floats* data = static_cast<const Floats*>(raw);
  const double rate = best_rate(double(n) * kBytes, [=](int64_t rounds) {
    for (int64_t i = 0; i < rounds; ++i)
      for (size_t j = 0; j < n; j += 8)
        for (size_t k = 0; k < 8; ++k) {
          Floats v = data[j + k];
          KEEP(v);
        }
  });
  std::free(raw);
  return rate;
}

/// Bytes per second written, again and again, to `bytes` of memory.
double write_bandwidth(size_t bytes) {
  const size_t n = bytes / kBytes / 8 * 8;
  void* raw = std::aligned_alloc(4096, (n * kBytes + 4095) / 4096 * 4096);
  if (raw == nullptr) return 0;
  std::memset(raw, 1, n * kBytes);
  Floats* const data = static_cast<Floats*>(raw);
  const double rate = best_rate(double(n) * kBytes, [=](int64_t rounds) {
    Floats v = Floats{} + 1.0f;
    for (int64_t i = 0; i < rounds; ++i)
      for (size_t j = 0; j < n; j += 8)
        for (size_t k = 0; k < 8; ++k) {
          KEEP(v);
          data[j + k] = v;
        }
    asm volatile("" ::: "memory");
  });
  std::free(raw);
  return rate;
}

size_t cache(int level, size_t otherwise) {
  long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  bytes = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? size_t(bytes) : otherwise;
}

}  // namespace

int main() {
  const size_t l1 = cache(1, 32 << 10), l2 = cache(2, 512 << 10), l3 = cache(3, 16 << 20);
  std::printf("{\"fma_fp32_gmacs\": %.2f", fma_fp32() / 1e9);
#if defined(__AVX2__)
  const auto maddwd = [](__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); };
  double int16 = integers(16, _mm256_set1_epi16(1), maddwd);
#if defined(__AVX512BW__)
  const auto wide = [](__m512i sum, __m512i a, __m512i b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); };
  if (const double rate = integers(32, _mm512_set1_epi16(1), wide); rate > int16) int16 = rate;
#endif
  std::printf(", \"vpmaddwd_gmacs\": %.2f", int16 / 1e9);
#endif
#if defined(__AVX512VNNI__)
  const auto dp = [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); };
  std::printf(", \"vpdpbusd_gmacs\": %.2f", integers(64, _mm512_set1_epi8(1), dp) / 1e9);
#elif defined(__AVXVNNI__)
  const auto dp = [](__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); };
  std::printf(", \"vpdpbusd_gmacs\": %.2f", integers(32, _mm256_set1_epi8(1), dp) / 1e9);
#endif
  const size_t far = 4 * l3 > (256u << 20) ? 4 * l3 : (256u << 20);
  const size_t in_l3 = l3 / 8 > 2 * l2 ? l3 / 8 : 2 * l2;
  std::printf(", \"l1_gbs\": %.2f, \"l2_gbs\": %.2f, \"l3_gbs\": %.2f, \"dram_gbs\": %.2f", read_bandwidth(l1 / 2) / 1e9,
              read_bandwidth(l2 / 2) / 1e9, read_bandwidth(in_l3) / 1e9, read_bandwidth(far) / 1e9);
  std::printf(", \"l2_write_gbs\": %.2f, \"l3_write_gbs\": %.2f}\n", write_bandwidth(l2 / 2) / 1e9, write_bandwidth(in_l3) / 1e9);
}
