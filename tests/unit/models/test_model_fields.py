"""Families, fields and generation settings of published model folders, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from oarlock.errors import ModelError
from oarlock.export.convert import convert
from oarlock.families.registry import FAMILIES
from oarlock.model_config.builtin_configs import read_config_by_name
from oarlock.model_config.generation_config import find_end_tokens, read_generation_config, read_sampling_defaults
from oarlock.model_config.load import make_config, read_config
from oarlock.model_config.sliding_window import check_window, find_window
from oarlock.sampling.params import SamplingParams

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 64}


# families


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "model_type 'qwen2_moe' is not supported"),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "'deepseek_v3' is not supported"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "'qwen3' is not supported; Oarlock has llama, qwen2"),
        ({"model_type": "llama", "architectures": ["Qwen3ForCausalLM"]}, "architectures names 'Qwen3ForCausalLM'"),
        ({"model_type": "gemma", "architectures": ["Gemma2ForCausalLM"]}, "architectures names 'Gemma2ForCausalLM'"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["FalconForCausalLM"]}, "neither a model_type nor a known class"),
        ({"model_type": "mixtral"}, "mixtral models can't be run here"),
        ({}, "neither a model_type"),
    ],
)  # fmt: skip
def test_an_unknown_family_is_refused_in_one_sentence(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content | SIZES))
    for road in (
        lambda: read_config(tmp_path),
        lambda: read_config_by_name(str(tmp_path)),
        lambda: convert(tmp_path, tmp_path / "out", "hf"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            road()
        assert "\n" not in str(caught.value)


def test_families_are_detected_from_the_class_and_chatglm2_from_its_published_name():
    assert make_config({"architectures": ["LlamaForCausalLM"], **SIZES}, "x").model_type == "llama"
    found = make_config({"model_type": "chatglm", "architectures": ["ChatGLMModel"], "multi_query_group_num": 2,
                       "num_layers": 2, "padded_vocab_size": 64, "rmsnorm": True, "torch_dtype": "float16"}, "x")  # fmt: skip
    assert (found.model_type, found.num_hidden_layers, found.vocab_size) == ("chatglm_v2", 2, 64)
    with pytest.raises(ModelError, match=r"rope_ratio is 50"):
        make_config({"model_type": "chatglm", "multi_query_group_num": 2, "rope_ratio": 50}, "x")


# fields


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config: the weights are quantized"),
        ("llama", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping \(30.0\)"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("llama", {"layer_norm_eps": 1e-5}, r"layer_norm_eps \(1e-05\)"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"num_experts": 8}, "num_experts"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm"),
        ("llama", {"sliding_window": 4}, "sliding_window"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2]}}, "rope_scaling of type 'mrope'"),
        ("qwen2", {"rope_scaling_type": "linear"}, "rope_scaling_type is 'linear'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters of single layers"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "say different things"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("llama", {"rope_scaling": "linear"}, "must be an object"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling with factor 2.0 does not say its type"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "names 'dynamic' and 'linear'"),
        ("llama", {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "has to be of one type"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0, and 500000.0 among"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta must be .*; got nan"),
        ("llama", {"max_position_embeddings": -5}, "max_position_embeddings must be .* 1; got -5"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps must be .*; got inf"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id must be an integer or a list"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be an integer"),
        ("llama", {"rms_norm_eps": None, "tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ("llama", {"torch_dtype": "float32", "dtype": "bfloat16"}, "torch_dtype is float32 and dtype is bfloat16"),
        ("llama", {"dtype": "float8_e4m3fn"}, "not one of float32, float16, bfloat16"),
        ("gemma", {"hidden_act": "silu", "head_dim": 8}, "hidden_act is 'silu'"),
        ("opt", {"ffn_dim": 64, "intermediate_size": 128}, "ffn_dim is 64 and intermediate_size is 128"),
        ("bloom", {"n_head": 4, "num_attention_heads": 8}, "is set twice"),
        ("gptj", {"rotary_dim": None}, "rotary_dim has to be a whole number"),
        ("mistral", {"layer_types": ["chunked_attention"]}, "layer_types"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "stamp", [{}, {"transformers_version": "4.55.0", "use_cache": True}, {"paddlenlp_version": "3"}]
)
def test_unsupported_fields_are_refused_from_any_writer(family, fields, words, stamp):
    sizes = {} if family in ("opt", "bloom", "gptj") else SIZES
    with pytest.raises(ModelError, match=words):
        make_config({"model_type": family, **sizes, **stamp, **fields}, "x")


def test_gemma_uses_approximate_gelu_except_in_paddlenlp_folders():
    def act(**fields) -> str:
        return make_config(
            {"model_type": "gemma", **SIZES, "num_key_value_heads": 4, "head_dim": 8, **fields}, "x"
        ).hidden_act

    assert act(hidden_act="gelu") == act(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh") == act()
    assert act() == "gelu_pytorch_tanh"
    assert act(hidden_act="gelu_python") == act(hidden_act="gelu", paddlenlp_version="3") == "gelu"
    with pytest.raises(ModelError, match="hidden_act is 'gelu' and hidden_activation 'gelu'"):
        act(hidden_act="gelu", hidden_activation="gelu")


@pytest.mark.parametrize("family", FAMILIES)
def test_nulls_are_absent(family):
    plain = make_config({"model_type": family}, "x")
    nulls = ("num_key_value_heads", "rope_scaling", "quantization_config", "pad_token_id", "head_dim", "logit_scale",
             "hidden_act", "torch_dtype", "unheard_of")  # fmt: skip
    found = make_config({"model_type": family, **dict.fromkeys(nulls)}, "x")
    assert {k: v for k, v in vars(found).items() if k != "quantization_config"} == {
        k: v for k, v in vars(plain).items() if k != "quantization_config"
    }


def test_fields_without_effect_and_neutral_values_are_accepted():
    notes = {"_name_or_path": "a", "unsloth_version": "2", "license": "mit", "pretraining_tp": 4, "temperature": 0.6,
             "id2label": {"0": "a"}, "mlp_bias": False, "logits_scaling": 1.0, "head_dim": 8, "use_mrope": False,
             "rope_interleaved": False, "is_llama_config": True, "partial_rotary_factor": 1.0, "tensor_parallel_degree": 8, "use_flash_attention": True}  # fmt: skip
    found = make_config({"model_type": "llama", **SIZES, **notes}, "x")
    assert found.tensor_parallel_degree in (-1, 1) and not found.use_flash_attention


def test_sliding_windows():
    long = {"model_type": "mistral", **SIZES, "num_key_value_heads": 4}
    assert (
        find_window(make_config(long, "x")) == 4096
        and find_window(make_config(long | {"sliding_window": None}, "x")) is None
    )
    config = make_config(long | {"sliding_window": 64}, "x")
    check_window(config, 64, "x", "--max_seq_length asks for")
    with pytest.raises(ModelError, match=r"--max_seq_length asks for 65 tokens.*64 \(sliding_window in x\)"):
        check_window(config, 65, "x", "--max_seq_length asks for")
    qwen = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4, "sliding_window": 8, "max_window_layers": 1}
    assert find_window(make_config(qwen, "x")) is None
    assert find_window(make_config(qwen | {"use_sliding_window": True}, "x")) == 8
    assert find_window(make_config(qwen | {"use_sliding_window": True, "max_window_layers": 2}, "x")) is None


# generation settings


def test_end_tokens_from_every_file():
    config, tokenizer = SimpleNamespace(eos_token_id=[1, 2]), SimpleNamespace(eos_token_id=0)
    assert find_end_tokens({"eos_token_id": [2, 9]}, config, tokenizer) == (0, 1, 2, 9)
    assert find_end_tokens({}, SimpleNamespace(eos_token_id=None), None) == ()
    with pytest.raises(ModelError, match="eos_token_id has to be a token id or a list"):
        find_end_tokens({"eos_token_id": "</s>"}, config, tokenizer)


def test_sampling_defaults_apply_only_to_omitted_fields():
    content = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1}
    defaults = read_sampling_defaults(content)
    assert defaults == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    asked = SamplingParams(temperature=0.2, given=frozenset({"temperature"})).with_defaults(defaults)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty) == (0.2, 0.9, 0, 1.1)
    assert SamplingParams().with_defaults(defaults) == SamplingParams()  # written by a program: all of it counts
    assert read_sampling_defaults({"temperature": 0.6}) == {}  # the most likely token, without do_sample
    assert read_sampling_defaults({"decode_strategy": "sampling"}) == {"temperature": 1.0}
    with pytest.raises(ModelError, match="top_p is 3"):
        read_sampling_defaults({"top_p": 3})


def test_damaged_generation_settings_are_reported(tmp_path):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_generation_config(tmp_path)


def test_configurations_from_paddlenlp_are_read():
    """The configurations of models listed in its code, including older nested ones."""
    from oarlock.model_config.load import find_config_class

    read = 0
    for family in FAMILIES:
        for name, content in find_config_class(family).pretrained_init_configuration.items():
            if isinstance(content, dict):
                assert make_config({"model_type": family, **content}, name).model_type == family
                read += 1
    assert read > 5


def test_run_settings_are_not_saved_as_model_fields():
    run = {"use_fast_layer_norm": False, "use_fused_rms_norm": True, "recompute": True, "recompute_granularity": "full",
           "tensor_parallel_output": True, "seq_length": 128, "virtual_pp_degree": 2}  # fmt: skip
    found = make_config({"model_type": "llama", "paddlenlp_version": "3.0.0b4", **SIZES, **run}, "x")
    assert not found.use_fused_rms_norm and not found.recompute
