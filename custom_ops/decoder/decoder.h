// One pass of a decoder of Llama's kind (RMSNorm, rotary positions, grouped heads, gated feed-forward) over the new
// tokens of several sequences, float32 on the CPU. What families differ in is in DecoderSizes and DecoderLayer.
//
// Every sum runs in an order that depends on its own row alone. So the scores of a sequence have the same bits alone
// and in any batch, and whether its prompt is read at once or in parts.
//
// Matrices [in, out] are kept in panels of 32 columns, [ceil(out / 32)][in][32], the last one filled up with zeros:
// a step for few tokens reads each weight once, in order.
#pragma once

#include <cstdint>

namespace oarlock {

constexpr int64_t kPanel = 32;    // columns of a panel
constexpr int64_t kKeyBlock = 16;  // keys of a block, see DecoderRun

enum DecoderActivation { kSilu, kGelu, kGeluTanh };
enum DecoderNorms { kBeforeAttention = 1, kAfterAttention = 2, kBeforeMlp = 4, kAfterMlp = 8 };
enum DecoderQkNorm { kNoQkNorm, kEachHead, kAllHeads };  // of queries and keys, before they are rotated
enum DecoderBiases { kOutputBias = 1, kMlpBias = 2 };    // those of q, k and v are zeros where there are none

struct DecoderSizes {
  int64_t hidden, intermediate, num_layers, num_heads, num_key_value_heads, head_dim, vocabulary;
  int64_t activation;   // DecoderActivation, of the gate
  int64_t norms;        // sum of DecoderNorms
  int64_t qk_norm;      // DecoderQkNorm
  int64_t biases;       // sum of DecoderBiases
  int64_t rotary_dim;   // rotated components of a head
  int64_t interleaved;  // components 2i and 2i + 1 are rotated together, instead of i and i + rotary_dim / 2
  float epsilon;          // of the norms
  float embedding_scale;  // Gemma's sqrt(hidden); 1 elsewhere
  float residual_scale;   // of what attention and feed-forward add
  float score_scale;      // of the attention scores
  float score_cap;        // score_cap * tanh(score / score_cap); 0 for none
  float logit_scale;      // of the last norm's output
  float logit_cap;        // of the logits, as score_cap
};

struct DecoderLayer {
  const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // norms [hidden], null where there is none
  const float *q_norm, *k_norm;              // [dim], or of all heads; null where there is none
  const float* qkv_bias;                     // [(heads + 2 key heads) * dim]
  const float *o_bias, *gate_up_bias, *down_bias;  // null where there is none
  const float *qkv, *o, *gate_up, *down;     // panels; q | k | v and gate | up side by side
  int64_t window;                            // tokens that a query sees, itself included; 0 for all
  const float *cos, *sin;                    // [positions, rotary_dim], both halves alike; null without positions
};

// A low-rank change x A B, in panels; null where there is none.
struct DecoderLora {
  const float *a, *b;
};
enum DecoderTarget { kQ, kK, kV, kO, kGate, kUp, kDown, kTargets };

// Tokens of one sequence, which follow one another in the pass.
struct DecoderRun {
  int64_t begin, count;  // among the tokens of the pass
  int64_t position;      // of the first one in the sequence
  int64_t rank;          // of the LoRA matrices
  const DecoderLora* lora;  // [layers][kTargets]; null for the base
  // [layers][keys, values][key heads], keys in blocks [capacity / 16][dim][16], values [capacity][padded dim].
  float* cache;
  int64_t capacity;  // a multiple of 16
  bool scored;       // whether the scores after its last token are wanted
};

struct DecoderPass {
  DecoderSizes sizes;
  const DecoderLayer* layers;
  const float* embedding;    // [vocabulary, hidden]
  const float* norm;         // [hidden]
  const float* head;         // panels of [hidden, vocabulary]
  const int64_t* tokens;     // [num_tokens]
  int64_t num_tokens;
  const DecoderRun* runs;
  int64_t num_runs;
  float* workspace;  // decoder_workspace floats
  float* scores;     // [scored runs, vocabulary]
};

// Floats of a sequence's cache.
int64_t decoder_cache(const DecoderSizes& sizes, int64_t capacity);
// Depends on the number of threads, which has to be the same in the pass.
int64_t decoder_workspace(const DecoderPass& pass);
void decoder_cpu(const DecoderPass& pass);

}  // namespace oarlock
