// What the two passes of attention share: the size of tiles, what each query sees, and where its tensors are.
// Tiles are kTile queries by kTile keys; a worker takes a block of tiles that use what was fetched into the cache for
// one of them.
#pragma once

#include "attention/attention_cpu.h"
#include "attention/tiles.h"

namespace oarlock {

constexpr int64_t kTile = 64;
constexpr int64_t kBlock = 4;       // tiles
constexpr int64_t kAlignment = 16;  // of a workspace, in floats

static int64_t tiles(int64_t tokens) { return (tokens + kTile - 1) / kTile; }
static int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }  // to vectors of every instruction set

namespace OARLOCK_ISA {

// A panel's rows lie within the vector in which causality's edge is, so that what a product reads has been written.
static_assert(kLanes % kPanel == 0 && kTile % kLanes == 0, "panels and vectors have to nest in a tile");
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f, kInfinity = __builtin_inff();
constexpr float kHidden = -1e30f;
constexpr float kLowest = 2 * kHidden;  // a row's largest score before any is known: finite, to be subtracted from

OARLOCK_INLINE float* aligned(float* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(float); }

// How much of a tile of the scores is seen.
enum class Seen { kNone, kSome, kAll };

struct Problem : AttentionShape {
  int64_t offset, group, width;  // places of queries, query heads of a key head, head_dim in whole vectors

  explicit Problem(const AttentionShape& shape)
      : AttentionShape(shape), offset(key_length - query_length), group(num_heads / num_key_value_heads),
        width(padded(head_dim)) {}

  int64_t rows(int64_t q) const { return smaller(kTile, query_length - q); }
  int64_t keys(int64_t k) const { return smaller(kTile, key_length - k); }
  int64_t query_stride() const { return num_heads * head_dim; }
  int64_t key_stride() const { return num_key_value_heads * head_dim; }
  int64_t query_at(int64_t b, int64_t i, int64_t h) const {
    return ((b * query_length + i) * num_heads + h) * head_dim;
  }
  int64_t key_at(int64_t b, int64_t j, int64_t h) const {
    return ((b * key_length + j) * num_key_value_heads + h) * head_dim;
  }
  const float* bias_at(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return bias + ((b * bias_heads + (bias_heads > 1 ? h : 0)) * query_length + q) * key_length + k;
  }

  // Of the tile from query q and key k, by causality and ends.
  Seen seen(int64_t b, int64_t q, int64_t k) const {
    const int64_t first = q + offset, last = first + rows(q) - 1;
    if (causal && k > last) return Seen::kNone;
    bool all = !causal || k + keys(k) - 1 <= first;
    if (ends) {
      int64_t least = INT64_MAX, most = 0;
      for (int64_t j = 0; j < keys(k); ++j) {
        const int64_t end = ends[b * key_length + k + j];
        least = smaller(least, end);
        most = larger(most, end);
      }
      if (most <= first) return Seen::kNone;
      all = all && least > last;
    }
    return all ? Seen::kAll : Seen::kSome;
  }

  // By bias; kAll where it is 0.
  Seen unbiased(int64_t b, int64_t h, int64_t q, int64_t k) const {
    if (!bias) return Seen::kAll;
    bool hidden = true, zero = true;
    for (int64_t i = 0; i < rows(q); ++i) {
      const float* row = bias_at(b, h, q + i, k);
      for (int64_t j = 0; j < keys(k); ++j) {
        hidden &= row[j] < kHidden;
        zero &= row[j] == 0;
      }
    }
    return hidden ? Seen::kNone : zero ? Seen::kAll : Seen::kSome;
  }

  // How many of the tile's keys query i sees by causality: the first so many.
  int64_t reach(int64_t i, int64_t k) const {
    return causal ? larger(0, smaller(i + offset - k + 1, keys(k))) : keys(k);
  }

  // The first of the tile's rows that sees key j by causality.
  int64_t first_row(int64_t j, int64_t q) const { return causal ? larger(0, smaller(j - offset - q, kTile)) : 0; }
};

}  // namespace OARLOCK_ISA
}  // namespace oarlock
