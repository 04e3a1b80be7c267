"""Model folders as people bring them: which files are the weights, which families and fields are read, what is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from helpers import make_tiny_model
from oarlock.errors import ModelError
from oarlock.export.convert import ConvertOptions, convert
from oarlock.model_config.builtin_configs import model_config_content
from oarlock.model_config.generation_config import end_tokens, generation_content, sampling_defaults
from oarlock.model_config.load import config_of, read_config
from oarlock.model_config.sliding_window import check_window, window_of
from oarlock.models.ask import ask_model
from oarlock.models.build import ModelSource, build_model
from oarlock.parallel.family_rules import FAMILIES
from oarlock.serve.engine.sampling_params import Sampling
from oarlock.weights.weight_files import INDEX_NAME, find_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def paddle_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("paddle"))


@pytest.fixture(scope="module")
def model(paddle_model, tmp_path_factory) -> Path:
    """In Hugging Face's layout; only ever read."""
    convert(paddle_model, output := tmp_path_factory.mktemp("hf") / "m", "hf", ConvertOptions(proof=False))
    return output


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(model, tmp_path / "m")


def put(folder: Path, name: str, arrays: dict[str, np.ndarray], layout: str | None = "pt") -> None:
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(arrays, folder / name, metadata={"format": layout} if layout else None)


def cut(arrays: dict[str, np.ndarray], parts: int) -> list[dict[str, np.ndarray]]:
    names = sorted(arrays)
    return [{name: arrays[name] for name in names[i::parts]} for i in range(parts)]


