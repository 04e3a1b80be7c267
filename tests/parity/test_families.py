"""Every family of the registry on a tiny random model: what it sees, and LoRA, prefix, p-tuning and generation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import save_file

from families import FAMILIES as TINY
from families import family_config, family_model
from oarlock.config import FinetuneConfig, shared
from oarlock.errors import ConfigError, ModelError
from oarlock.models.build import ModelSource, build_model, check_lengths, find_model, model_class
from oarlock.models.generate import generate_ids
from oarlock.parallel.family_rules import FAMILIES
from oarlock.peft.lora import LoRA
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.train.finetune import finetune
from oarlock.weights.layout import holdings
from oarlock.weights.sources import hugging_face_names

NAMES = list(TINY)
WITH_PREFIX = [name for name in NAMES if FAMILIES[name].past]
TOKENIZER = SimpleNamespace(eos_token_id=511, pad_token_id=0, bos_token_id=0)
TEXT = [[9, 30, 41, 100, 7, 88, 33, 12], [400, 5, 17, 23, 310, 6, 44, 219]]
ROWS = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47], [3, 300, 12, 14]]
# ChatGLM's own form: a question, [gMASK] (1), the beginning of the answer (2), the answer.
TWO_PART = [[9, 30, 41, 1, 2, 88, 33, 12], [400, 5, 1, 2, 310, 6, 44, 219]]


def with_method(name: str, method=None, **changes):
    return family_model(name, 3, method, use_cache=False, **changes)


def scores(model, ids, **kwargs) -> paddle.Tensor:
    """[batch, tokens, vocabulary], as the trainer takes them."""
    outputs = model(input_ids=paddle.to_tensor(ids), **kwargs)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def by_hand(model, row: list[int], count: int) -> list[int]:
    """Greedy ids of one row, each from a whole forward pass without a cache."""
    found: list[int] = []
    with paddle.no_grad():
        while len(found) < count:
            found.append(int(scores(model, [row + found])[0, -1].argmax()))
    return found[: found.index(TOKENIZER.eos_token_id)] if TOKENIZER.eos_token_id in found else found


def check_generation(model, rows=ROWS) -> None:
    """A padded batch with cache answers what each row gets alone and without."""
    model.eval()
    expected = [by_hand(model, row, 6) for row in rows]
    assert generate_ids(model, TOKENIZER, rows, 6) == expected
    assert len({tuple(row) for row in expected}) > 1


def shake(model, keep: str = "") -> None:
    """Random values for what is trained: a fresh adapter may change nothing."""
    paddle.seed(5)
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient and keep not in name.split("."):
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)


def all_have_gradients(model, ids=TEXT) -> None:
    model.train()
    nn.functional.cross_entropy(scores(model, ids).astype("float32"), paddle.to_tensor(ids)).backward()
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


# the registry


def test_the_registry_knows_the_families_of_the_options():
    assert set(shared.FAMILIES) == set(FAMILIES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_tells_the_truth(name):
    import paddlenlp.transformers

    family, config = FAMILIES[name], family_config(name)
    found = model_class(config)
    assert found.__name__ == family.model
    assert hasattr(paddlenlp.transformers, f"{family.model}Pipe") is family.pipeline
    assert readable_from_hugging_face(found, with_method(name)) is family.hugging_face
    assert all(not getattr(family, way) and not reason.endswith(".") for way, reason in family.why_not.items())


def readable_from_hugging_face(found, model) -> bool:
    """Whether PaddleNLP has a name there for every parameter."""
    try:
        names = {mapping.target_name for _, mapping in hugging_face_names(found, model.config)}
    except ModelError:
        return False
    return {holding.name for holding in holdings(model) if hasattr(holding.tensor, "trainable")} <= names


# full training


@pytest.mark.parametrize("name", NAMES)
def test_a_token_sees_what_is_before_it_and_nothing_else(name):
    model = with_method(name)
    model.train()
    before = scores(model, TEXT).numpy()
    for place in (0, 4, 7):
        changed = np.array(TEXT)
        changed[:, place] += 1
        after = scores(model, changed).numpy()
        assert np.allclose(after[:, :place], before[:, :place], atol=1e-6), "a later token was seen"
        assert (np.abs(after - before).max(axis=-1)[:, place:] > 1e-6).all(), "an earlier token was not seen"


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_and_ids_equal_to_the_padding_change_nothing(name):
    model = with_method(name)
    both = scores(model, [[9, 0, 41, 0, 7], [0, 5, 0, 0, 6]]).numpy()
    alone = [scores(model, [row]).numpy()[0] for row in ([9, 0, 41, 0, 7], [0, 5, 0, 0, 6])]
    assert np.allclose(both, alone, atol=1e-5)
    changed = scores(model, [[9, 1, 41, 0, 7], [0, 5, 0, 0, 6]]).numpy()
    assert np.abs(changed - both)[0, 2].max() > 1e-4  # token 0 is a token like others
    scores(model, [[9, 0, 41]])[:, :, 5].sum().backward()
    assert float(model.get_input_embeddings().weight.grad[0].abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_full_training_reaches_every_parameter(name):
    all_have_gradients(with_method(name))


@pytest.mark.parametrize("name", NAMES)
def test_generation(name):
    check_generation(with_method(name))


def test_chatglm_sees_a_question_of_its_own_form_as_a_whole():
    model = with_method("chatglm")
    plain = scores(model, TWO_PART).numpy()
    changed = np.array(TWO_PART)
    changed[0, 2], changed[1, 1] = 42, 6
    asked = scores(model, changed).numpy()
    assert np.abs(asked - plain)[0, 0].max() > 1e-6 and np.abs(asked - plain)[1, 0].max() > 1e-6
    changed = np.array(TWO_PART)
    changed[:, 6] += 1  # in the answers
    answered = scores(model, changed).numpy()
    assert np.allclose(answered[:, :6], plain[:, :6], atol=1e-6)


def test_chatglm_has_the_masks_and_positions_of_paddlenlp():
    """As its tokenizer and get_position_ids make them for one row."""
    model = with_method("chatglm")
    row = paddle.to_tensor(TWO_PART[:1])
    mask = np.tril(np.ones([8, 8], np.int64))
    mask[:, :4] = 1
    positions = model.get_position_ids(row, mask_positions=[3], use_gmasks=[True])
    theirs = type(model).forward(model, row, positions, paddle.to_tensor(mask[None, None]))[0]
    assert np.allclose(scores(model, row).numpy(), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("method", [None, PTuning(3, "mlp"), Prefix(3)], ids=["full", "p_tuning", "prefix"])
def test_chatglm_answers_questions_of_its_own_form(method):
    model = with_method("chatglm", method)
    shake(model, keep="" if method else "weight")
    check_generation(model, [[9, 30, 41, 1, 2], [400, 5, 1, 2], [7, 1, 2, 50]])


# LoRA


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_beside_every_linear_layer_and_equals_its_sum(name):
    method = LoRA(2, 4)
    model = with_method(name, method)
    linear = {path for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    lora = {path for path, layer in model.named_sublayers() if hasattr(layer, "lora_A")}
    assert lora and {path for path in linear | lora if "lm_head" not in path and path[-4:] != "gate"} == lora
    shake(model)
    all_have_gradients(model)
    model.eval()
    tuned = scores(model, TEXT).numpy()
    plain = with_method(name)
    plain.eval()
    layers = dict(plain.named_sublayers())
    for path in lora:
        layer = dict(model.named_sublayers())[path]
        layers[path].weight.set_value(layers[path].weight + method.scaling * (layer.lora_A @ layer.lora_B))
    assert np.allclose(scores(plain, TEXT).numpy(), tuned, atol=2e-4, rtol=1e-4)
    assert np.abs(scores(with_method(name), TEXT).numpy() - tuned).max() > 1e-3


# prefix tuning


def remembered(model, name: str, ids: list[list[int]]) -> np.ndarray:
    """Keys and values of a text as a prefix: [tokens, 2 x layers, heads, size]."""
    outputs = model(input_ids=paddle.to_tensor(ids), use_cache=True)
    past = outputs[1]
    if isinstance(past, tuple) and len(past) == 1:
        past = past[0]
    axes = FAMILIES[name].past
    order = [axes.index(axis) for axis in ("batch", "token", "head")] + [3]
    keys, values = ([pair[i].transpose(order)[0].numpy() for pair in past] for i in (0, 1))
    return np.stack([*keys, *values], axis=1)


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_a_prefix_of_the_keys_and_values_of_a_text_is_that_text(name):
    first, plain = [50, 60, 70], with_method(name)
    plain.eval()
    model = with_method(name, Prefix(3))
    model.eval()
    model.prefix_encoder.weight.set_value(remembered(plain, name, [first]))
    # Positions start anew after a prefix, but where the model counts them itself.
    places = paddle.to_tensor([[*range(3), *range(len(TEXT[0]))]] * 2)
    if name == "chatglm":
        places = paddle.stack([places, paddle.zeros_like(places)], axis=1)
    given = {} if name in ("opt", "bloom") else {"position_ids": places}
    whole = scores(plain, [first + row for row in TEXT], **given).numpy()
    assert np.allclose(scores(model, TEXT).numpy(), whole[:, 3:], atol=1e-5)
    assert np.abs(scores(plain, TEXT).numpy() - whole[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_prefix_tuning(name):
    model = with_method(name, Prefix(3))
    shake(model)
    all_have_gradients(model)
    layers = model.prefix_encoder.weight.grad.abs().sum(axis=[0, 2, 3]).numpy()
    assert (layers > 0).all(), "keys or values of a layer are not trained"
    check_generation(model)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_PREFIX])
def test_families_without_prefix_tuning_say_why(name):
    with pytest.raises(ModelError, match=rf"--prefix_tuning: {name} has none: .*; use --lora or --p_tuning$"):
        with_method(name, Prefix(3))


# p-tuning


@pytest.mark.parametrize("name", NAMES)
def test_virtual_tokens_with_the_embeddings_of_words_are_those_words(name):
    first, plain = [50, 60, 70], with_method(name)
    plain.eval()
    model = with_method(name, PTuning(3, "mlp"))
    model.eval()
    words = plain.get_input_embeddings().weight[paddle.to_tensor(first)].detach()
    model.prompt_encoder.forward = lambda: words
    whole = scores(plain, [first + row for row in TEXT]).numpy()
    assert np.allclose(scores(model, TEXT).numpy(), whole[:, 3:], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_p_tuning(name):
    model = with_method(name, PTuning(3, "lstm" if name == "llama" else "mlp"))
    shake(model)
    all_have_gradients(model)
    check_generation(model)


def test_tied_embeddings_keep_their_output_layer():
    model = with_method("llama", LoRA(2, 4), tie_word_embeddings=True)
    shake(model)
    all_have_gradients(model)
    check_generation(with_method("llama", None, tie_word_embeddings=True))
    assert family_model("llama").config.model_type == "llama"


# refusals at the start


def find(folder, content, *words: str, start=False):
    from oarlock.config.load import load_config

    (folder / "config.json").write_text(json.dumps(content))
    words = ("--model_name_or_path", str(folder), "--output_dir", str(folder / "out"), "--do_train", *words)
    loaded = load_config(FinetuneConfig, list(words))
    return finetune(loaded) if start else find_model(loaded.config, from_weights=False)


def test_a_family_that_does_not_run_says_so(tmp_path):
    content = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    with pytest.raises(ModelError, match=r"mixtral models can't be run here: .*MixtralSparseMoeBlock fails"):
        find(tmp_path, content)


def test_a_method_that_a_family_lacks_is_refused_before_weights_are_looked_for(tmp_path):
    content = TINY["glm"] | {"model_type": "glm", "architectures": [FAMILIES["glm"].model]}
    PTuning(3).check("glm")
    for family in WITH_PREFIX:
        Prefix(3).check(family)
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    with pytest.raises(ModelError, match="--prefix_tuning: glm has none: its layers remember hidden states"):
        find(tmp_path, content, "--prefix_tuning", start=True)


def test_positions_that_a_prefix_takes_are_counted(tmp_path):
    content = TINY["opt"] | {"model_type": "opt", "architectures": [FAMILIES["opt"].model]}
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    words = ("--prefix_tuning", "--num_prefix_tokens", "100", "--src_length", "100", "--tgt_length", "100")
    with pytest.raises(ConfigError, match=r"after the prefix asks for sequences of 300 tokens, .* made for 256"):
        find(tmp_path, content, *words, start=True)
    with pytest.raises(ConfigError, match=r"made for 256 .max_sequence_length"):
        source = ModelSource(tmp_path, family_config("glm"), from_weights=False)
        check_lengths(source, 257, "--max_seq_length")


def test_weights_in_a_format_that_a_family_is_not_read_from_say_why(tmp_path):
    save_file(
        {"transformer.layers.1.x": np.zeros([1000], np.float32)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    source = ModelSource(tmp_path, family_config("glm"), from_weights=True)
    with pytest.raises(ModelError, match=r"glm has none: its converter .* is gone; give them in Paddle's format"):
        build_model(source)
