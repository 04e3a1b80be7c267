// See attention_cpu.h. Tiles are kTile queries by kTile keys; a worker takes a block of tiles that use what was fetched
// into the cache for one of them.
#include "attention/attention_cpu.h"

#include <cmath>

#include "attention/tiles.h"
#include "common/parallel.h"

namespace oarlock {

constexpr int64_t kTile = 64;
constexpr int64_t kBlock = 4;  // tiles

static int64_t tiles(int64_t tokens) { return (tokens + kTile - 1) / kTile; }
static int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }  // to vectors of every instruction set
static int64_t forward_scratch(const AttentionShape& s) {
  return (2 * kBlock + 2) * kTile * padded(s.head_dim) + 2 * kTile * kTile + (2 * kBlock + 1) * kTile;
}
static int64_t backward_scratch(const AttentionShape& s) {
  return (5 * kBlock + 3) * kTile * padded(s.head_dim) + 2 * kTile * kTile;
}

// The backward's workers take all queries of some keys. Where there are few heads for them, keys are split into parts,
// each with a gradient of the queries of its own; by the shape alone, so that sums do not depend on the threads.
static int64_t key_parts(const AttentionShape& s) {
  const int64_t heads = s.batch * s.num_key_value_heads, wanted = heads < 16 ? 16 / heads : 1;
  const int64_t blocks = (tiles(s.key_length) + kBlock - 1) / kBlock, most = blocks < 8 ? blocks : 8;
  return wanted < most ? wanted : most;
}

#if defined(OARLOCK_ISA_PLAIN)
constexpr int64_t kAlignment = 16;  // floats

int64_t attention_cpu_workspace(const AttentionShape& s) {
  return omp_get_max_threads() * forward_scratch(s) + kAlignment;
}

int64_t attention_cpu_backward_workspace(const AttentionShape& s) {
  const int64_t rows = s.batch * s.query_length * s.num_heads;
  return omp_get_max_threads() * backward_scratch(s) + rows * (1 + (key_parts(s) - 1) * s.head_dim) + kAlignment;
}
#endif

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

// ---- forward: scores lie [keys, rows], so that a row's maximum and sum are found without leaving its lane ----

struct ForwardScratch {
  float *keys, *values, *scores, *biases, *factors;  // of a tile
  float *queries, *outputs, *maxima, *sums;          // of a block

  ForwardScratch(const Problem& p, float* from)
      : keys(from), values(keys + kTile * p.width), scores(values + kTile * p.width), biases(scores + kTile * kTile),
        factors(biases + kTile * kTile), queries(factors + kTile), outputs(queries + kBlock * kTile * p.width),
        maxima(outputs + kBlock * kTile * p.width), sums(maxima + kBlock * kTile) {}
};

// Hides from kLanes rows, the first of which is query i, what they do not see of the keys from k.
static void hide(const Problem& p, float* column, int64_t b, int64_t i, int64_t k, int64_t reach) {
  const Integers places = count_from(i + p.offset);
  const int32_t* ends = p.ends ? p.ends + b * p.key_length + k : nullptr;
  for (int64_t j = 0; j < reach; ++j) {
    Vector score = load(column + j * kTile);
    if (p.causal) score = places < int32_t(k + j) ? splat(-kInfinity) : score;
    if (ends) score = places >= ends[j] ? splat(-kInfinity) : score;
    store(column + j * kTile, score);
  }
}

