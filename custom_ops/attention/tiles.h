// Products of tiles that lie in the cache, and ways to bring them there.
//
// Measured beside MKL's sgemm on tiles of 64 x 64 x 64 (AVX-512, one core): 165 to 169 GFLOP/s against 126 to 156, and
// here the half of a tile that causality hides can be left out.
#pragma once

#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

// Of the registers, kPanel x kUnroll vectors hold sums.
#if defined(OARLOCK_ISA_AVX512)
constexpr int64_t kPanel = 8, kUnroll = 2;
#elif defined(OARLOCK_ISA_AVX2)
constexpr int64_t kPanel = 4, kUnroll = 3;
#else
constexpr int64_t kPanel = 4, kUnroll = 1;
#endif
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

OARLOCK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
OARLOCK_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
OARLOCK_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
OARLOCK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// first, first + 1, ...
OARLOCK_INLINE Integers count_from(int64_t first) {
  Integers found;
  for (int64_t i = 0; i < kLanes; ++i) found[i] = int32_t(first + i);
  return found;
}

// The first `count` elements; the lanes after them are 0.
template <typename V, typename T>
OARLOCK_INLINE V load_some(const T* p, int64_t count) {
  V value{};
  if (count >= kLanes) std::memcpy(&value, p, sizeof value);
  else std::memcpy(&value, p, count * sizeof(T));
  return value;
}

// 2^x for x below 128; 0 below -126, NaN stays. A power of 2, as the factor log2(e) costs nothing where scores are
// scaled anyway. The polynomial's largest relative error is 9.2e-8 on [-.5, .5] (Lawson's algorithm).
OARLOCK_INLINE Vector power_of_2(Vector x) {
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, and leaves it in the low bits
  const Vector f = x - (shifted - 12582912.0f);
  Vector p = f * 0.0013264727f + 0.0096715126f;
  p = p * f + 0.055507337f;
  p = p * f + 0.24022242f;
  p = p * f + 0.69314698f;
  p = p * f + 1.0f;
  const Vector power = (Vector)(((Bits)shifted << 23) + 0x3f800000);
  return x < -126.0f ? Vector{} : p * power;
}

// What a product is added to: nothing, what is there, or that times a factor for each row.
enum class Start { kZero, kAdd, kScale };

template <int64_t kVectors, bool kDown>
OARLOCK_INLINE void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                  int64_t depth, Start start, const float* factors) {
  Vector sums[kPanel][kVectors];
  for (int64_t i = 0; i < kPanel; ++i) {
    const float factor = start == Start::kScale ? factors[i] : 1.0f;
    for (int64_t j = 0; j < kVectors; ++j)
      sums[i][j] = start == Start::kZero ? Vector{} : load(c + i * ldc + j * kLanes) * factor;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kPanel; ++i) {
      const float factor = kDown ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) sums[i][j] += factor * row[j];
    }
  }
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
}

// C = start + A B for kPanel rows. A [kPanel, depth] has its element (i, k) at a[i * lda + k], or at a[k * lda + i]
// where it lies kDown; B is [depth, columns], columns a multiple of kLanes.
template <bool kDown>
static __attribute__((noinline)) void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                               int64_t ldc, int64_t columns, int64_t depth, Start start,
                                               const float* factors = nullptr) {
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= columns; j += kUnroll * kLanes)
    product_block<kUnroll, kDown>(a, lda, b + j, ldb, c + j, ldc, depth, start, factors);
  if (kUnroll > 2 && j + 2 * kLanes <= columns) {
    product_block<2, kDown>(a, lda, b + j, ldb, c + j, ldc, depth, start, factors);
    j += 2 * kLanes;
  }
  for (; j < columns; j += kLanes) product_block<1, kDown>(a, lda, b + j, ldb, c + j, ldc, depth, start, factors);
}

// to [rows, width] = factor * from [rows, columns], filled up with 0.
static void fetch(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                  int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * stride;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(to + i * width + j, load(row + j) * factor);
    for (; j < width; j += kLanes)
      store(to + i * width + j, load_some<Vector>(row + j, larger(0, columns - j)) * factor);
  }
}

// kLanes x kLanes, by log2(kLanes) perfect shuffles of its rows.
OARLOCK_INLINE void transpose_square(Vector* square) {
  Integers low, high;  // of the lanes of two vectors in turn
  for (int64_t k = 0; k < kLanes; ++k) {
    low[k] = int32_t(k / 2 + k % 2 * kLanes);
    high[k] = low[k] + int32_t(kLanes / 2);
  }
#pragma GCC unroll 4
  for (int64_t round = 1; round < kLanes; round *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes / 2; ++k) {
      next[2 * k] = __builtin_shuffle(square[k], square[k + kLanes / 2], low);
      next[2 * k + 1] = __builtin_shuffle(square[k], square[k + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes; ++k) square[k] = next[k];
  }
}

// to [columns, width] = factor * from [rows, columns] transposed, filled up with 0; width is a multiple of kLanes.
static void fetch_down(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                       int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        square[k] = Vector{};
        if (i + k < rows) square[k] = load_some<Vector>(from + (i + k) * stride + j, columns - j) * factor;
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k)
        if (j + k < columns) store(to + (j + k) * width + i, square[k]);
    }
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock
