// Attention on a CPU in float32, forward and backward, in memory that grows with the tokens and not with their square.
//
// Scores are made tile by tile and forgotten: the forward keeps one log-sum-exp a row, from which the backward makes
// them again (FlashAttention-2, arXiv 2307.08691). Tensors are dense, [batch, tokens, heads, head_dim], as PaddleNLP
// has them; key and value may have fewer heads than the query, each for a group of query heads that follow one another,
// and the heads of values may have another size, value_dim.
// The result has the same bits every time, with any number of threads.
#pragma once

#include <cstdint>

namespace oarlock {

// Query i has the place p = i + key_length - query_length and sees key j where all of these hold:
//   causal:      j <= p
//   with ends:   p < ends[batch, j], the place at which the key's packed example ends; 0 for padding
//   with window: j > p - window
//   with bias:   it is added to the scaled scores, and values below -1e30 hide
// A query that sees nothing has the output 0 and no gradient; without sinks, its log-sum-exp is infinity.
struct AttentionShape {
  int64_t batch, query_length, key_length, num_heads, num_key_value_heads, head_dim, value_dim;
  float scale;  // of the scores
  bool causal;
  int64_t window = 0;             // 0 for none; causal only
  float soft_cap = 0;             // scores become soft_cap * tanh(scores / soft_cap); 0 for none
  const float* sinks = nullptr;   // [num_heads], the score of one more key, which has no value
  const int32_t* ends = nullptr;  // [batch, key_length]
  const float* bias = nullptr;    // [batch, bias_heads, query_length, key_length]
  int64_t bias_heads = 1;         // or num_heads
};

struct AttentionForward {
  AttentionShape shape;
  const float *query, *key, *value;
  float* workspace;    // attention_cpu_workspace floats
  float* output;       // [batch, query_length, num_heads, value_dim]
  float* log_sum_exp;  // [batch, num_heads, query_length], of a sink too
};

struct AttentionBackward {
  AttentionShape shape;
  const float *query, *key, *value, *output, *log_sum_exp, *grad_output;
  float* workspace;  // attention_cpu_backward_workspace floats
  float *grad_query, *grad_key, *grad_value;
  float* grad_sinks;  // nullptr without sinks
};

// Depend on the number of threads, which has to be the same in the call.
int64_t attention_cpu_workspace(const AttentionShape& shape);
int64_t attention_cpu_backward_workspace(const AttentionShape& shape);

void attention_forward_cpu(const AttentionForward& args);
void attention_backward_cpu(const AttentionBackward& args);

}  // namespace oarlock
