// Attention of new tokens to the keys and values of their own sequence, see decoder.h.
#pragma once

#include <cmath>

#include "common/exp.h"
#include "common/parallel.h"
#include "decoder/decoder.h"

namespace oarlock {
namespace OARLOCK_ISA {

constexpr int64_t kQueries = 4;                          // per tile, so that keys and values are read once for all of them
constexpr int64_t kKeyVectors = kKeyBlock / kLanes;      // per block of keys
constexpr int64_t kValueVectors = 4;                     // vectors of output columns at a time
constexpr int kBlocks = kKeyVectors == 1 ? 4 : 1;        // of keys at a time, as many as registers can hold sums for
static_assert(kKeyBlock % kLanes == 0, "a block of keys is a number of whole vectors");

OARLOCK_INLINE int64_t padded(int64_t dim) { return (dim + kKeyBlock - 1) / kKeyBlock * kKeyBlock; }

// Queries of one key head. Query i attends to the keys [first[i], keys[i]) of its sequence; neither bound decreases with i.
struct AttentionTile {
  int64_t dim, count;
  const float* query[kQueries];
  int64_t first[kQueries], keys[kQueries];
  const float *key_blocks, *values;
  float scale, cap;  // the cap of scores, 0 for none
  float* scores[kQueries];  // [capacity]
  float* output[kQueries];  // [dim]
};

// Scores of Q queries for B blocks of keys. The order of the sum over dim is the same for all Q and B.
template <int Q, int B>
static void key_tile(const AttentionTile& tile, int64_t first_query, int64_t block) {
  Vector sums[Q][B][kKeyVectors];
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < B; ++b)
      for (int v = 0; v < kKeyVectors; ++v) sums[q][b][v] = Vector{};
  const int64_t size = tile.dim * kKeyBlock;
  const float* keys = tile.key_blocks + block * size;
  for (int64_t d = 0; d < tile.dim; ++d)
    for (int b = 0; b < B; ++b)
      for (int v = 0; v < kKeyVectors; ++v) {
        const Vector key = load(keys + b * size + d * kKeyBlock + v * kLanes);
        for (int q = 0; q < Q; ++q) sums[q][b][v] += splat(tile.query[first_query + q][d]) * key;
      }
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < B; ++b)
      for (int v = 0; v < kKeyVectors; ++v)
        store(tile.scores[first_query + q] + (block + b) * kKeyBlock + v * kLanes, sums[q][b][v] * tile.scale);
}

template <int Q>
static void keys_of(const AttentionTile& tile, int64_t first_query) {
  const int64_t blocks = (tile.keys[first_query + Q - 1] + kKeyBlock - 1) / kKeyBlock;  // the last query attends to the most keys
  int64_t block = tile.first[first_query] / kKeyBlock;  // the window of the first query begins first
  for (; block + kBlocks <= blocks; block += kBlocks) key_tile<Q, kBlocks>(tile, first_query, block);
  for (; block < blocks; ++block) key_tile<Q, 1>(tile, first_query, block);
}

// cap * tanh(x / cap), with tanh(u) = 1 - 2 / (1 + exp(2 u)).
OARLOCK_INLINE void soft_cap(float* x, int64_t count, float cap) {
  for_columns(count, [&](auto unit, int64_t i) {
    unit.store(x + i, cap - 2.0f * cap / (1.0f + exponential(unit.load(x + i) * (2.0f / cap))));
  });
}

// Turns scores into weights that are not yet divided by their sum, which it returns.
OARLOCK_INLINE float exponentials(float* scores, int64_t count) {
  float largest = scores[0];
  for (int64_t i = 1; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  Sum total;
  for_columns(count, [&](auto unit, int64_t i) {
    const auto value = exponential(unit.load(scores + i) - largest);
    unit.store(scores + i, value);
    total.add(value);
  });
  return total.total();
}

// Outputs of Q queries, V vectors of columns from `column` on. Values are added key by key, for every Q and V.
template <int Q, int V>
static void value_tile(const AttentionTile& tile, int64_t first_query, int64_t column, const float* divisors) {
  Vector sums[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) sums[q][v] = Vector{};
  const int64_t width = padded(tile.dim);
  const float* values = tile.values + column;
  int64_t key = tile.first[first_query];
  for (; key < tile.keys[first_query]; ++key)
    for (int v = 0; v < V; ++v) {
      const Vector value = load(values + key * width + v * kLanes);
      for (int q = 0; q < Q; ++q) sums[q][v] += splat(tile.scores[first_query + q][key]) * value;
    }
  for (int q = 1; q < Q; ++q)  // later queries attend to a few more keys
    for (int64_t more = key; more < tile.keys[first_query + q]; ++more)
      for (int v = 0; v < V; ++v)
        sums[q][v] += splat(tile.scores[first_query + q][more]) * load(values + more * width + v * kLanes);
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) {
      const Vector result = sums[q][v] / divisors[first_query + q];
      const int64_t at = column + v * kLanes;
      float* to = tile.output[first_query + q] + at;
      if (at + kLanes <= tile.dim) {
        store(to, result);
      } else {
        for (int64_t i = 0; at + i < tile.dim; ++i) to[i] = result[i];
      }
    }
}

template <int Q>
static void values_of(const AttentionTile& tile, int64_t first_query, const float* divisors) {
  int64_t column = 0;
  for (; column + kValueVectors * kLanes <= tile.dim; column += kValueVectors * kLanes)
    value_tile<Q, kValueVectors>(tile, first_query, column, divisors);
  for (; column < tile.dim; column += kLanes) value_tile<Q, 1>(tile, first_query, column, divisors);
}

// Computes a tile, whose queries are in the order of their positions.
static void attend(const AttentionTile& tile) {
  float divisors[kQueries];
  if (tile.count == kQueries) {
    keys_of<kQueries>(tile, 0);
  } else {
    for (int64_t q = 0; q < tile.count; ++q) keys_of<1>(tile, q);
  }
  for (int64_t q = 0; q < tile.count; ++q) {
    const int64_t first = tile.first[q], count = tile.keys[q] - first;
    if (tile.cap > 0) soft_cap(tile.scores[q] + first, count, tile.cap);
    divisors[q] = exponentials(tile.scores[q] + first, count);
    // Keys before the window of this query, which an earlier query of the tile attends to.
    for (int64_t key = tile.first[0]; key < first; ++key) tile.scores[q][key] = 0.0f;
  }
  if (tile.count == kQueries) {
    values_of<kQueries>(tile, 0, divisors);
  } else {
    for (int64_t q = 0; q < tile.count; ++q) values_of<1>(tile, q, divisors);
  }
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock
