#include "decoder/decoder.h"

#include <cmath>

#include "common/exp.h"
#include "common/parallel.h"
#include "decoder/attention.h"
#include "decoder/panels.h"

namespace oarlock {
namespace OARLOCK_ISA {

struct Widths {
  int64_t q, kv, qkv, gate_up;
  explicit Widths(const DecoderSizes& s)
      : q(s.num_heads * s.head_dim), kv(s.num_key_value_heads * s.head_dim), qkv(q + 2 * kv), gate_up(2 * s.intermediate) {}
};

// Size of a head's keys, and of its values, in a KV cache.
OARLOCK_INLINE int64_t keys_size(const DecoderSizes& s, int64_t capacity) { return capacity * s.head_dim; }
OARLOCK_INLINE int64_t values_size(const DecoderSizes& s, int64_t capacity) { return capacity * padded(s.head_dim); }

struct Heads {  // the KV cache of one layer of a sequence
  float *keys, *values;
  Heads(const DecoderSizes& s, const DecoderRun& run, int64_t layer) {
    const int64_t k = keys_size(s, run.capacity), v = values_size(s, run.capacity);
    keys = run.cache + layer * s.num_key_value_heads * (k + v);
    values = keys + s.num_key_value_heads * k;
  }
};

static constexpr int64_t kGrain = 32 * 1024;  // values per thread, at least

// RMSNorm of `size` values; y may be x.
OARLOCK_INLINE void norm_row(const float* x, int64_t size, float epsilon, const float* weight, float* y) {
  Sum squares;
  for_columns(size, [&](auto unit, int64_t i) {
    const auto value = unit.load(x + i);
    squares.add(value * value);
  });
  const float factor = 1.0f / std::sqrt(squares.total() / float(size) + epsilon);
  for_columns(size, [&](auto unit, int64_t i) { unit.store(y + i, unit.load(x + i) * factor * unit.load(weight + i)); });
}

static void norm(const DecoderSizes& s, int64_t rows, const float* from, const float* weight, float* to) {
  for_rows(rows, s.hidden, kGrain, [&](int64_t row) {
    norm_row(from + row * s.hidden, s.hidden, s.epsilon, weight, to + row * s.hidden);
  });
}

// x += scale * norm(added), without a norm where `weight` is null; `added` is overwritten.
static void add_residual(const DecoderSizes& s, int64_t rows, float* added, const float* weight, float* x) {
  for_rows(rows, s.hidden, kGrain, [&](int64_t row) {
    float *from = added + row * s.hidden, *to = x + row * s.hidden;
    if (weight) norm_row(from, s.hidden, s.epsilon, weight, from);
    for_columns(s.hidden, [&](auto unit, int64_t i) {
      unit.store(to + i, unit.load(to + i) + unit.load(from + i) * s.residual_scale);
    });
  });
}

// C = X W or C += X W, for all tokens.
static void linear(const DecoderPass& p, const float* x, int64_t in, const float* panels, const float* bias, bool add,
                   float* c, int64_t out) {
  panel_product({p.num_tokens, in, out, x, in, panels, bias, add, c, out});
}

// C += X A B for the tokens that have an adapter, in the columns [column, column + out) of C.
static void add_lora(const DecoderPass& p, int64_t layer, DecoderTarget target, const float* x, int64_t in, float* low,
                     float* c, int64_t ldc, int64_t column, int64_t out) {
  for (int64_t i = 0; i < p.num_runs; ++i) {
    const DecoderRun& run = p.runs[i];
    if (!run.lora) continue;
    const DecoderLora lora = run.lora[layer * kTargets + target];
    if (!lora.a) continue;
    int64_t count = run.count;  // consecutive runs with the same adapter are multiplied together
    while (i + 1 < p.num_runs && p.runs[i + 1].lora == run.lora) count += p.runs[++i].count;
    panel_product({count, in, run.rank, x + run.begin * in, in, lora.a, nullptr, false, low, run.rank});
    float* to = c + run.begin * ldc + column;
    panel_product({count, run.rank, out, low, run.rank, lora.b, nullptr, true, to, ldc});
  }
}

// Not inlined: inlined copies could differ in which products and sums the compiler fuses, and so in the last bits.
__attribute__((noinline)) static void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    x[i] = first * cos[i] - second * sin[i];
    x[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

__attribute__((noinline)) static void rotate_pairs(float* x, const float* cos, const float* sin, int64_t dim) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float first = x[2 * i], second = x[2 * i + 1];
    x[2 * i] = first * cos[i] - second * sin[i];
    x[2 * i + 1] = second * cos[i] + first * sin[i];
  }
}

// Normalizes and rotates the heads of a token in place.
static void norm_and_rotate(const DecoderSizes& s, const float* weight, const float* cos, const float* sin, int64_t heads, float* x) {
  const int64_t dim = s.head_dim;
  if (weight && s.qk_norm == kAllHeads) norm_row(x, heads * dim, s.epsilon, weight, x);
  for (int64_t head = 0; head < heads; ++head) {
    float* own = x + head * dim;
    if (weight && s.qk_norm == kEachHead) norm_row(own, dim, s.epsilon, weight, own);
    if (!cos) continue;
    if (s.interleaved) {
      rotate_pairs(own, cos, sin, s.rotary_dim);
    } else {
      rotate(own, cos, sin, s.rotary_dim);
    }
  }
}

// Normalizes and rotates queries and keys, and stores keys and values in the KV caches of their sequences.
static void store_keys_and_values(const DecoderPass& p, int64_t layer, float* qkv) {
  const DecoderSizes& s = p.sizes;
  const Widths w(s);
  const DecoderLayer& own = p.layers[layer];
  const int64_t dim = s.head_dim, wide = padded(dim);
  for (int64_t i = 0; i < p.num_runs; ++i) {
    const DecoderRun& run = p.runs[i];
    const Heads heads(s, run, layer);
    for_rows(run.count, w.qkv, kGrain, [&](int64_t t) {
      const int64_t position = run.position + t, at = position * s.rotary_dim;
      const float *cos = own.cos ? own.cos + at : nullptr, *sin = own.sin ? own.sin + at : nullptr;
      float *q = qkv + (run.begin + t) * w.qkv, *k = q + w.q, *v = k + w.kv;
      norm_and_rotate(s, own.q_norm, cos, sin, s.num_heads, q);
      norm_and_rotate(s, own.k_norm, cos, sin, s.num_key_value_heads, k);
      for (int64_t head = 0; head < s.num_key_value_heads; ++head) {
        float* key = heads.keys + head * keys_size(s, run.capacity) + position / kKeyBlock * kKeyBlock * dim +
                     position % kKeyBlock;
        for (int64_t d = 0; d < dim; ++d) key[d * kKeyBlock] = k[head * dim + d];
        float* value = heads.values + head * values_size(s, run.capacity) + position * wide;
        for (int64_t d = 0; d < wide; ++d) value[d] = d < dim ? v[head * dim + d] : 0.0f;
      }
    });
  }
}

static int64_t longest(const DecoderPass& p) {
  int64_t keys = 0;
  for (int64_t i = 0; i < p.num_runs; ++i) {
    const int64_t end = p.runs[i].position + p.runs[i].count;
    if (end > keys) keys = end;
  }
  return (keys + 4 * kKeyBlock) / kKeyBlock * kKeyBlock;
}

// A unit of work is a tile: up to kQueries queries of one key head. Queries are numbered token by token, and within a
// token by query head.
static void attention(const DecoderPass& p, int64_t layer, const float* qkv, float* scores, float* output) {
  const DecoderSizes& s = p.sizes;
  const Widths w(s);
  const int64_t group = s.num_heads / s.num_key_value_heads, dim = s.head_dim, length = longest(p);
  int64_t units = 0, keys = 0;
  for (int64_t i = 0; i < p.num_runs; ++i) {
    units += (p.runs[i].count * group + kQueries - 1) / kQueries * s.num_key_value_heads;
    keys += p.runs[i].count * (p.runs[i].position + p.runs[i].count / 2 + 1);
  }
  const int64_t window = p.layers[layer].window;
  const int64_t work = keys * s.num_heads * dim / (units ? units : 1);  // per unit
  parallel_for(units, 32 * 1024 / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    float* own = scores + omp_get_thread_num() * kQueries * length;
    int64_t before = 0;  // units of earlier runs
    for (int64_t i = 0; i < p.num_runs && before < end; ++i) {
      const DecoderRun& run = p.runs[i];
      const int64_t queries = run.count * group, tiles = (queries + kQueries - 1) / kQueries;
      const int64_t own_units = tiles * s.num_key_value_heads;
      const Heads heads(s, run, layer);
      const int64_t from = begin > before ? begin - before : 0, to = end - before < own_units ? end - before : own_units;
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t head = unit / tiles, first = unit % tiles * kQueries;
        AttentionTile tile{dim, queries - first < kQueries ? queries - first : kQueries};
        tile.key_blocks = heads.keys + head * keys_size(s, run.capacity);
        tile.values = heads.values + head * values_size(s, run.capacity);
        tile.scale = s.score_scale, tile.cap = s.score_cap;
        for (int64_t q = 0; q < tile.count; ++q) {
          const int64_t token = (first + q) / group, column = (head * group + (first + q) % group) * dim;
          tile.query[q] = qkv + (run.begin + token) * w.qkv + column;
          tile.keys[q] = run.position + token + 1;
          tile.first[q] = window && tile.keys[q] > window ? tile.keys[q] - window : 0;
          tile.scores[q] = own + q * length;
          tile.output[q] = output + (run.begin + token) * w.q + column;
        }
        attend(tile);
      }
      before += own_units;
    }
  });
}