def put_shards(folder: Path, arrays: dict[str, np.ndarray], parts: int, index: bool) -> None:
    weight_map = {}
    for i, part in enumerate(cut(arrays, parts), 1):
        name = f"model-{i:05d}-of-{parts:05d}.safetensors"
        put(folder, name, part)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """What torch.save's archive shows without unpickling."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"never read")
        for i, values in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", values.tobytes())


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


# which files


def test_shards_with_and_without_their_index_are_the_same_model(folder):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 3, index=False)
    files, layout = find_weights(folder)
    assert set(files) == set(arrays) and layout == "pt" and len(set(files.values())) == 3
    put_shards(folder, arrays, 3, index=True)
    assert find_weights(folder) == (files, layout)


def test_two_sets_are_refused_with_both_names(folder):
    arrays = weights(folder)
    put_shards(folder, arrays, 2, index=True)
    with pytest.raises(
        ModelError, match=r"two sets of weights: model.safetensors.index.json \(.*00002-of-00002.* and model.safe"
    ):
        find_weights(folder)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(
        ModelError, match=r"two sets of weights: model.safetensors and model-00001-of-00002.safetensors"
    ):
        find_weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 3, index=False)
    with pytest.raises(ModelError, match=r"two sets of weights: model-00001-of-00002.* and model-00001-of-00003"):
        find_weights(folder)
    for path in folder.glob("model-*-of-00002*"):
        path.unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="is one of 3 files, and there are 2 of them"):
        find_weights(folder)


def test_an_index_has_to_be_right(folder):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 2, index=True)
    content = json.loads((folder / INDEX_NAME).read_text())
    names = sorted(content["weight_map"])

    def changed(**changes) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": content["weight_map"] | changes}))
        find_weights(folder)

    with pytest.raises(ModelError, match="should be in this file and is not"):
        changed(**{names[0]: content["weight_map"][names[1]]})
    with pytest.raises(ModelError, match=r"the name of a file beside it"):
        changed(**{names[0]: "../model.safetensors"})
    with pytest.raises(ModelError, match=r"names gone.safetensors, which is not there"):
        changed(**{names[0]: "gone.safetensors"})
    del content["weight_map"][names[0]]
    with pytest.raises(ModelError, match=f"it holds {names[0]}, which .* does not look for there"):
        changed()
    changed_arrays = arrays | {names[0]: arrays[names[0]] + 1}
    (folder / INDEX_NAME).unlink()
    put(folder, "model-00002-of-00002.safetensors", {names[0]: changed_arrays[names[0]]})
    with pytest.raises(ModelError, match=f"{names[0]} is in model-00001.* and in model-00002.*no index says which"):
        find_weights(folder)


def test_pickles_beside_safetensors(folder, capsys):
    arrays = weights(folder)
    put_torch(folder / "pytorch_model.bin", arrays | {"inv_freq": np.zeros(4, "f4")})
    for name in ("consolidated.00.safetensors", "model.fp16.safetensors"):
        put(folder, name, {"tok_embeddings.weight": np.zeros([2, 2], "f4")})
    (folder / "original").mkdir()
    assert set(find_weights(folder)[0].values()) == {folder / "model.safetensors"}
    said = capsys.readouterr().out
    assert "model.safetensors is read; not read: consolidated.00.safetensors, model.fp16.safetensors, original" in said
    assert "pytorch_model.bin" in said
    put_torch(folder / "pytorch_model.bin", arrays | {"lm_head.weight": arrays["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and pytorch_model.bin"):
        find_weights(folder)
    put_torch(folder / "pytorch_model.bin", {name: values.astype("f2") for name, values in arrays.items()})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and pytorch_model.bin"):
        find_weights(folder)
    (folder / "pytorch_model.bin").unlink()
    size = sum(values.nbytes for values in arrays.values())
    (folder / "model_state.pdparams").write_bytes(b"\x80" * (size + 2000))  # sizes are all that it shows
    find_weights(folder)
    (folder / "model_state.pdparams").write_bytes(b"\x80" * (3 * size + (4 << 20)))
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and model_state.pdparams"):
        find_weights(folder)


@given(data=st.data())
def test_an_archive_of_other_values_is_told_by_its_check_sums(data, tmp_path_factory):
    from oarlock.weights.pickle_duplicates import differing_pickle

    folder = tmp_path_factory.mktemp("twins")
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    random = np.random.default_rng(0)
    arrays = {f"t{i}": random.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    put(folder, "model.safetensors", arrays)
    put_torch(folder / "pytorch_model.bin", arrays)
    files = [folder / "model.safetensors"], [folder / "pytorch_model.bin"]
    assert differing_pickle(*files) is None
    name = data.draw(st.sampled_from(sorted(arrays)))
    put_torch(folder / "pytorch_model.bin", arrays | {name: np.nextafter(arrays[name], np.float32(9))})
    assert differing_pickle(*files) == "pytorch_model.bin"
    assert zlib.crc32(arrays[name].tobytes()) != 0


def test_a_pickle_of_two_kinds(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "model_state.pdparams").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"two sets of weights: model_state.pdparams and pytorch_model.bin"):
        build_model(ModelSource(folder, read_config(folder), True), allow_pickle=True)


def test_a_whole_model_beside_an_adapter(folder):
    put(folder, "adapter_model.safetensors", {"x": np.zeros(1, "f4")})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and adapter_model.safetensors"):
        find_weights(folder)


# headers of other programs


@pytest.mark.parametrize("said", [None, "pt", "mlx"])
def test_layouts_that_are_read(folder, paddle_model, said):
    put(folder, "model.safetensors", weights(folder), said)
    found = build_model(ModelSource(folder, read_config(folder), True)).state_dict()
    wanted = build_model(ModelSource(paddle_model, read_config(paddle_model), True)).state_dict()
    assert all(np.array_equal(found[name].numpy(), value.numpy()) for name, value in wanted.items())


def test_paddles_layout_without_a_header_is_told_by_its_names(paddle_model, tmp_path):
    folder = shutil.copytree(paddle_model, tmp_path / "m")
    put(folder, "model.safetensors", weights(folder), None)
    assert find_weights(folder)[1] == "np"
    build_model(ModelSource(folder, read_config(folder), True))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("tf", "another framework .format 'tf'"),
        ("flax", "format 'flax'"),
        ("np", "says format 'np', .* names of the other"),
    ],
)
def test_headers_that_are_refused(folder, said, words):
    put(folder, "model.safetensors", weights(folder), said)
    with pytest.raises(ModelError, match=words):
        find_weights(folder)


def test_whole_numbers_and_pointers_are_no_weights(folder):
    arrays = load_file(folder / "model.safetensors")
    name = next(name for name in arrays if name.endswith("down_proj.weight"))
    put(folder, "model.safetensors", {**arrays, name: arrays[name].astype(np.int8)})
    with pytest.raises(ModelError, match=rf"{name} is stored in int8: quantised weights"):
        list(ask_model(str(folder), ["a"], 2))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS"):
        find_weights(folder)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf is not read"):
        find_weights(folder)


def test_files_of_both_layouts(folder, paddle_model):
    arrays, own = cut(weights(folder), 2)[0], cut(weights(paddle_model), 2)[1]
    (folder / "model.safetensors").unlink()
    put(folder, "model-00001-of-00002.safetensors", arrays)
    put(folder, "model-00002-of-00002.safetensors", own, "np")
    with pytest.raises(ModelError, match=r"00001-of-00002.*00002-of-00002.*Paddle's layout and one in Hugging Face's"):
        find_weights(folder)


# tensors


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
        ("model.layers.1.self_attn.q_norm.weight", (8,)),
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", (4, 32)),
        ("model.layers.2.mlp.up_proj.weight", (64, 32)),
        ("model.layers.0.self_attn.q_proj.scales", (32, 4)),
        ("score.weight", (2, 32)),
    ],
)
def test_a_tensor_that_is_not_used_is_refused_on_every_road(folder, name, shape, tmp_path):
    put(folder, "model.safetensors", weights(folder) | {name: np.ones(shape, "f4")})
    source = ModelSource(folder, read_config(folder), True)
    roads = {
        "training, serving": lambda: build_model(source),
        "ask": lambda: list(ask_model(str(folder), ["a"], 2)),
        "convert": lambda: convert(folder, tmp_path / "out", "paddle", ConvertOptions(proof=False)),
    }
    for road, go in roads.items():
        with pytest.raises(ModelError, match=f"{name}. is left over"):
            go()
        assert not (tmp_path / "out").exists(), road


def test_tables_that_layers_compute_are_no_weights(folder):
    arrays = weights(folder)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, "f4") for i in range(2)}
    put(folder, "model.safetensors", arrays | tables)
    model = build_model(ModelSource(folder, read_config(folder), True))
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), arrays["lm_head.weight"].T)


def test_missing_tensors_and_other_shapes(folder):
    arrays = weights(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    put(folder, "model.safetensors", {key: value for key, value in arrays.items() if key != name})
    with pytest.raises(ModelError, match=r"no weights for 1 of 21 parameters .llama.layers.1.mlp.down_proj.weight"):
        build_model(ModelSource(folder, read_config(folder), True))
    put(folder, "model.safetensors", arrays | {name: arrays[name].T})
    with pytest.raises(ModelError, match=r"down_proj.weight is \[32, 64\], the model expects \[64, 32\]"):
        build_model(ModelSource(folder, read_config(folder), True))


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
def test_a_family_that_is_not_there_in_one_sentence(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content | SIZES))
    for road in (
        lambda: read_config(tmp_path),
        lambda: model_config_content(str(tmp_path)),
        lambda: convert(tmp_path, tmp_path / "out", "hf"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            road()
        assert "\n" not in str(caught.value)


def test_a_class_alone_and_chatglm2_under_its_published_name():
    assert config_of({"architectures": ["LlamaForCausalLM"], **SIZES}, "x").model_type == "llama"
    found = config_of({"model_type": "chatglm", "architectures": ["ChatGLMModel"], "multi_query_group_num": 2,
                       "num_layers": 2, "padded_vocab_size": 64, "rmsnorm": True, "torch_dtype": "float16"}, "x")  # fmt: skip
    assert (found.model_type, found.num_hidden_layers, found.vocab_size) == ("chatglm_v2", 2, 64)
    with pytest.raises(ModelError, match=r"rope_ratio is 50"):
        config_of({"model_type": "chatglm", "multi_query_group_num": 2, "rope_ratio": 50}, "x")


# fields


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config: the weights are quantised"),
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
        ("llama", {"eos_token_id": "2"}, "eos_token_id must be a whole number or a list"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be a whole number"),
        ("llama", {"rms_norm_eps": None, "tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ("llama", {"torch_dtype": "float32", "dtype": "bfloat16"}, "torch_dtype is float32 and dtype is bfloat16"),
        ("llama", {"dtype": "float8_e4m3fn"}, "not one of float32, float16, bfloat16"),
        ("gemma", {"hidden_act": "silu", "head_dim": 8}, "hidden_act is 'silu'"),
        ("opt", {"ffn_dim": 64, "intermediate_size": 128}, "ffn_dim is 64 and intermediate_size is 128"),
        ("bloom", {"n_head": 4, "num_attention_heads": 8}, "given twice"),
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
        config_of({"model_type": family, **sizes, **stamp, **fields}, "x")


def test_gemmas_gelu_is_the_approximation_but_where_paddlenlp_wrote_it():
    def act(**fields) -> str:
        return config_of(
            {"model_type": "gemma", **SIZES, "num_key_value_heads": 4, "head_dim": 8, **fields}, "x"
        ).hidden_act

    assert act(hidden_act="gelu") == act(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh") == act()
    assert act() == "gelu_pytorch_tanh"
    assert act(hidden_act="gelu_python") == act(hidden_act="gelu", paddlenlp_version="3") == "gelu"
    with pytest.raises(ModelError, match="hidden_act is 'gelu' and hidden_activation 'gelu'"):
        act(hidden_act="gelu", hidden_activation="gelu")


@pytest.mark.parametrize("family", FAMILIES)
def test_nulls_are_absent(family):
    plain = config_of({"model_type": family}, "x")
    nulls = ("num_key_value_heads", "rope_scaling", "quantization_config", "pad_token_id", "head_dim", "logit_scale",
             "hidden_act", "torch_dtype", "unheard_of")  # fmt: skip
    found = config_of({"model_type": family, **dict.fromkeys(nulls)}, "x")
    assert {k: v for k, v in vars(found).items() if k != "quantization_config"} == {
        k: v for k, v in vars(plain).items() if k != "quantization_config"
    }


def test_fields_without_effect_and_neutral_values_are_let_pass():
    notes = {"_name_or_path": "a", "unsloth_version": "2", "license": "mit", "pretraining_tp": 4, "temperature": 0.6,
             "id2label": {"0": "a"}, "mlp_bias": False, "logits_scaling": 1.0, "head_dim": 8, "use_mrope": False,
             "rope_interleaved": False, "is_llama_config": True, "partial_rotary_factor": 1.0, "tensor_parallel_degree": 8, "use_flash_attention": True}  # fmt: skip
    found = config_of({"model_type": "llama", **SIZES, **notes}, "x")
    assert found.tensor_parallel_degree in (-1, 1) and not found.use_flash_attention


def test_windows():
    long = {"model_type": "mistral", **SIZES, "num_key_value_heads": 4}
    assert (
        window_of(config_of(long, "x")) == 4096 and window_of(config_of(long | {"sliding_window": None}, "x")) is None
    )
    config = config_of(long | {"sliding_window": 64}, "x")
    check_window(config, 64, "x", "--max_seq_length asks for")
    with pytest.raises(ModelError, match=r"--max_seq_length asks for 65 tokens.*64 alone \(sliding_window in x\)"):
        check_window(config, 65, "x", "--max_seq_length asks for")
    qwen = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4, "sliding_window": 8, "max_window_layers": 1}
    assert window_of(config_of(qwen, "x")) is None
    assert window_of(config_of(qwen | {"use_sliding_window": True}, "x")) == 8
    assert window_of(config_of(qwen | {"use_sliding_window": True, "max_window_layers": 2}, "x")) is None


# generation settings


def test_end_tokens_of_all_places():
    config, tokenizer = SimpleNamespace(eos_token_id=[1, 2]), SimpleNamespace(eos_token_id=0)
    assert end_tokens({"eos_token_id": [2, 9]}, config, tokenizer) == (0, 1, 2, 9)
    assert end_tokens({}, SimpleNamespace(eos_token_id=None), None) == ()
    with pytest.raises(ModelError, match="eos_token_id has to be a token id or a list"):
        end_tokens({"eos_token_id": "</s>"}, config, tokenizer)


def test_sampling_defaults_are_for_what_a_request_leaves_open():
    content = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1}
    defaults = sampling_defaults(content)
    assert defaults == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    asked = Sampling(temperature=0.2, given=frozenset({"temperature"})).with_defaults(defaults)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty) == (0.2, 0.9, 0, 1.1)
    assert Sampling().with_defaults(defaults) == Sampling()  # of a program: all of it is meant
    assert sampling_defaults({"temperature": 0.6}) == {}  # the likeliest token, without do_sample
    assert sampling_defaults({"decode_strategy": "sampling"}) == {"temperature": 1.0}
    with pytest.raises(ModelError, match="top_p is 3"):
        sampling_defaults({"top_p": 3})


def test_damaged_generation_settings_are_told(tmp_path):
    assert generation_content(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="not valid JSON"):
        generation_content(tmp_path)


def test_bfloat16_beside_a_float32_word_is_no_matter(folder):
    rounded = {name: values.astype(ml_dtypes.bfloat16) for name, values in weights(folder).items()}
    put(folder, "model.safetensors", rounded)
    model = build_model(ModelSource(folder, read_config(folder), True))
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), rounded["lm_head.weight"].astype("float32").T)


def test_configurations_that_paddlenlp_carries_are_read():
    """Those of the hub names in its code, older nested ones too."""
    from oarlock.model_config.load import _config_class

    read = 0
    for family in FAMILIES:
        for name, content in _config_class(family).pretrained_init_configuration.items():
            if isinstance(content, dict):
                assert config_of({"model_type": family, **content}, name).model_type == family
                read += 1
    assert read > 5


def test_how_a_run_computed_is_no_field_of_the_model():
    run = {"use_fast_layer_norm": False, "use_fused_rms_norm": True, "recompute": True, "recompute_granularity": "full",
           "tensor_parallel_output": True, "seq_length": 128, "virtual_pp_degree": 2}  # fmt: skip
    found = config_of({"model_type": "llama", "paddlenlp_version": "3.0.0b4", **SIZES, **run}, "x")
    assert not found.use_fused_rms_norm and not found.recompute
