"""Every family: registry, full training, generation, early refusals."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from families import FAMILIES as TINY
from families import family_config
from helpers import logits_of
from oarlock.config import FinetuneConfig
from oarlock.errors import ConfigError, ModelError
from oarlock.families.registry import FAMILIES
from oarlock.model_config.load import find_model_class
from oarlock.models.build import ModelSource, build_model, check_lengths, find_model
from oarlock.models.layer_offload import make_empty_model, stream_logits
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.train.finetune import finetune
from oarlock.weights.hf_names import list_hf_names
from oarlock.weights.layout import parameter_shards
from support.family_checks import (
    NAMES,
    TEXT,
    WITH_PREFIX,
    all_have_gradients,
    check_generation,
    compute_logits,
    randomize_trained,
    with_method,
)

# ChatGLM's prompt format: a question, [gMASK] (1), the beginning of the answer (2), the answer.
TWO_PART = [[9, 30, 41, 1, 2, 88, 33, 12], [400, 5, 1, 2, 310, 6, 44, 219]]


# the registry


def test_every_family_with_paddlenlps_configuration_is_tested_here():
    """parity/test_decoder_families.py has the others."""
    assert {name for name, family in FAMILIES.items() if not family.own_config} == set(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_is_correct(name):
    import paddlenlp.transformers

    family, config = FAMILIES[name], family_config(name)
    found = find_model_class(config)
    assert found.__name__ == family.architecture
    has_stages = hasattr(paddlenlp.transformers, f"{family.architecture}Pipe")
    assert family.pipeline is (has_stages or family.decoder is not None)
    assert is_readable_from_hugging_face(found, with_method(name)) is family.hf_weights
    assert all(not getattr(family, way) and not reason.endswith(".") for way, reason in family.why_not.items())


def is_readable_from_hugging_face(found, model) -> bool:
    """Whether PaddleNLP has a Hugging Face name for every parameter."""
    try:
        names = {mapping.target_name for _, mapping in list_hf_names(found, model.config)}
    except ModelError:
        return False
    return {parameter.name for parameter in parameter_shards(model) if hasattr(parameter.tensor, "trainable")} <= names


# full training


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_causal(name):
    model = with_method(name)
    model.train()
    before = compute_logits(model, TEXT).numpy()
    for place in (0, 4, 7):
        changed = np.array(TEXT)
        changed[:, place] += 1
        after = compute_logits(model, changed).numpy()
        assert np.allclose(after[:, :place], before[:, :place], atol=1e-6), "a later token was seen"
        assert (np.abs(after - before).max(axis=-1)[:, place:] > 1e-6).all(), "an earlier token was not seen"


@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_depend_on_other_rows_or_on_padding_ids(name):
    model = with_method(name)
    both = compute_logits(model, [[9, 0, 41, 0, 7], [0, 5, 0, 0, 6]]).numpy()
    alone = [compute_logits(model, [row]).numpy()[0] for row in ([9, 0, 41, 0, 7], [0, 5, 0, 0, 6])]
    assert np.allclose(both, alone, atol=1e-5)
    changed = compute_logits(model, [[9, 1, 41, 0, 7], [0, 5, 0, 0, 6]]).numpy()
    assert np.abs(changed - both)[0, 2].max() > 1e-4  # token 0 is an ordinary token
    compute_logits(model, [[9, 0, 41]])[:, :, 5].sum().backward()
    assert float(model.get_input_embeddings().weight.grad[0].abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_full_training_reaches_every_parameter(name):
    all_have_gradients(with_method(name))


@pytest.mark.parametrize("name", NAMES)
def test_generation(name):
    check_generation(with_method(name))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "glm"])  # whose output layer reads the embedding's
def test_layers_are_in_memory_one_at_a_time(name):
    model = with_method(name)
    held = {shard.name: shard.tensor.numpy() for shard in parameter_shards(model)}
    empty = make_empty_model(find_model_class(model.config), model.config)
    found = stream_logits(empty, lambda name, into: held[name], set(held), np.array(TEXT))
    np.testing.assert_allclose(found, logits_of(model, TEXT), rtol=0, atol=1e-6)
    assert not any(parameter._is_initialized() for parameter in empty.parameters())


def test_chatglm_attends_to_its_prompt_bidirectionally():
    model = with_method("chatglm")
    plain = compute_logits(model, TWO_PART).numpy()
    changed = np.array(TWO_PART)
    changed[0, 2], changed[1, 1] = 42, 6
    asked = compute_logits(model, changed).numpy()
    assert np.abs(asked - plain)[0, 0].max() > 1e-6 and np.abs(asked - plain)[1, 0].max() > 1e-6
    changed = np.array(TWO_PART)
    changed[:, 6] += 1  # in the answers
    answered = compute_logits(model, changed).numpy()
    assert np.allclose(answered[:, :6], plain[:, :6], atol=1e-6)


def test_chatglm_masks_and_positions_equal_paddlenlp():
    """As its tokenizer and get_position_ids compute them for one row."""
    model = with_method("chatglm")
    row = paddle.to_tensor(TWO_PART[:1])
    mask = np.tril(np.ones([8, 8], np.int64))
    mask[:, :4] = 1
    positions = model.get_position_ids(row, mask_positions=[3], use_gmasks=[True])
    theirs = type(model).forward(model, row, positions, paddle.to_tensor(mask[None, None]))[0]
    assert np.allclose(compute_logits(model, row).numpy(), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("method", [None, PTuning(3, "mlp"), Prefix(3)], ids=["full", "p_tuning", "prefix"])
def test_chatglm_answers_prompts_in_its_own_format(method):
    model = with_method("chatglm", method)
    randomize_trained(model, keep="" if method else "weight")
    check_generation(model, [[9, 30, 41, 1, 2], [400, 5, 1, 2], [7, 1, 2, 50]])


# early refusals


def find(folder, content, *words: str, start=False):
    from oarlock.config.load import load_config

    (folder / "config.json").write_text(json.dumps(content))
    words = ("--model_name_or_path", str(folder), "--output_dir", str(folder / "out"), "--do_train", *words)
    loaded = load_config(FinetuneConfig, list(words))
    return finetune(loaded) if start else find_model(loaded.config, from_weights=False)


def test_an_unsupported_family_is_refused(tmp_path):
    content = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    with pytest.raises(ModelError, match=r"gemma3 models can't be run here: .* a model for images and text"):
        find(tmp_path, content)


def test_an_unsupported_method_is_refused_before_weights_are_read(tmp_path):
    content = TINY["glm"] | {"model_type": "glm", "architectures": [FAMILIES["glm"].architecture]}
    PTuning(3).check("glm")
    for family in WITH_PREFIX:
        Prefix(3).check(family)
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    with pytest.raises(ModelError, match="--prefix_tuning: glm has none: its layers cache hidden states"):
        find(tmp_path, content, "--prefix_tuning", start=True)


def test_prefix_positions_count_towards_the_context(tmp_path):
    content = TINY["opt"] | {"model_type": "opt", "architectures": [FAMILIES["opt"].architecture]}
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    words = ("--prefix_tuning", "--num_prefix_tokens", "100", "--src_length", "100", "--tgt_length", "100")
    with pytest.raises(ConfigError, match=r"after the prefix asks for sequences of 300 tokens, .* supports 256"):
        find(tmp_path, content, *words, start=True)
    with pytest.raises(ConfigError, match=r"supports 256 .max_sequence_length"):
        source = ModelSource(tmp_path, family_config("glm"), from_weights=False)
        check_lengths(source, 257, "--max_seq_length")


def test_an_unsupported_weight_layout_is_refused_with_the_reason(tmp_path):
    save_file(
        {"transformer.layers.1.x": np.zeros([1000], np.float32)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    source = ModelSource(tmp_path, family_config("glm"), from_weights=True)
    with pytest.raises(
        ModelError, match=r"glm has none: its converter .* no longer exists; provide them in Paddle's format"
    ):
        build_model(source)