// Makes probabilities of kLanes rows' scores, by the maximum so far; what was summed before loses by `factors`.
static void soften(float* column, int64_t reach, float* maxima, float* sums, float* factors) {
  const Vector before = load(maxima);
  Vector parts[4] = {before, before, before, before};  // one alone would wait for itself at every key
  int64_t j = 0;
  for (; j + 4 <= reach; j += 4)
    for (int64_t l = 0; l < 4; ++l) parts[l] = larger(load(column + (j + l) * kTile), parts[l]);
  for (; j < reach; ++j) parts[0] = larger(load(column + j * kTile), parts[0]);
  const Vector maximum = larger(larger(parts[0], parts[1]), larger(parts[2], parts[3]));
  Vector sum{};
  for (j = 0; j < reach; ++j) {
    const Vector probability = power_of_2(load(column + j * kTile) - maximum);
    store(column + j * kTile, probability);
    sum += probability;
  }
  const Vector factor = power_of_2(before - maximum);
  store(maxima, maximum);
  store(factors, factor);
  store(sums, load(sums) * factor + sum);
}

// The tile of queries from q, at `slot` of the block, with the keys from k that the scratch holds.
static void forward_tile(const Problem& p, const ForwardScratch& s, int64_t b, int64_t h, int64_t q, int64_t slot,
                         int64_t k, bool masked, bool biased) {
  const int64_t rows = p.rows(q), lanes = round_up(rows, kLanes);
  const float* queries = s.queries + slot * kTile * p.width;
  float *outputs = s.outputs + slot * kTile * p.width, *maxima = s.maxima + slot * kTile,
        *sums = s.sums + slot * kTile;
  for (int64_t j = 0; j < p.keys(k); j += kPanel) {
    const int64_t first = p.first_row(k + j, q) / kLanes * kLanes;
    if (first < lanes)
      multiply<false>(s.keys + j * p.width, p.width, queries + first, kTile, s.scores + j * kTile + first, kTile,
                      lanes - first, p.head_dim, Start::kZero);
  }
  if (biased) fetch_down(p.bias_at(b, h, q, k), p.key_length, rows, p.keys(k), kLog2E, s.biases, kTile);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    const int64_t reach = p.reach(q + i + kLanes - 1, k);
    for (int64_t j = 0; biased && j < reach; ++j)
      store(s.scores + j * kTile + i, load(s.scores + j * kTile + i) + load(s.biases + j * kTile + i));
    if (masked) hide(p, s.scores + i, b, q + i, k, reach);
    soften(s.scores + i, reach, maxima + i, sums + i, s.factors + i);
  }
  for (int64_t i = 0; i < rows; i += kPanel)
    multiply<true>(s.scores + i, kTile, s.values, p.width, outputs + i * p.width, p.width, p.width,
                   p.reach(q + i + kPanel - 1, k), Start::kScale, s.factors + i);
}

// Queries from `start` to before `stop`.
static void forward_block(const Problem& p, const ForwardScratch& s, const AttentionForward& args, int64_t b, int64_t h,
                          int64_t start, int64_t stop) {
  for (int64_t q = start; q < stop; q += kTile)
    fetch_down(args.query + p.query_at(b, q, h), p.query_stride(), p.rows(q), p.head_dim, p.scale * kLog2E,
               s.queries + (q - start) * p.width, kTile);
  for (int64_t i = 0; i < kBlock * kTile * p.width; ++i) s.outputs[i] = 0;
  for (int64_t i = 0; i < kBlock * kTile; ++i) {
    s.maxima[i] = kLowest;
    s.sums[i] = 0;
  }
  for (int64_t k = 0; k < p.key_length; k += kTile) {
    bool fetched = false;
    for (int64_t q = start; q < stop; q += kTile) {
      const Seen seen = p.seen(b, q, k);
      if (seen == Seen::kNone) continue;
      const Seen unbiased = p.unbiased(b, h, q, k);
      if (unbiased == Seen::kNone) continue;
      if (!fetched) {
        const int64_t from = p.key_at(b, k, h / p.group);
        fetch(args.key + from, p.key_stride(), p.keys(k), p.head_dim, 1, s.keys, p.width);
        fetch(args.value + from, p.key_stride(), p.keys(k), p.head_dim, 1, s.values, p.width);
        fetched = true;
      }
      forward_tile(p, s, b, h, q, (q - start) / kTile, k, seen == Seen::kSome, unbiased == Seen::kSome);
    }
  }
  for (int64_t i = 0; i < stop - start; ++i) {
    const float sum = s.sums[i], factor = sum == 0 ? 0 : 1 / sum, *from = s.outputs + i * p.width;
    float* output = args.output + p.query_at(b, start + i, h);
    for_columns(p.head_dim, [&](auto unit, int64_t d) { unit.store(output + d, unit.load(from + d) * factor); });
    args.log_sum_exp[(b * p.num_heads + h) * p.query_length + start + i] =
        sum == 0 ? kInfinity : s.maxima[i] * kLn2 + ::logf(sum);
  }
}

