// Products with matrices in panels (see decoder.h).
#pragma once

#include "common/parallel.h"
#include "common/vector.h"
#include "decoder/decoder.h"

namespace oarlock {
namespace OARLOCK_ISA {

// C = scale A W + bias, or C += scale A W: A [rows, in] with rows `lda` floats apart, C [rows, out] with `ldc`.
struct PanelProduct {
  int64_t rows, in, out;
  const float* a;
  int64_t lda;
  const float* panels;
  const float* bias;  // may be null
  bool add;
  float* c;
  int64_t ldc;
};

#if defined(OARLOCK_ISA_AVX512)
constexpr int64_t kTileRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int64_t kTileRows = 6;  // 12 of 16
#endif
constexpr int64_t kAhead = 1024;  // floats to prefetch: with few rows, reading memory takes all the time
constexpr int64_t kTileVectors = 2, kTileColumns = kTileVectors * kLanes;

// Rows [0, R) of `a` with kTileColumns columns of a panel; sums over `in` are in order, for every R.
template <int R>
static void panel_tile(const PanelProduct& p, const float* a, const float* panel, int64_t column, float* c) {
  Vector sums[R][kTileVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = Vector{};
  for (int64_t k = 0; k < p.in; ++k) {
    __builtin_prefetch(panel + k * kPanel + kAhead);
    if (kTileColumns * 4 > 64) __builtin_prefetch(panel + k * kPanel + kAhead + 16);
    const Vector first = load(panel + k * kPanel), second = load(panel + k * kPanel + kLanes);
    for (int r = 0; r < R; ++r) {
      const Vector value = splat(a[r * p.lda + k]);
      sums[r][0] += value * first;
      sums[r][1] += value * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t at = column + v * kLanes, left = p.out - at;
      if (left <= 0) break;
      float* to = c + r * p.ldc + at;
      if (left >= kLanes) {
        Vector value = sums[r][v];
        if (p.bias) value += load(p.bias + at);
        if (p.add) value += load(to);
        store(to, value);
      } else {
        for (int64_t i = 0; i < left; ++i)
          to[i] = sums[r][v][i] + (p.bias ? p.bias[at + i] : 0.0f) + (p.add ? to[i] : 0.0f);
      }
    }
  }
}

template <int R>
static void panel_tile_of(int64_t rows, const PanelProduct& p, const float* a, const float* panel, int64_t column,
                          float* c) {
  if (rows == R) return panel_tile<R>(p, a, panel, column, c);
  if constexpr (R > 1) panel_tile_of<R - 1>(rows, p, a, panel, column, c);
}

static void panel_product(const PanelProduct& p) {
  const int64_t num_panels = (p.out + kPanel - 1) / kPanel, num_tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t grain = 2048 / (p.in * (1 + p.rows / 8)) + 1;  // panels that are worth a thread
  parallel_for(num_panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t row = p.rows * t / num_tiles, rows = p.rows * (t + 1) / num_tiles - row;
        for (int64_t s = 0; s < kPanel; s += kTileColumns) {
          const float* panel = p.panels + n * p.in * kPanel + s;
          panel_tile_of<kTileRows>(rows, p, p.a + row * p.lda, panel, n * kPanel + s, p.c + row * p.ldc);
        }
      }
    }
  });
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock
