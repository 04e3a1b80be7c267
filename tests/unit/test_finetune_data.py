"""Records -> conversations -> ids and labels -> batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config.schema import FinetuneDataSection
from oarlock.data.collate import FinetuneCollator, PretrainCollator
from oarlock.data.embedded.instructions import TASKS, instruction_records
from oarlock.data.embedded.stdlib_text import MINIMUM_BYTES, stdlib_sources
from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.finetune import load_finetune_data
from oarlock.data.labels import IGNORE_INDEX, Example, encode_conversation, encode_prompt
from oarlock.data.preview import marked
from oarlock.data.records import Conversation, read_records
from oarlock.data.templates import BUILT_IN, ChatTemplate, choose_template, own_template
from oarlock.data.tokenizers import load_encoder, load_tokenizer
from oarlock.errors import ConfigError, DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def write(path: Path, records, as_list=False) -> Path:
    text = json.dumps(records, indent=1) if as_list else "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text(text, encoding="utf-8")
    return path


# records


def test_src_tgt_and_alpaca_are_told_apart(tmp_path):
    one = read_records(write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a"}]))
    assert one.form == "src_tgt" and [m["content"] for m in one.conversations[0].messages] == ["q", "a"]
    two = read_records(write(tmp_path / "b.json", [{"instruction": "do", "input": "x", "output": "y"}], as_list=True))
    user = two.conversations[0].messages[0]
    assert two.form == "alpaca" and user["content"] == "do\nx" and user["instruction"] == "do" and user["input"] == "x"


def test_several_rounds(tmp_path):
    records = read_records(write(tmp_path / "a.jsonl", [{"src": ["a", "c"], "tgt": ["b", "d"]}]))
    assert [m["role"] for m in records.conversations[0].messages] == ["user", "assistant"] * 2


def test_items_of_a_json_list_know_their_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"src": "a",\n  "tgt": "b"},\n\n {"src": "c", "tgt": "d"}\n]\n')
    assert [c.where.rsplit(":", 1)[1] for c in read_records(path).conversations] == ["2", "5"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"src": "a"}', "field 'tgt' is missing"),
        ('{"src": 1, "tgt": "b"}', "field 'src' holds int"),
        ('{"src": ["a", "b"], "tgt": ["c"]}', "2 rounds in 'src' but 1 in 'tgt'"),
        ('{"src": [], "tgt": []}', "field 'src' must be text or a list of texts with at least one"),
        ('{"src": "a", "tgt": "  "}', "the answer is empty"),
        ('{"src": "a", "tgt"', "not valid JSON"),
        ("[1]", "expected an object, got list"),
    ],
)
def test_wrong_records_name_file_line_and_field(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src": "a", "tgt": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read_records(path)
    assert f"{path}:2: {expected}" in str(error.value)
    left = read_records(path, skip_bad=True)
    assert len(left.conversations) == 1 and len(left.bad) == 1


def test_other_wrong_files(tmp_path):
    for content, expected in (
        (b'[{"src": "a", "tgt": "b"}, ', "the list is not closed"),
        (b'[{"src": "a", "tgt": "b"} oops]', "not valid JSON"),
        (b'{"src": "\xff", "tgt": "b"}', "a.json:1: not UTF-8"),
        (b'{"q": 1}', "unknown form of record"),
        (b"", "no usable record"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=expected):
            read_records(tmp_path / "a.json")
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "absent.json")


# templates


def test_auto_takes_the_tokenizers_own_template(tokenizer):
    template = choose_template("auto", tokenizer, "alpaca")
    assert template.name == "tokenizer" and template.source == own_template(tokenizer)
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
        ("{{ messages[0]['content'] }}", "does not begin with its prompt"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses|begin with its prompt"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            choose_template(str(path), tokenizer, "src_tgt")
    with pytest.raises(ConfigError, match=r"known names are auto, tokenizer, plain, alpaca"):
        choose_template("chatmll", tokenizer, "src_tgt")


def test_templates_are_saved_where_readers_look(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    template = ChatTemplate("plain", BUILT_IN["plain"], {"eos_token": EOS})
    template.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template.source
    assert own_template(load_tokenizer(str(tmp_path))) == template.source


# labels


def conversation(*texts: str) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    return Conversation([{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], "here:1")


def trained_text(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def test_only_answers_and_their_end_are_trained(tokenizer):
    template = choose_template("tokenizer", tokenizer, "src_tgt")
    example = encode_conversation(conversation("water", "fire", "sun", "moon"), tokenizer, template, 100, 100)
    assert trained_text(example, tokenizer) == f"fire{EOS}moon{EOS}"
    assert len(example.input_ids) == len(example.labels)
    for i, label in enumerate(example.labels[:-1]):
        assert label in (IGNORE_INDEX, example.input_ids[i + 1])
    assert (
        marked(example, tokenizer, color=False) == f"{USER}water{ASSISTANT}⟦fire{EOS}⟧{USER}sun{ASSISTANT}⟦moon{EOS}⟧"
    )


def test_prompt_ids_are_the_beginning_of_the_training_ids(tokenizer):
    for name in ("tokenizer", "plain", "alpaca"):
        template = choose_template(name, tokenizer, "src_tgt")
        talk = conversation("Repeat the words", "water fire")
        example = encode_conversation(talk, tokenizer, template, 500, 500)
        prompt = encode_prompt(talk, tokenizer, template, 500)
        first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        assert example.input_ids[: first + 1] == prompt.input_ids and prompt.answer == "water fire"


def test_long_contexts_lose_their_beginning_and_long_answers_their_end(tokenizer):
    template = choose_template("plain", tokenizer, "src_tgt")
    talk = conversation("a b c d e f g h", "r s t u v w x y z")
    whole = encode_conversation(talk, tokenizer, template, 500, 500)
    first = sum(label == IGNORE_INDEX for label in whole.labels) + 1
    cut = encode_conversation(talk, tokenizer, template, 3, 4)
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


def test_pretraining_batches_and_loss_masks():
    batch = PretrainCollator(100)([{"text": np.arange(5)}, {"text": np.arange(5, 10)}])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and batch["labels"][0].tolist() == [1, 2, 3, 4]
    masked = PretrainCollator(100)([{"text": np.arange(5), "mask": np.asarray([1, 0, 1, 1, 0])}])
    assert masked["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX]]


def test_ids_beyond_the_vocabulary_are_named():
    with pytest.raises(DataError, match=r"token id 9, but the model's vocabulary has 9 rows"):
        PretrainCollator(9)([{"text": np.arange(10)}])


# the embedded default


def test_embedded_tasks_have_one_right_answer_and_disjoint_sides():
    train, dev = instruction_records("train"), instruction_records("dev")
    assert len(TASKS) >= 8 and {r["task"] for r in train} == {r["task"] for r in dev} == {t.name for t in TASKS}
    prompts = [{(r["instruction"], r["input"]) for r in side} for side in (train, dev)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) == len(train) and len(prompts[1]) == len(dev)
    answers = [r["output"] for r in train + dev]
    assert any(a.isascii() for a in answers) and any(not a.isascii() for a in answers)
    assert instruction_records("train") == train


def test_embedded_text_is_large_and_real():
    sources = stdlib_sources()
    assert sum(source.size for source in sources) >= MINIMUM_BYTES
    assert any(source.path.name == "argparse.py" for source in sources)


def test_auto_tokenizer_loads_the_embedded_tokenizer(tiny_tokenizer):
    from paddlenlp.transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    text = "Repeat the words.\n星期一"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == load_encoder(str(tiny_tokenizer)).encode([text])[0].tolist()
    assert tokenizer.eos_token == EOS


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "SomethingNewTokenizerFast", None])
def test_tokenizers_as_people_have_them(tiny_tokenizer, tmp_path, name):
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    config |= {"tokenizer_class": name} if name else {}
    for file in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / file).write_bytes((tiny_tokenizer / file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = "Repeat the words."
    expected = load_encoder(str(tiny_tokenizer)).encode([text])[0].tolist()
    assert load_tokenizer(str(tmp_path))(text, add_special_tokens=False)["input_ids"] == expected


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))


def test_folders_with_train_and_dev(tmp_path, tokenizer):
    records = [{"src": f"q{i}", "tgt": "a"} for i in range(6)]
    write(tmp_path / "train.jsonl", records)
    write(tmp_path / "dev.json", records[:2], as_list=True)
    data = load_finetune_data(FinetuneDataSection(dataset_name_or_path=str(tmp_path)), tokenizer)
    assert len(data.train) == 6 and len(data.dev) == 2 and data.dev_prompts[0].answer == "a"
    changed = write(tmp_path / "train.jsonl", records[:5]).parent
    again = load_finetune_data(FinetuneDataSection(dataset_name_or_path=str(changed)), tokenizer)
    assert again.fingerprint != data.fingerprint


def test_missing_data_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no train.json or train.jsonl"):
        load_finetune_data(FinetuneDataSection(dataset_name_or_path=str(tmp_path)), tokenizer)
