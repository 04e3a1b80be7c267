// The forward pass of a Llama-like decoder (RMSNorm, rotary embeddings, grouped heads, gated MLP) over the new tokens of
// several sequences, float32 on the CPU. DecoderSizes and DecoderLayer hold the differences between families.
//
// The order of every sum depends on its own row only. So the logits of a sequence are bit-identical alone and in any
// batch, and whether its prompt is processed at once or in chunks.
//
// Matrices [in, out] are stored in panels of 32 columns, [ceil(out / 32)][in][32], the last one padded with zeros: a
// step with few tokens reads each weight once, in order.
#pragma once

#include <cstdint>

namespace oarlock {

constexpr int64_t kPanel = 32;    // columns of a panel
constexpr int64_t kKeyBlock = 16;  // keys of a block, see DecoderRun

enum DecoderActivation { kSilu, kGelu, kGeluTanh };
enum DecoderNorms { kBeforeAttention = 1, kAfterAttention = 2, kBeforeMlp = 4, kAfterMlp = 8 };
enum DecoderQkNorm { kNoQkNorm, kEachHead, kAllHeads };  // of queries and keys, before they are rotated
enum DecoderBiases { kOutputBias = 1, kMlpBias = 2 };    // q, k and v always have biases, perhaps zeros

struct DecoderSizes {
  int64_t hidden, intermediate, num_layers, num_heads, num_key_value_heads, head_dim, vocabulary;
  int64_t activation;   // DecoderActivation, of the gate
  int64_t norms;        // sum of DecoderNorms
  int64_t qk_norm;      // DecoderQkNorm
  int64_t biases;       // sum of DecoderBiases
  int64_t rotary_dim;   // rotated components of a head
  int64_t interleaved;  // components 2i and 2i + 1 are rotated together, instead of i and i + rotary_dim / 2
  float epsilon;          // of the norms
  float embedding_scale;  // sqrt(hidden) in Gemma, 1 elsewhere
  float residual_scale;   // of the outputs of attention and MLP
  float score_scale;      // of the attention scores
  float score_cap;        // score_cap * tanh(score / score_cap); 0 for none
  float logit_scale;      // of the last norm's output
  float logit_cap;        // of the logits, like score_cap
};

struct DecoderLayer {
  const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // norms [hidden], null where there is none
  const float *q_norm, *k_norm;              // [dim], or of all heads; null where there is none
  const float* qkv_bias;                     // [(heads + 2 key heads) * dim]
  const float *o_bias, *gate_up_bias, *down_bias;  // null where there is none
  const float *qkv, *o, *gate_up, *down;     // panels; q | k | v and gate | up side by side
  int64_t window;                            // number of last tokens that a query attends to; 0 for all
  const float *cos, *sin;                    // [positions, rotary_dim], both halves alike; null without positions
};

// LoRA: x A B is added. Both in panels; null where there is none.
struct DecoderLora {
  const float *a, *b;
};
enum DecoderTarget { kQ, kK, kV, kO, kGate, kUp, kDown, kTargets };

// The new tokens of one sequence, contiguous among the tokens of the pass.
struct DecoderRun {
  int64_t begin, count;  // among the tokens of the pass
  int64_t position;      // of the first one in the sequence
  int64_t rank;          // of the LoRA matrices
  const DecoderLora* lora;  // [layers][kTargets]; null for the base
  // KV cache: [layers][keys, values][key heads], keys in blocks [capacity / 16][dim][16], values [capacity][padded dim].
  float* cache;
  int64_t capacity;  // a multiple of 16
  bool wants_logits;  // those after its last token
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
  float* logits;     // [runs that want logits, vocabulary]
};

// Size of a sequence's KV cache, in floats.
int64_t decoder_cache(const DecoderSizes& sizes, int64_t capacity);
// Size of the workspace, in floats. It depends on the number of threads, which must not change before the pass.
int64_t decoder_workspace(const DecoderPass& pass);
void decoder_cpu(const DecoderPass& pass);

}  // namespace oarlock
