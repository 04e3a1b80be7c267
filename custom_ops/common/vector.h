// Floats in a register, as wide as the instruction set has them, and their way from and to memory in each type.
// Arithmetic is the compiler's: operators on Vector are element by element, and a * b + c becomes one FMA.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "common/dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define OARLOCK_INLINE static inline __attribute__((always_inline))
#define OARLOCK_MEMBER static __attribute__((always_inline))

namespace oarlock {
namespace OARLOCK_ISA {

#if defined(OARLOCK_ISA_AVX512)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;  // two SSE or NEON registers in the plain version
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// Vector{} + value would be an addition (it makes 0 of -0), in the way of the arithmetic in inner loops.
#if defined(OARLOCK_ISA_AVX512)
OARLOCK_INLINE Vector splat(float value) { return (Vector)_mm512_set1_ps(value); }
#elif defined(OARLOCK_ISA_AVX2)
OARLOCK_INLINE Vector splat(float value) { return (Vector)_mm256_set1_ps(value); }
#else
OARLOCK_INLINE Vector splat(float value) { return Vector{} + value; }
#endif

// ---- one element ----

OARLOCK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
OARLOCK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

OARLOCK_INLINE float load1(const float* p) { return *p; }
OARLOCK_INLINE float load1(const BFloat16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
OARLOCK_INLINE float load1(const Float16* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // The exponent's bias grows by 112: a product with 2^112, which is exact, and right for subnormal numbers too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

OARLOCK_INLINE void store1(float* p, float value) { *p = value; }
OARLOCK_INLINE void store1(BFloat16* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could make infinity of it
  p->bits = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
OARLOCK_INLINE void store1(Float16* p, float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x47800000) {  // 65536 and above
    half = 0x7c00;
  } else if (rest < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal half's bits, rounded
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
  } else {
    half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

// ---- kLanes elements, from any address ----

OARLOCK_INLINE Vector load(const float* p) {
  Vector value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
OARLOCK_INLINE void store(float* p, Vector value) { std::memcpy(p, &value, sizeof value); }

OARLOCK_INLINE Vector load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vector)(__builtin_convertvector(bits, Bits) << 16);
}
OARLOCK_INLINE void store(BFloat16* p, Vector value) {
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits is_nan = (Bits)(value != value);
  const HalfBits half = __builtin_convertvector((is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded), HalfBits);
  std::memcpy(p, &half, sizeof half);
}

OARLOCK_INLINE Vector load(const Float16* p) {
#if defined(OARLOCK_ISA_AVX512)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(OARLOCK_ISA_AVX2)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector value;
  for (int64_t i = 0; i < kLanes; ++i) value[i] = load1(p + i);
  return value;
#endif
}
OARLOCK_INLINE void store(Float16* p, Vector value) {
#if defined(OARLOCK_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(OARLOCK_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kLanes; ++i) store1(p + i, value[i]);
#endif
}

// Around the caches, for outputs that would not stay there anyway; p has to be aligned to the vector.
template <typename T>
OARLOCK_INLINE void stream(T* p, Vector value) {
  store(p, value);
}
#if defined(OARLOCK_ISA_AVX512)
OARLOCK_INLINE void stream(float* p, Vector value) { _mm512_stream_ps(p, (__m512)value); }
OARLOCK_INLINE void end_of_stream() { _mm_sfence(); }
#elif defined(OARLOCK_ISA_AVX2)
OARLOCK_INLINE void stream(float* p, Vector value) { _mm256_stream_ps(p, (__m256)value); }
OARLOCK_INLINE void end_of_stream() { _mm_sfence(); }
#else
OARLOCK_INLINE void end_of_stream() {}
#endif

// The sum of all lanes, always in the same order.
OARLOCK_INLINE float sum(Vector value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof value);
  for (int64_t width = kLanes / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// ---- a row: whole vectors, then what is left one by one, from one text ----

struct Wide {
  typedef Vector Value;
  template <typename T>
  OARLOCK_MEMBER Vector load(const T* p) { return ::oarlock::OARLOCK_ISA::load(p); }
  template <typename T>
  OARLOCK_MEMBER void store(T* p, Vector value) { ::oarlock::OARLOCK_ISA::store(p, value); }
  template <typename T>
  OARLOCK_MEMBER void stream(T* p, Vector value) { ::oarlock::OARLOCK_ISA::stream(p, value); }
};
struct One {
  typedef float Value;
  template <typename T>
  OARLOCK_MEMBER float load(const T* p) { return load1(p); }
  template <typename T>
  OARLOCK_MEMBER void store(T* p, float value) { store1(p, value); }
  template <typename T>
  OARLOCK_MEMBER void stream(T* p, float value) { store1(p, value); }
};

// body(unit, i) for all columns, where unit is Wide{} (columns i to i + kLanes - 1) or One{} (column i).
template <typename Body>
OARLOCK_INLINE void for_columns(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(Wide{}, i);
  for (; i < count; ++i) body(One{}, i);
}

// A sum over for_columns.
struct Sum {
  Vector wide = {};
  float one = 0;
  __attribute__((always_inline)) void add(Vector value) { wide += value; }
  __attribute__((always_inline)) void add(float value) { one += value; }
  __attribute__((always_inline)) float total() const { return sum(wide) + one; }
};

}  // namespace OARLOCK_ISA
}  // namespace oarlock