void attention_forward_cpu(const AttentionForward& args) {
  const Problem p(args.shape);
  const int64_t heads = p.batch * p.num_heads, threads = omp_get_max_threads();
  int64_t block = kBlock;  // less where threads would have nothing to do
  while (block > 1 && heads * ((tiles(p.query_length) + block - 1) / block) < 4 * threads) block /= 2;
  const int64_t blocks = (tiles(p.query_length) + block - 1) / block;
  float* workspace = aligned(args.workspace);
#pragma omp parallel
  {
    const ForwardScratch scratch(p, workspace + omp_get_thread_num() * forward_scratch(p));
    // The last queries see the most keys: they go first, and short blocks fill what is left. (Monotonic: Paddle's
    // OpenMP runtime is older than GNU's entry points of the other kind.)
#pragma omp for schedule(monotonic : dynamic)
    for (int64_t item = 0; item < heads * blocks; ++item) {
      const int64_t head = item % heads, start = (blocks - 1 - item / heads) * block * kTile;
      forward_block(p, scratch, args, head / p.num_heads, head % p.num_heads, start,
                    smaller(start + block * kTile, p.query_length));
    }
  }
}

// ---- backward: scores lie [rows, keys]; one worker has all queries of some keys, so that sums have one order ----

struct BackwardScratch {
  float *queries, *grad_outputs, *grad_queries, *probabilities, *grad_scores;  // of a tile
  float *keys, *keys_down, *values_down, *grad_keys, *grad_values;             // of a block

  BackwardScratch(const Problem& p, float* from)
      : queries(from), grad_outputs(queries + kTile * p.width), grad_queries(grad_outputs + kTile * p.width),
        probabilities(grad_queries + kTile * p.width), grad_scores(probabilities + kTile * kTile),
        keys(grad_scores + kTile * kTile), keys_down(keys + kBlock * kTile * p.width),
        values_down(keys_down + kBlock * kTile * p.width), grad_keys(values_down + kBlock * kTile * p.width),
        grad_values(grad_keys + kBlock * kTile * p.width) {}
};

// Makes probabilities of query i's scores, and gradients of the scores of the probabilities' gradients.
static void differentiate(const Problem& p, float* scores, float* grads, int64_t b, int64_t h, int64_t i, int64_t k,
                          int64_t columns, float log_sum_exp, float delta, bool masked, bool biased) {
  const int64_t place = i + p.offset, keys = p.keys(k);
  const float lowered = log_sum_exp * kLog2E, *bias = biased ? p.bias_at(b, h, i, k) : nullptr;
  const int32_t* ends = masked && p.ends ? p.ends + b * p.key_length + k : nullptr;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vector score = load(scores + j);
    if (bias) score += load_some<Vector>(bias + j, keys - j) * kLog2E;
    if (masked && p.causal) score = count_from(k + j) > int32_t(place) ? splat(-kInfinity) : score;
    if (ends) score = load_some<Integers>(ends + j, keys - j) <= int32_t(place) ? splat(-kInfinity) : score;
    const Vector probability = power_of_2(score - lowered);
    store(scores + j, probability);
    store(grads + j, probability * (load(grads + j) - delta));
  }
}

