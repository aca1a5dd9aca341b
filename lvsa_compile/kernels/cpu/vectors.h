// Widths, vectors and elements: what the rest of the kernel is written in.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 6;  // 12 of 16
#else
constexpr int kVectorBytes = 16, kRows = 8;  // 16 of 32 (NEON)
#endif
constexpr int64_t kLanes = kVectorBytes / 4;
constexpr int64_t kTileRows = 128;   // query rows that share one pass over the keys
constexpr int64_t kTileKeys = 256;   // keys scored before each softmax
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kStride = 272;     // of rows in a tile's buffers; no power of two, so that rows do not share cache sets
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kStride >= kMaxHeadDim && kStride >= kTileKeys);

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) { Vector v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if __has_builtin(__builtin_shufflevector)
#define LVSA_TRANSPOSES
// Rows and columns of kLanes vectors change places: interleaving those that lie half of them apart, once for each bit of a row's number.
inline void transpose(Vector* rows) {
  Vector other[kLanes], *from = rows, *to = other;
  for (int step = 1; step < kLanes; step *= 2, std::swap(from, to))
    for (int i = 0; i < kLanes / 2; ++i) {
      const Vector a = from[i], b = from[i + kLanes / 2];
#if defined(__AVX512F__)
      to[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      to[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      to[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      to[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      to[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
  if (from != rows) std::copy_n(from, kLanes, rows);
}
#endif

struct Range { int64_t start, end; };

struct BFloat16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { uint32_t bits = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
#ifdef __FLT16_MAX__
inline float to_float(_Float16 x) { return float(x); }
inline void from_float(float x, _Float16& out) { out = _Float16(x); }
#endif

}  // namespace