static void gated(const DecoderSizes& s, int64_t rows, const float* gate_up, float* to) {
  for_rows(rows, 4 * s.intermediate, kGrain, [&](int64_t row) {
    const float *gate = gate_up + row * 2 * s.intermediate, *up = gate + s.intermediate;
    float* y = to + row * s.intermediate;
    if (s.activation == kGeluTanh) {  // 0.5 g (1 + tanh(u)) = g / (1 + exp(-2 u))
      for_columns(s.intermediate, [&](auto unit, int64_t i) {
        const auto g = unit.load(gate + i), twice = g * (1.5957691216f + 0.0713548163f * (g * g));
        unit.store(y + i, g / (1.0f + exponential(-twice)) * unit.load(up + i));
      });
    } else if (s.activation == kGelu) {
      for (int64_t i = 0; i < s.intermediate; ++i)
        y[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
    } else {
      for_columns(s.intermediate, [&](auto unit, int64_t i) {
        const auto g = unit.load(gate + i);
        unit.store(y + i, g / (1.0f + exponential(-g)) * unit.load(up + i));
      });
    }
  });
}

static void run_layer(const DecoderPass& p, int64_t index, float* x, float* normed, float* wide, float* inner,
                       float* scores) {
  const DecoderSizes& s = p.sizes;
  const Widths w(s);
  const DecoderLayer& layer = p.layers[index];
  const int64_t rows = p.num_tokens, h = s.hidden;
  float* low = scores;  // they share memory: not used at the same time
  if (layer.before_attention) norm(s, rows, x, layer.before_attention, normed);
  const float* from = layer.before_attention ? normed : x;
  linear(p, from, h, layer.qkv, layer.qkv_bias, false, wide, w.qkv);
  add_lora(p, index, kQ, from, h, low, wide, w.qkv, 0, w.q);
  add_lora(p, index, kK, from, h, low, wide, w.qkv, w.q, w.kv);
  add_lora(p, index, kV, from, h, low, wide, w.qkv, w.q + w.kv, w.kv);
  store_keys_and_values(p, index, wide);
  attention(p, index, wide, scores, inner);
  // Without a norm and a scale, the product itself adds to x.
  bool adds = !layer.after_attention && s.residual_scale == 1.0f;
  float* to = adds ? x : normed;
  linear(p, inner, w.q, layer.o, layer.o_bias, adds, to, h);
  add_lora(p, index, kO, inner, w.q, low, to, h, 0, h);
  if (!adds) add_residual(s, rows, normed, layer.after_attention, x);
  if (layer.before_mlp) norm(s, rows, x, layer.before_mlp, normed);
  from = layer.before_mlp ? normed : x;
  linear(p, from, h, layer.gate_up, layer.gate_up_bias, false, wide, w.gate_up);
  add_lora(p, index, kGate, from, h, low, wide, w.gate_up, 0, s.intermediate);
  add_lora(p, index, kUp, from, h, low, wide, w.gate_up, s.intermediate, s.intermediate);
  gated(s, rows, wide, inner);
  adds = !layer.after_mlp && s.residual_scale == 1.0f;
  to = adds ? x : normed;
  linear(p, inner, s.intermediate, layer.down, layer.down_bias, adds, to, h);
  add_lora(p, index, kDown, inner, s.intermediate, low, to, h, 0, h);
  if (!adds) add_residual(s, rows, normed, layer.after_mlp, x);
}

struct Workspace {
  int64_t x, wide, inner, scores, total;
  explicit Workspace(const DecoderPass& p) {
    const DecoderSizes& s = p.sizes;
    const Widths w(s);
    int64_t rank = 0;
    for (int64_t i = 0; i < p.num_runs; ++i) rank = p.runs[i].rank > rank ? p.runs[i].rank : rank;
    const int64_t tiles = omp_get_max_threads() * kQueries * longest(p), lows = p.num_tokens * rank;
    x = p.num_tokens * s.hidden;
    wide = p.num_tokens * (w.qkv > w.gate_up ? w.qkv : w.gate_up);
    inner = p.num_tokens * (w.q > s.intermediate ? w.q : s.intermediate);
    scores = tiles > lows ? tiles : lows;
    total = 2 * x + wide + inner + scores;
  }
};

void decoder_cpu(const DecoderPass& p) {
  const DecoderSizes& s = p.sizes;
  const Workspace sizes(p);
  float *x = p.workspace, *normed = x + sizes.x, *wide = normed + sizes.x, *inner = wide + sizes.wide,
        *scores = inner + sizes.inner;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const float* row = p.embedding + p.tokens[t] * s.hidden;
    for_columns(s.hidden, [&](auto unit, int64_t i) { unit.store(x + t * s.hidden + i, unit.load(row + i) * s.embedding_scale); });
  }
  for (int64_t layer = 0; layer < s.num_layers; ++layer) run_layer(p, layer, x, normed, wide, inner, scores);
  int64_t num_logits = 0;
  for (int64_t i = 0; i < p.num_runs; ++i) {
    if (!p.runs[i].wants_logits) continue;
    const int64_t last = p.runs[i].begin + p.runs[i].count - 1;
    float* to = normed + num_logits++ * s.hidden;
    norm(s, 1, x + last * s.hidden, p.norm, to);
    if (s.logit_scale != 1.0f)
      for_columns(s.hidden, [&](auto unit, int64_t c) { unit.store(to + c, unit.load(to + c) * s.logit_scale); });
  }
  panel_product({num_logits, s.hidden, s.vocabulary, normed, s.hidden, p.head, nullptr, false, p.logits, s.vocabulary});
  if (s.logit_cap > 0) soft_cap(p.logits, num_logits * s.vocabulary, s.logit_cap);
}

#if defined(OARLOCK_ISA_PLAIN)
}  // namespace OARLOCK_ISA
int64_t decoder_workspace(const DecoderPass& pass) { return plain::Workspace(pass).total; }
int64_t decoder_cache(const DecoderSizes& s, int64_t capacity) {
  return s.num_layers * s.num_key_value_heads * (plain::keys_size(s, capacity) + plain::values_size(s, capacity));
}
namespace OARLOCK_ISA {
#endif

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(decoder_cpu, DecoderPass)
