// See attention_cpu.h. Scores lie [keys, rows], so that a row's maximum and sum are found without leaving its lane.
#include <cmath>

#include "attention/problem.h"
#include "common/parallel.h"

namespace oarlock {

static int64_t forward_scratch(const AttentionShape& s) {
  return (2 * kBlock + 2) * kTile * padded(s.head_dim) + 2 * kTile * kTile + (2 * kBlock + 1) * kTile;
}

#if defined(OARLOCK_ISA_PLAIN)
int64_t attention_cpu_workspace(const AttentionShape& s) {
  return omp_get_max_threads() * forward_scratch(s) + kAlignment;
}
#endif

namespace OARLOCK_ISA {

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

}  // namespace OARLOCK_ISA
}  // namespace oarlock

OARLOCK_ENTRY(attention_forward_cpu, AttentionForward)
