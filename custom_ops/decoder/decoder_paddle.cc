// The decoder as a Paddle operator. oarlock/ops/decoder.py calls it.
#include <algorithm>
#include <limits>

#include "common/tensors.h"
#include "decoder/decoder.h"

using namespace oarlock;
using paddle::DataType;
using paddle::Tensor;

namespace {

// Columns of `runs`.
enum RunColumn { kBegin, kCount, kPosition, kCapacity, kAdapter, kWantsLogits, kRunColumns };

int64_t panels(int64_t in, int64_t out) { return (out + kPanel - 1) / kPanel * kPanel * in; }

// Reads the parts of a packed tensor one after the other.
class Parts {
 public:
  Parts(const Tensor& tensor, const char* name) : name_(name), at_(floats(tensor, name).data<float>()), left_(tensor.numel()) {
    PD_CHECK(tensor.is_contiguous(), name, " has to be without gaps");
  }
  const float* next(int64_t size) {
    size = (size + 15) / 16 * 16;  // parts are aligned to 64 bytes
    PD_CHECK(size <= left_, name_, " is too small");
    const float* part = at_;
    at_ += size, left_ -= size;
    return part;
  }
  void end() const { PD_CHECK(left_ == 0, name_, " is too large"); }

 private:
  const char* name_;
  const float* at_;
  int64_t left_;
};

DecoderLayer layer_of(const Tensor& tensor, const DecoderSizes& s) {
  Parts parts(tensor, "a layer");
  const int64_t q = s.num_heads * s.head_dim, kv = s.num_key_value_heads * s.head_dim, qkv = q + 2 * kv;
  const auto next_if = [&](bool wanted, int64_t size) { return wanted ? parts.next(size) : nullptr; };
  DecoderLayer layer{};
  layer.before_attention = next_if(s.norms & kBeforeAttention, s.hidden);
  layer.after_attention = next_if(s.norms & kAfterAttention, s.hidden);
  layer.before_mlp = next_if(s.norms & kBeforeMlp, s.hidden);
  layer.after_mlp = next_if(s.norms & kAfterMlp, s.hidden);
  layer.q_norm = next_if(s.qk_norm, s.qk_norm == kAllHeads ? q : s.head_dim);
  layer.k_norm = next_if(s.qk_norm, s.qk_norm == kAllHeads ? kv : s.head_dim);
  layer.qkv_bias = parts.next(qkv);
  layer.o_bias = next_if(s.biases & kOutputBias, s.hidden);
  layer.gate_up_bias = next_if(s.biases & kMlpBias, 2 * s.intermediate);
  layer.down_bias = next_if(s.biases & kMlpBias, s.hidden);
  layer.qkv = parts.next(panels(s.hidden, qkv));
  layer.o = parts.next(panels(q, s.hidden));
  layer.gate_up = parts.next(panels(s.hidden, 2 * s.intermediate));
  layer.down = parts.next(panels(s.intermediate, s.hidden));
  parts.end();
  return layer;
}

struct Adapter {
  int64_t rank = 0;
  std::vector<DecoderLora> lora;
};

// Reads the matrices of an adapter. Its plan is [rank, then 1 or 0 for each layer and target].
Adapter adapter_of(const Tensor& tensor, const Tensor& plan, const DecoderSizes& s) {
  PD_CHECK(plan.dtype() == DataType::INT64 && plan.numel() == 1 + s.num_layers * kTargets && plan.is_contiguous(),
           "an adapter's plan has to be int64 [1 + layers * ", int(kTargets), "]");
  const int64_t *has = plan.data<int64_t>(), q = s.num_heads * s.head_dim, kv = s.num_key_value_heads * s.head_dim,
                h = s.hidden, n = s.intermediate;
  const int64_t in[kTargets] = {h, h, h, q, h, h, n}, out[kTargets] = {q, kv, kv, h, n, n, h};
  Adapter adapter;
  adapter.rank = has[0];
  adapter.lora.resize(s.num_layers * kTargets, {nullptr, nullptr});
  Parts parts(tensor, "an adapter");
  for (int64_t i = 0; i < s.num_layers * kTargets; ++i) {
    if (!has[1 + i]) continue;
    adapter.lora[i].a = parts.next(panels(in[i % kTargets], adapter.rank));
    adapter.lora[i].b = parts.next(panels(adapter.rank, out[i % kTargets]));
  }
  parts.end();
  return adapter;
}

DecoderRun run_of(const int64_t* row, Tensor& cache, const std::vector<Adapter>& adapters, const DecoderSizes& s,
                  int64_t num_tokens, int64_t num_positions) {
  DecoderRun run{row[kBegin], row[kCount], row[kPosition], 0, nullptr, cache.data<float>(), row[kCapacity], row[kWantsLogits] != 0};
  PD_CHECK(run.begin >= 0 && run.count > 0 && run.begin + run.count <= num_tokens, "a run is not among the tokens");
  PD_CHECK(run.position >= 0 && run.position + run.count <= run.capacity && run.capacity % kKeyBlock == 0,
           "a run of ", run.count, " tokens from ", run.position, " does not fit its capacity of ", run.capacity);
  PD_CHECK(run.position + run.count <= num_positions, "there are only ", num_positions, " positions");
  PD_CHECK(cache.dtype() == DataType::FLOAT32 && cache.is_contiguous() && cache.numel() == decoder_cache(s, run.capacity),
           "a cache has to be float32 of ", decoder_cache(s, run.capacity), " elements; got ", cache.numel());
  const int64_t adapter = row[kAdapter];
  PD_CHECK(adapter < int64_t(adapters.size()), "there is no adapter ", adapter);
  if (adapter >= 0) {
    run.lora = adapters[adapter].lora.data();
    run.rank = adapters[adapter].rank;
  }
  return run;
}

std::vector<Tensor> decoder(const Tensor& tokens, const Tensor& runs, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& layers, const std::vector<Tensor>& adapters,
                            const std::vector<Tensor>& plans, std::vector<Tensor>& caches,
                            const std::vector<int64_t>& sizes, const std::vector<float>& factors,
                            const std::vector<int64_t>& windows, const std::vector<int64_t>& tables) {
  PD_CHECK(sizes.size() == 13 && factors.size() == 7 && weights.size() >= 3 && weights.size() % 2 == 1,
           "13 sizes, 7 factors, and the embedding, norm, head and pairs of cos and sin are needed");
  const DecoderSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9],
                       sizes[10], sizes[11], sizes[12], factors[0], factors[1], factors[2], factors[3], factors[4],
                       factors[5], factors[6]};
  PD_CHECK(s.num_key_value_heads > 0 && s.num_heads % s.num_key_value_heads == 0, "heads have to be a multiple of key heads");
  PD_CHECK(s.rotary_dim > 0 && s.rotary_dim % 2 == 0 && s.rotary_dim <= s.head_dim,
           "the rotated part of a head has to be even and within it");
  PD_CHECK(int64_t(layers.size()) == s.num_layers && windows.size() == layers.size() && tables.size() == layers.size(),
           "there have to be ", s.num_layers, " layers, with a window and a table each");
  PD_CHECK(tokens.dtype() == DataType::INT64 && tokens.is_contiguous() && tokens.numel() > 0, "tokens have to be int64");
  PD_CHECK(runs.dtype() == DataType::INT64 && runs.is_contiguous() &&
               runs.shape() == Shape({int64_t(caches.size()), kRunColumns}),
           "runs have to be int64 [caches, ", int(kRunColumns), "]");
  for (const Tensor& weight : weights) PD_CHECK(weight.is_contiguous(), "weights have to be without gaps");
  PD_CHECK(weights[0].numel() == s.vocabulary * s.hidden && weights[1].numel() == s.hidden &&
               weights[2].numel() == panels(s.hidden, s.vocabulary),
           "embedding, norm and head do not fit the sizes");
  const int64_t num_tables = (int64_t(weights.size()) - 3) / 2;
  int64_t num_positions = std::numeric_limits<int64_t>::max();
  for (int64_t i = 0; i < num_tables; ++i) {
    const int64_t size = weights[3 + 2 * i].numel();
    PD_CHECK(size == weights[4 + 2 * i].numel() && size % s.rotary_dim == 0, "cos and sin do not fit the sizes");
    num_positions = std::min(num_positions, size / s.rotary_dim);
  }
  PD_CHECK(adapters.size() == plans.size(), "each adapter needs its plan");

  const int64_t* ids = tokens.data<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); ++i)
    PD_CHECK(ids[i] >= 0 && ids[i] < s.vocabulary, "token ", ids[i], " is not in the vocabulary");
  std::vector<DecoderLayer> all_layers;
  for (size_t i = 0; i < layers.size(); ++i) {
    PD_CHECK(windows[i] >= 0 && tables[i] >= -1 && tables[i] < num_tables, "layer ", i, " has no such window or table");
    all_layers.push_back(layer_of(layers[i], s));
    all_layers.back().window = windows[i];
    if (tables[i] < 0) continue;
    all_layers.back().cos = floats(weights[3 + 2 * tables[i]], "cos").data<float>();
    all_layers.back().sin = floats(weights[4 + 2 * tables[i]], "sin").data<float>();
  }
  std::vector<Adapter> all_adapters;
  for (size_t i = 0; i < adapters.size(); ++i) all_adapters.push_back(adapter_of(adapters[i], plans[i], s));
  std::vector<DecoderRun> all_runs;
  int64_t num_logits = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    const int64_t* row = runs.data<int64_t>() + i * kRunColumns;
    all_runs.push_back(run_of(row, caches[i], all_adapters, s, tokens.numel(), num_positions));
    num_logits += all_runs.back().wants_logits;
  }
  Tensor logits = empty_floats({num_logits, s.vocabulary}, weights[0]);
  DecoderPass pass{s, all_layers.data(), floats(weights[0], "the embedding").data<float>(),
                   floats(weights[1], "the norm").data<float>(), floats(weights[2], "the head").data<float>(),
                   ids, tokens.numel(), all_runs.data(), int64_t(all_runs.size()), nullptr, logits.data<float>()};
  Tensor workspace = empty_floats({decoder_workspace(pass)}, weights[0]);
  pass.workspace = workspace.data<float>();
  decoder_cpu(pass);
  return {logits};
}

}  // namespace

PD_BUILD_OP(oarlock_decoder)  // for inference: without a gradient
    .Inputs({"tokens", "runs", paddle::Vec("weights"), paddle::Vec("layers"), paddle::Vec("adapters"),
             paddle::Vec("plans"), paddle::Vec("caches")})
    .Outputs({"logits", paddle::Vec("new_caches")})
    .SetInplaceMap({{paddle::Vec("caches"), paddle::Vec("new_caches")}})
    .Attrs({"sizes: std::vector<int64_t>", "factors: std::vector<float>", "windows: std::vector<int64_t>",
            "tables: std::vector<int64_t>"})
    .SetKernelFn(PD_KERNEL(decoder));
