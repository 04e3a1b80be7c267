"""Published config.json files as they are: each makes the right model, or is refused with what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture, Attention, LatentAttention, MoE
from oarlock.families.decoder_weights import count_parameters, count_used_parameters
from oarlock.families.registry import FAMILIES
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.load import make_config

_PHI4_SHORT = [1] * 48
_PHI4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
PUBLISHED = {
    "Qwen/Qwen3-0.6B": """{
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen/Qwen3-30B-A3B": """{
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen/Qwen2.5-7B-Instruct with yarn": """{
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}""",
    "Qwen/Qwen1.5-MoE-A2.7B": """{
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
        "norm_topk_prob": false, "output_router_logits": false, "router_aux_loss_coef": 0.001}""",
    "meta-llama/Llama-3.2-1B": """{
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
    "google/gemma-2b": """{
        "architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 2,
        "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0", "use_cache": true, "vocab_size": 256000}""",
    "google/gemma-2-2b": """{
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256000}""",
    "google/gemma-3-1b-it": """{
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
    "microsoft/Phi-3-mini-4k-instruct": """{
        "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1, "embd_pdrop": 0.0,
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": true, "attention_bias": false,
        "vocab_size": 32064}""",
    "microsoft/Phi-4-mini-instruct": """{
        "architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM", "AutoTokenizer": "Xenova/gpt-4o"},
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": false, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": LONG, "short_factor": SHORT,
        "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": true, "vocab_size": 200064}""",
    "THUDM/GLM-4-9B-0414": """{
        "architectures": ["Glm4ForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 32768,
        "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0",
        "use_cache": true, "vocab_size": 151552}""",
    "allenai/OLMo-2-0425-1B": """{
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": false,
        "torch_dtype": "float32", "transformers_version": "4.49.0", "use_cache": true, "vocab_size": 100352}""",
    "HuggingFaceTB/SmolLM3-3B": """{
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": null, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": FULL, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": false, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "no_rope_layers": ROTATES, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 5000000.0, "sliding_window": null, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": false, "use_sliding_window": false,
        "vocab_size": 128256}""",
    "ibm-granite/granite-3.1-2b-instruct": """{
        "architectures": ["GraniteForCausalLM"], "attention_bias": false, "attention_dropout": 0.1,
        "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "granite",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5000000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0",
        "use_cache": true, "vocab_size": 49155}""",
    "mistralai/Mixtral-8x7B-v0.1": """{
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "mistralai/Mistral-7B-v0.3": """{
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768}""",
    "deepseek-ai/DeepSeek-V2-Lite": """{
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
        "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false,
        "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}""",
    "deepseek-ai/DeepSeek-V3": """{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
        "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""",
}  # fmt: skip
LISTS = {
    "LONG": _PHI4_LONG, "SHORT": _PHI4_SHORT, "FULL": ["full_attention"] * 36, "ROTATES": [1, 1, 1, 0] * 9,
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    text = PUBLISHED[name]
    for word, value in LISTS.items():
        text = text.replace(f": {word},", f": {json.dumps(value)},")
    return json.loads(text)


def architecture(name: str, **changes: Any) -> Architecture:
    content = {**read(name), **changes}
    content.pop("quantization_config", None)
    return FAMILIES[content["model_type"]].decoder(make_config(content, "config.json"))


# The parameters that the models' cards or files state; those that a token uses (without the embedding), in billions.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": (596_049_920, 0.6), "Qwen/Qwen3-30B-A3B": (30_532_122_624, 3.0),
    "Qwen/Qwen2.5-7B-Instruct with yarn": (7_615_616_512, 7.1), "Qwen/Qwen1.5-MoE-A2.7B": (14_315_784_192, 2.4),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 1.2), "google/gemma-2b": (2_506_172_416, 2.5),
    "google/gemma-2-2b": (2_614_341_888, 2.6), "google/gemma-3-1b-it": (999_885_952, 1.0),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, 3.7), "microsoft/Phi-4-mini-instruct": (3_836_021_760, 3.8),
    "THUDM/GLM-4-9B-0414": (9_400_279_040, 8.8), "allenai/OLMo-2-0425-1B": (1_484_916_736, 1.3),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, 3.1), "ibm-granite/granite-3.1-2b-instruct": (2_533_531_648, 2.5),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 12.7), "mistralai/Mistral-7B-v0.3": (7_248_023_552, 7.1),
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, 2.5), "deepseek-ai/DeepSeek-V3": (671_026_419_200, 36.6),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_they_state(name):
    found = architecture(name)
    parameters, used = PARAMETERS[name]
    assert count_parameters(found) == parameters and round(count_used_parameters(found) / 1e9, 1) == used


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_exported_as_the_same_model(name):
    content = {key: value for key, value in read(name).items() if key != "quantization_config"}
    exported = to_hugging_face(make_config(content, "config.json"), "bfloat16", "x")
    assert FAMILIES[content["model_type"]].decoder(make_config(exported, "x")) == architecture(name)
    assert {key: exported[key] for key in ("model_type", "architectures")} == {
        key: content[key] for key in ("model_type", "architectures")
    }