// The tile of queries from q that the scratch holds, with keys from k, at `slot` of the block.
static void backward_tile(const Problem& p, const BackwardScratch& s, int64_t b, int64_t h, int64_t q, int64_t slot,
                          int64_t k, bool masked, bool biased, const float* log_sum_exp, const float* delta,
                          Start start) {
  const int64_t rows = p.rows(q), width = p.width, at = slot * kTile * width;
  for (int64_t i = 0; i < rows; i += kPanel) {
    const int64_t reach = p.reach(q + i + kPanel - 1, k), columns = round_up(reach, kLanes);
    float *scores = s.probabilities + i * kTile, *grads = s.grad_scores + i * kTile;
    multiply<false>(s.queries + i * width, width, s.keys_down + at, kTile, scores, kTile, columns, p.head_dim,
                    Start::kZero);
    multiply<false>(s.grad_outputs + i * width, width, s.values_down + at, kTile, grads, kTile, columns, p.head_dim,
                    Start::kZero);
    for (int64_t l = 0; l < smaller(kPanel, rows - i); ++l)
      differentiate(p, scores + l * kTile, grads + l * kTile, b, h, q + i + l, k, columns, log_sum_exp[i + l],
                    delta[i + l], masked, biased);
    multiply<false>(grads, kTile, s.keys + at, width, s.grad_queries + i * width, width, width, reach, start);
  }
  for (int64_t j = 0; j < p.keys(k); j += kPanel) {
    const int64_t first = smaller(p.first_row(k + j, q), rows);
    multiply<true>(s.probabilities + first * kTile + j, kTile, s.grad_outputs + first * width, width,
                   s.grad_values + at + j * width, width, width, rows - first, Start::kAdd);
    multiply<true>(s.grad_scores + first * kTile + j, kTile, s.queries + first * width, width,
                   s.grad_keys + at + j * width, width, width, rows - first, Start::kAdd);
  }
}

// One tile of queries with all keys of the block, from `start` to before `stop`.
static void backward_row(const Problem& p, const BackwardScratch& s, const AttentionBackward& args, const float* delta,
                         float* grad_query, int64_t b, int64_t h, int64_t q, int64_t start, int64_t stop) {
  const int64_t at = p.query_at(b, q, h), row = (b * p.num_heads + h) * p.query_length + q;
  bool fetched = false;
  for (int64_t k = start; k < stop; k += kTile) {
    const Seen seen = p.seen(b, q, k);
    if (seen == Seen::kNone) continue;
    const Seen unbiased = p.unbiased(b, h, q, k);
    if (unbiased == Seen::kNone) continue;
    if (!fetched) {
      fetch(args.query + at, p.query_stride(), p.rows(q), p.head_dim, p.scale * kLog2E, s.queries, p.width);
      fetch(args.grad_output + at, p.query_stride(), p.rows(q), p.head_dim, 1, s.grad_outputs, p.width);
    }
    backward_tile(p, s, b, h, q, (k - start) / kTile, k, seen == Seen::kSome, unbiased == Seen::kSome,
                  args.log_sum_exp + row, delta + row, fetched ? Start::kAdd : Start::kZero);
    fetched = true;
  }
  for (int64_t i = 0; fetched && i < p.rows(q); ++i) {
    const float *from = s.grad_queries + i * p.width, scale = p.scale;
    float* to = grad_query + at + i * p.query_stride();
    for_columns(p.head_dim,
                [&](auto unit, int64_t d) { unit.store(to + d, unit.load(to + d) + unit.load(from + d) * scale); });
  }
}

