"""Encoding conversations into token ids, labels and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import encode_conversation
from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.examples.collate import FinetuneCollator, PretrainCollator
from oarlock.data.examples.labels import IGNORE_INDEX, Example, encode_prompt
from oarlock.data.examples.preview import mark_trained
from oarlock.data.records.conversations import Conversation
from oarlock.data.templates.chat_template import BUILT_IN, ChatTemplate, choose_template, find_own_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ConfigError, DataError

# templates


def test_auto_uses_the_template_of_the_tokenizer(tokenizer):
    template = choose_template("auto", tokenizer, "alpaca")
    assert template.name == "tokenizer" and template.source == find_own_template(tokenizer)
    assert template.render([{"role": "user", "content": "a"}], add_generation_prompt=True) == f"{USER}a{ASSISTANT}"


def test_alpaca_prompts_are_the_published_ones(tokenizer):
    template = choose_template("auto", tokenizer, "alpaca", instruction_generation=True)
    assert template.name == "alpaca"
    without = template.render([{"role": "user", "content": "Sing"}], add_generation_prompt=True)
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing\n\n### Response:"
    )
    message = {"role": "user", "content": "Sing\na song", "instruction": "Sing", "input": "a song"}
    whole = template.render([message, {"role": "assistant", "content": "la"}])
    assert whole == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSing\n\n### Input:\na song\n\n"
        "### Response:la" + EOS
    )


def test_a_template_file_and_its_errors(tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert choose_template(str(path), tokenizer, "src_tgt").render([{"role": "user", "content": "x"}]) == "[user]x"
    for text, expected in (
        ("{% for %}", "chat template"),
        ("{{ messages[0]['content'] }}", "does not start with its prompt"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("{{ messages[0]['content'] + 1 }}", "fails: TypeError: can only concatenate"),
        (
            "{{ messages.__class__.__mro__[1].__subclasses__() }}",
            "fails: SecurityError: access to attribute '__class__'",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            choose_template(str(path), tokenizer, "src_tgt")
    with pytest.raises(ConfigError, match=r"known names are auto, tokenizer, plain, alpaca, llama2"):
        choose_template("chatmll", tokenizer, "src_tgt")


def test_templates_are_saved_where_other_tools_read_them(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    template = ChatTemplate("plain", BUILT_IN["plain"], {"eos_token": EOS})
    template.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template.source
    assert find_own_template(load_tokenizer(str(tmp_path))) == template.source


# labels


def conversation(*texts: str) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    return Conversation([{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], "here:1")


def decode_trained(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def test_only_answers_and_their_end_are_trained(tokenizer):
    template = choose_template("tokenizer", tokenizer, "src_tgt")
    example = encode_conversation(
        conversation("water", "fire", "sun", "moon"), tokenizer, template, 100, 100
    ).to_example()
    assert decode_trained(example, tokenizer) == f"fire{EOS}moon{EOS}"
    assert len(example.input_ids) == len(example.labels)
    for i, label in enumerate(example.labels[:-1]):
        assert label in (IGNORE_INDEX, example.input_ids[i + 1])
    assert (
        mark_trained(example, tokenizer, color=False)
        == f"{USER}water{ASSISTANT}⟦fire{EOS}⟧{USER}sun{ASSISTANT}⟦moon{EOS}⟧"
    )


def test_prompt_ids_are_a_prefix_of_the_training_ids(tokenizer):
    for name in ("tokenizer", "plain", "alpaca"):
        template = choose_template(name, tokenizer, "src_tgt")
        talk = conversation("Repeat the words", "water fire")
        example = encode_conversation(talk, tokenizer, template, 500, 500).to_example()
        prompt = encode_prompt(talk, tokenizer, template, 500)
        first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        assert example.input_ids[: first + 1] == prompt.input_ids and prompt.answer == "water fire"


def test_long_contexts_are_cut_at_the_start_and_long_answers_at_the_end(tokenizer):
    template = choose_template("plain", tokenizer, "src_tgt")
    talk = conversation("a b c d e f g h", "r s t u v w x y z")
    whole = encode_conversation(talk, tokenizer, template, 500, 500).to_example()
    first = sum(label == IGNORE_INDEX for label in whole.labels) + 1
    cut = encode_conversation(talk, tokenizer, template, 3, 4).to_example()
    assert cut.truncated and not whole.truncated
    assert cut.input_ids == whole.input_ids[first - 3 : first + 3]
    assert [label for label in cut.labels if label != IGNORE_INDEX] == whole.labels[first - 1 : first + 3]


def test_inconsistent_templates_are_named(tokenizer):
    template = ChatTemplate("odd", "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", {})
    with pytest.raises(DataError, match="here:1: chat template odd changes the text"):
        encode_conversation(conversation("a", "b"), tokenizer, template, 10, 10)


# batches


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_padding_is_on_the_right_and_not_trained(lengths):
    examples = [Example(list(range(1, n + 1)), [IGNORE_INDEX] * (n - 1) + [n], False) for n in lengths]
    batch = FinetuneCollator(vocab_size=50, pad_id=0)(examples)
    assert batch["input_ids"].shape == (len(lengths), max(lengths)) and batch["num_tokens"].tolist() == lengths
    for row, n in enumerate(lengths):
        assert batch["input_ids"][row].tolist() == [*range(1, n + 1)] + [0] * (max(lengths) - n)
        assert (batch["labels"][row] != IGNORE_INDEX).sum() == 1


def test_positions_count_the_text_and_not_its_padding():
    examples = [Example([5] * n, [5] * n, False) for n in (2, 4)]
    batch = FinetuneCollator(50, 0, multiple_of=3, with_positions=True)(examples)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0]]


def test_pretraining_batches_and_loss_masks():
    batch = PretrainCollator(100)([{"text": np.arange(5)}, {"text": np.arange(5, 10)}])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and batch["labels"][0].tolist() == [1, 2, 3, 4]
    masked = PretrainCollator(100)([{"text": np.arange(5), "mask": np.asarray([1, 0, 1, 1, 0])}])
    assert masked["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX]]


def test_ids_beyond_the_vocabulary_are_named():
    with pytest.raises(DataError, match=r"token id 9, but the model's vocabulary has 9 rows"):
        PretrainCollator(9)([{"text": np.arange(10)}])
