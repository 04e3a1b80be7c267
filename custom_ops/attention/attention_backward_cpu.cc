// See attention_cpu.h. Scores lie [rows, keys]; one worker has all queries of some keys, so that sums have one order.
#include "attention/problem.h"
#include "common/parallel.h"

namespace oarlock {

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
int64_t attention_cpu_backward_workspace(const AttentionShape& s) {
  const int64_t rows = s.batch * s.query_length * s.num_heads;
  return omp_get_max_threads() * backward_scratch(s) + rows * (1 + (key_parts(s) - 1) * s.head_dim) + kAlignment;
}
#endif

namespace OARLOCK_ISA {

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

OARLOCK_ENTRY(attention_backward_cpu, AttentionBackward)