// All that keys from `start` to before `stop` of a key head give.
static void backward_block(const Problem& p, const BackwardScratch& s, const AttentionBackward& args,
                           const float* delta, float* grad_query, int64_t b, int64_t head, int64_t start,
                           int64_t stop) {
  for (int64_t k = start; k < stop; k += kTile) {
    const int64_t from = p.key_at(b, k, head), to = (k - start) * p.width;
    fetch(args.key + from, p.key_stride(), p.keys(k), p.head_dim, 1, s.keys + to, p.width);
    fetch_down(args.key + from, p.key_stride(), p.keys(k), p.head_dim, 1, s.keys_down + to, kTile);
    fetch_down(args.value + from, p.key_stride(), p.keys(k), p.head_dim, 1, s.values_down + to, kTile);
  }
  for (int64_t i = 0; i < kBlock * kTile * p.width; ++i) s.grad_keys[i] = s.grad_values[i] = 0;
  const int64_t first = p.causal ? larger(0, start - p.offset) / kTile * kTile : 0;
  for (int64_t h = head * p.group; h < (head + 1) * p.group; ++h)
    for (int64_t q = first; q < p.query_length; q += kTile)
      backward_row(p, s, args, delta, grad_query, b, h, q, start, stop);
  for (int64_t j = start; j < stop; ++j) {
    const float *grad_key = s.grad_keys + (j - start) * p.width, *grad_value = s.grad_values + (j - start) * p.width;
    float *to_key = args.grad_key + p.key_at(b, j, head), *to_value = args.grad_value + p.key_at(b, j, head);
    for_columns(p.head_dim, [&](auto unit, int64_t d) {
      unit.store(to_key + d, unit.load(grad_key + d) * kLn2);  // the queries were scaled by log2(e) too
      unit.store(to_value + d, unit.load(grad_value + d));
    });
  }
}

void attention_backward_cpu(const AttentionBackward& args) {
  const Problem p(args.shape);
  const int64_t heads = p.batch * p.num_key_value_heads, rows = p.batch * p.query_length, parts = key_parts(p),
                part = round_up((tiles(p.key_length) + parts - 1) / parts, kBlock) * kTile,
                size = rows * p.query_stride();
  float* scratches = aligned(args.workspace);
  float* delta = scratches + omp_get_max_threads() * backward_scratch(p);  // sums of output * grad_output, of each row
  float* part_grads = delta + rows * p.num_heads;                          // of the queries, of parts after the first
#pragma omp parallel
  {
    const BackwardScratch scratch(p, scratches + omp_get_thread_num() * backward_scratch(p));
#pragma omp for
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const float *output = args.output + (row * p.num_heads + h) * p.head_dim,
                    *grad = args.grad_output + (row * p.num_heads + h) * p.head_dim;
        Sum sum;
        for_columns(p.head_dim, [&](auto unit, int64_t d) { sum.add(unit.load(output + d) * unit.load(grad + d)); });
        delta[(row / p.query_length * p.num_heads + h) * p.query_length + row % p.query_length] = sum.total();
      }
#pragma omp for schedule(monotonic : dynamic)
    for (int64_t item = 0; item < heads * parts; ++item) {
      const int64_t b = item % heads / p.num_key_value_heads, head = item % p.num_key_value_heads,
                    which = item / heads, stop = smaller((which + 1) * part, p.key_length);
      float* grad_query = which ? part_grads + (which - 1) * size : args.grad_query;
      for (int64_t i = 0; i < p.query_length; ++i)
        for (int64_t d = 0; d < p.group * p.head_dim; ++d) grad_query[p.query_at(b, i, head * p.group) + d] = 0;
      for (int64_t k = which * part; k < stop; k += kBlock * kTile)
        backward_block(p, scratch, args, delta, grad_query, b, head, k, smaller(k + kBlock * kTile, stop));
    }
    if (parts > 1) {
#pragma omp for
      for (int64_t i = 0; i < size; ++i)
        for (int64_t which = 1; which < parts; ++which) args.grad_query[i] += part_grads[(which - 1) * size + i];
    }
  }
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(attention_forward_cpu, AttentionForward)
OARLOCK_ENTRY(attention_backward_cpu, AttentionBackward)
