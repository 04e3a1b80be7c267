"""Families, fields and generation settings of model folders as people have them, and what is refused."""

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
from oarlock.sampling.params import SamplingParams

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 64}


# families


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "model_type 'qwen3_next' is not supported"),
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "'falcon' is not supported; Oarlock has llama, qwen2"),
        ({"model_type": "llama", "architectures": ["Qwen3ForCausalLM"]}, "architectures names 'Qwen3ForCausalLM'"),
        ({"model_type": "gemma", "architectures": ["Gemma2ForCausalLM"]}, "architectures names 'Gemma2ForCausalLM'"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["FalconForCausalLM"]}, "neither a model_type nor a known class"),
        ({"model_type": "gpt_oss"}, "gpt_oss models can't be run here: our decoder's experts"),
        ({"model_type": "gemma3"}, r"gemma3 models can't be run here: .* text models \(gemma3_text\)"),
        ({}, "neither a model_type"),
    ],
)  # fmt: skip
def test_a_family_that_is_not_there_in_one_sentence(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content | SIZES))
    for road in (
        lambda: read_config(tmp_path),
        lambda: read_config_by_name(str(tmp_path)),
        lambda: convert(tmp_path, tmp_path / "out", "hf"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            road()
        assert "\n" not in str(caught.value)


def test_a_class_alone_and_chatglm2_under_its_published_name():
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
def test_fields_that_are_refused_whoever_wrote_them(family, fields, words, stamp):
    sizes = {} if family in ("opt", "bloom", "gptj") else SIZES
    with pytest.raises(ModelError, match=words):
        make_config({"model_type": family, **sizes, **stamp, **fields}, "x")


def test_gemmas_gelu_is_the_approximation_but_where_paddlenlp_wrote_it():
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
    nulls = ("rope_scaling", "quantization_config", "pad_token_id", "head_dim", "logit_scale",
             "hidden_act", "torch_dtype", "unheard_of")  # fmt: skip
    found = make_config({"model_type": family, **dict.fromkeys(nulls)}, "x")
    assert {k: v for k, v in vars(found).items() if k != "quantization_config"} == {
        k: v for k, v in vars(plain).items() if k != "quantization_config"
    }


def test_fields_without_effect_and_neutral_values_are_let_pass():
    notes = {"_name_or_path": "a", "unsloth_version": "2", "license": "mit", "pretraining_tp": 4, "temperature": 0.6,
             "id2label": {"0": "a"}, "mlp_bias": False, "logits_scaling": 1.0, "head_dim": 8, "use_mrope": False,
             "rope_interleaved": False, "is_llama_config": True, "partial_rotary_factor": 1.0, "tensor_parallel_degree": 8, "use_flash_attention": True}  # fmt: skip
    found = make_config({"model_type": "llama", **SIZES, **notes}, "x")
    assert found.tensor_parallel_degree in (-1, 1) and not found.use_flash_attention


def test_windows():
    def windows(family: str, **fields) -> list:
        config = make_config({"model_type": family, **SIZES, "num_key_value_heads": 4, **fields}, "x")
        return [block.attention.window for block in FAMILIES[family].decoder(config).blocks]

    assert windows("mistral") == [4096, 4096] and windows("mistral", sliding_window=None) == [None, None]
    assert windows("qwen2", sliding_window=8, max_window_layers=1) == [None, None]
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("qwen2", **used, max_window_layers=1) == windows("qwen3", **used, max_window_layers=1) == [None, 8]
    assert windows("qwen2", **used, max_window_layers=2) == [None, None]
    lower = {"layer_types": ["sliding_attention", "full_attention"]}
    assert windows("qwen2", **used, **lower) == windows("qwen3", **used, **lower) == [8, None]
    assert windows("qwen2_moe", **used) == windows("gemma2", sliding_window=8) == [8, None]
    assert windows("gemma3_text", sliding_window=8, sliding_window_pattern=2) == [8, None]
    assert windows("smollm3", **used, no_rope_layer_interval=2) == [None, 8]
    with pytest.raises(
        ModelError, match="layer_types has to name one of sliding_attention and full_attention for each of"
    ):
        windows("gemma2", layer_types=["full_attention"])
    with pytest.raises(ModelError, match="all layers of mistral are of one kind"):
        windows("mistral", **lower)


# generation settings


def test_end_tokens_of_all_places():
    config, tokenizer = SimpleNamespace(eos_token_id=[1, 2]), SimpleNamespace(eos_token_id=0)
    assert find_end_tokens({"eos_token_id": [2, 9]}, config, tokenizer) == (0, 1, 2, 9)
    assert find_end_tokens({}, SimpleNamespace(eos_token_id=None), None) == ()
    with pytest.raises(ModelError, match="eos_token_id has to be a token id or a list"):
        find_end_tokens({"eos_token_id": "</s>"}, config, tokenizer)


def test_sampling_defaults_are_for_what_a_request_leaves_open():
    content = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1}
    defaults = read_sampling_defaults(content)
    assert defaults == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    asked = SamplingParams(temperature=0.2, given=frozenset({"temperature"})).with_defaults(defaults)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty) == (0.2, 0.9, 0, 1.1)
    assert SamplingParams().with_defaults(defaults) == SamplingParams()  # of a program: all of it is meant
    assert read_sampling_defaults({"temperature": 0.6}) == {}  # the likeliest token, without do_sample
    assert read_sampling_defaults({"decode_strategy": "sampling"}) == {"temperature": 1.0}
    with pytest.raises(ModelError, match="top_p is 3"):
        read_sampling_defaults({"top_p": 3})


def test_damaged_generation_settings_are_told(tmp_path):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_generation_config(tmp_path)


def test_configurations_that_paddlenlp_carries_are_read():
    """Those of the hub names in its code, older nested ones too."""
    from oarlock.model_config.load import find_config_class

    read = 0
    for family in FAMILIES:
        for name, content in find_config_class(family).pretrained_init_configuration.items():
            if isinstance(content, dict):
                assert make_config({"model_type": family, **content}, name).model_type == family
                read += 1
    assert read > 5


def test_how_a_run_computed_is_no_field_of_the_model():
    run = {"use_fast_layer_norm": False, "use_fused_rms_norm": True, "recompute": True, "recompute_granularity": "full",
           "tensor_parallel_output": True, "seq_length": 128, "virtual_pp_degree": 2}  # fmt: skip
    found = make_config({"model_type": "llama", "paddlenlp_version": "3.0.0b4", **SIZES, **run}, "x")
    assert not found.use_fused_rms_norm and not found.recompute