def test_windows_are_those_of_the_published_models():
    windows = {name: [block.attention.window for block in architecture(name).blocks]
               for name in PUBLISHED if "DeepSeek" not in name}  # fmt: skip
    assert windows.pop("google/gemma-2-2b") == [4096, None] * 13
    assert windows.pop("google/gemma-3-1b-it") == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows.pop("microsoft/Phi-3-mini-4k-instruct") == [2047] * 32
    assert {window for layers in windows.values() for window in layers} == {None}


def test_rotary_embeddings_are_those_of_the_published_models():
    ropes = {name: architecture(name).blocks[0].attention.rope for name in PUBLISHED}
    assert {name: rope.kind for name, rope in ropes.items() if rope.kind != "default"} == {
        "Qwen/Qwen2.5-7B-Instruct with yarn": "yarn", "meta-llama/Llama-3.2-1B": "llama3",
        "microsoft/Phi-4-mini-instruct": "longrope", "deepseek-ai/DeepSeek-V2-Lite": "yarn",
        "deepseek-ai/DeepSeek-V3": "yarn",
    }  # fmt: skip
    assert {name for name, rope in ropes.items() if rope.interleaved} == {
        "THUDM/GLM-4-9B-0414", "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3",
    }  # fmt: skip
    assert (ropes["microsoft/Phi-4-mini-instruct"].dim, ropes["THUDM/GLM-4-9B-0414"].dim) == (96, 64)
    gemma3, smollm3 = architecture("google/gemma-3-1b-it").blocks, architecture("HuggingFaceTB/SmolLM3-3B").blocks
    assert [block.attention.rope.theta for block in gemma3[4:6]] == [1e4, 1e6]
    assert [block.attention.rope is None for block in smollm3] == [False, False, False, True] * 9


def test_scales_and_experts_are_those_of_the_published_models():
    granite, gemma2 = architecture("ibm-granite/granite-3.1-2b-instruct"), architecture("google/gemma-2-2b")
    block = granite.blocks[-1]
    assert (granite.embedding_scale, granite.logit_scale) == (12, 1 / 8)
    assert (block.residual_scale, block.attention.scale, block.attention.dropout) == (0.22, 1 / 64, 0.1)
    assert (gemma2.embedding_scale, gemma2.norm_offset, gemma2.logit_soft_cap) == (48, 1, 30)
    assert (gemma2.blocks[0].attention.soft_cap, gemma2.blocks[0].mlp.activation) == (50, "gelu_pytorch_tanh")
    assert architecture("google/gemma-2b").blocks[0].mlp.activation == "gelu_pytorch_tanh"  # the file says gelu
    lite, third = (architecture(f"deepseek-ai/DeepSeek-{name}") for name in ("V2-Lite", "V3"))
    assert [isinstance(block.mlp, MoE) for block in lite.blocks[:2]] == [False, True]
    assert lite.blocks[1].attention.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * 3.6888794541139363 + 1) ** 2)
    moe = third.blocks[3].mlp
    assert (moe.groups, moe.top_groups, moe.top_k, moe.weight_scale, moe.router) == (8, 4, 8, 2.5, "sigmoid")
    assert {type(block.attention) for block in (*lite.blocks, *third.blocks)} == {LatentAttention}
    norms = {name: found.qk_norm for name in PUBLISHED
             if isinstance(found := architecture(name).blocks[0].attention, Attention) and found.qk_norm}  # fmt: skip
    assert norms == {"Qwen/Qwen3-0.6B": "head", "Qwen/Qwen3-30B-A3B": "head", "google/gemma-3-1b-it": "head",
                     "allenai/OLMo-2-0425-1B": "all_heads"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("deepseek-ai/DeepSeek-V3", {}, "quantization_config: the weights are quantized"),
        ("google/gemma-3-1b-it", {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
         "a model for images and text; only text models"),
        ("microsoft/Phi-4-mini-instruct", {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"]}, "'phi4mm'"),
        ("Qwen/Qwen3-0.6B", {"architectures": ["Qwen2ForCausalLM"]}, "architectures names 'Qwen2ForCausalLM'"),
        ("Qwen/Qwen3-0.6B", {"architectures": ["Qwen3ForSequenceClassification"]}, "not a causal language model"),
        ("HuggingFaceTB/SmolLM3-3B", {"num_hidden_layers": 35}, "36 entries, and the model 35 layers"),
        ("microsoft/Phi-4-mini-instruct", {"partial_rotary_factor": 1.0}, "48 numbers; 64 frequencies"),
        ("mistralai/Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts"),
    ],
)  # fmt: skip
def test_what_is_published_in_a_form_that_is_not_computed_is_refused(name, fields, words):
    with pytest.raises(ModelError, match=f"^config.json: .*{words}"):
        make_config({**read(name), **fields}, "config.json")
