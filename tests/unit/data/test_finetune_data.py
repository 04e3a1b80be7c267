"""Records -> conversations -> ids and labels -> batches."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import encode_conversation
from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.embedded.instructions import TASKS, instruction_records
from oarlock.data.embedded.stdlib_text import MINIMUM_BYTES, stdlib_sources
from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.examples.collate import FinetuneCollator, PretrainCollator
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.examples.encode import Counts, Recipe, encode_source
from oarlock.data.examples.labels import IGNORE_INDEX, Example, encode_prompt
from oarlock.data.examples.preview import marked
from oarlock.data.files import byte_streams
from oarlock.data.records.conversations import Conversation, parse_record
from oarlock.data.records.dataset_resolver import find_records
from oarlock.data.records.record_stream import FileRecords
from oarlock.data.templates.chat_template import BUILT_IN, ChatTemplate, choose_template, own_template
from oarlock.data.tokenizers.load import load_encoder, load_tokenizer
from oarlock.errors import ConfigError, DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def write(path: Path, records, as_list=False) -> Path:
    text = json.dumps(records, indent=1) if as_list else "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, tokenizer, form="auto", skip_bad=False, name="tokenizer", src_length=400, tgt_length=400):
    """Rows and counts of a file; a tokenizer's own template writes <|user|>q<|assistant|>a<|endoftext|>."""
    template = choose_template(name, tokenizer, "src_tgt")
    counts = Counts()
    recipe = Recipe(tokenizer, template, src_length, tgt_length, form, skip_bad)
    return [row for rows, _ in encode_source(FileRecords.of(path), recipe, counts) for row in rows], counts


def shown(row, tokenizer) -> str:
    return marked(row.encoded, tokenizer, color=False)


# records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"src": "q", "tgt": "a"}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"src": ["q", "r"], "tgt": ["a", "b"]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧{USER}r{ASSISTANT}⟦b{EOS}⟧"),
        ({"instruction": "do", "input": "x", "output": "y"}, f"{USER}do\nx{ASSISTANT}⟦y{EOS}⟧"),
        ({"instruction": "do", "output": "y", "history": [["q", "a"]]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧{USER}do{ASSISTANT}⟦y{EOS}⟧"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, f"{USER}s{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))]}, f"{USER}s{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]}, f"{USER}q{ASSISTANT}⟦a{EOS}⟧"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]}, f"{ASSISTANT}a{EOS}{ASSISTANT}⟦b{EOS}⟧"),
        ({"text": "a whole text"}, f"a⟦ whole text{EOS}⟧"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_list", [False, True])
def test_forms_are_told_by_their_fields(tmp_path, tokenizer, record, expected, as_list):
    (row,), counts = read(write(tmp_path / "a.json", [record], as_list), tokenizer)
    assert shown(row, tokenizer) == expected and counts.records == 1


def test_a_last_question_without_answer_is_left_out_and_counted(tmp_path, tokenizer):
    messages = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "more"}]
    (row,), counts = read(write(tmp_path / "a.jsonl", [{"conversations": messages}]), tokenizer)
    assert shown(row, tokenizer) == f"{USER}q{ASSISTANT}⟦a{EOS}⟧" and counts.unanswered == 1


def test_an_alpaca_message_keeps_its_parts():
    record = parse_record({"instruction": "do", "input": "x", "output": "y"}, "alpaca", "here:1")
    assert record.messages[0] == {"role": "user", "content": "do\nx", "instruction": "do", "input": "x"}


def test_long_texts_are_cut_so_that_every_token_is_trained_once(tmp_path, tokenizer):
    text = "\n".join(f"line {i} of a longer text" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rows, counts = read(tmp_path / "a.txt", tokenizer, src_length=10, tgt_length=21)
    assert counts.records == 1 and counts.truncated == 0 and len(rows) > 10
    examples = [row.encoded.example() for row in rows]
    assert [label for example in examples for label in example.labels] == whole[1:]
    assert max(len(example.input_ids) for example in examples) == 30


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
def test_wrong_records_name_file_line_and_field(tmp_path, tokenizer, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src": "a", "tgt": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read(path, tokenizer)
    assert str(error.value).startswith(f"{path}:2: {expected}")
    rows, counts = read(path, tokenizer, skip_bad=True)
    assert len(rows) == 1 and counts.bad == 1 and counts.first_bad[0].startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("messages", {}, "field 'messages' is missing, expected a list"),
        ("messages", {"messages": "x"}, "field 'messages' holds str, expected a list"),
        ("messages", {"messages": ["x"]}, "field 'messages[0]' holds str, expected an object"),
        ("messages", {"messages": [{"role": "user", "content": 1}]}, "field 'messages[0].content' holds int, expected text"),
        ("messages", {"messages": [{"role": "assistant", "content": None}]}, "field 'messages[0].content' holds NoneType"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "field 'messages[0].role' is 'robot'; known roles are"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "has no assistant message"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds parts that are not text"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "field 'conversations[0].content' is missing"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["q"]}, "field 'history[0]' must be a pair"),
        ("text", {"text": ""}, "field 'text' is empty"),
        ("auto", {"q": 1}, "unknown form of record ('q'); known are src/tgt (src_tgt), instruction/output (alpaca)"),
    ],
)  # fmt: skip
def test_wrong_records_of_each_form(tmp_path, tokenizer, form, record, expected):
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError) as error:
        read(path, tokenizer, form)
    assert str(error.value).startswith(f"{path}:1: ") and expected in str(error.value)


def test_a_template_that_refuses_a_record_names_it(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}, {"src": "a", "tgt": "b"}]
    )
    with pytest.raises(
        DataError, match=r"a.jsonl:1: chat template llama2 refuses these messages: an answer must follow"
    ):
        read(path, tokenizer, name="llama2")
    rows, counts = read(path, tokenizer, name="llama2", skip_bad=True)
    assert (len(rows), counts.bad) == (0, 2)  # the second is not of the first one's form


# files


def packed(text: bytes, ending: str) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(text)
    return zstandard.compress(text) if ending.endswith(".zst") else text


RECORDS = [{"src": f"question {i} é", "tgt": f"answer {i}"} for i in range(1, 9)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", "", ".parquet", "/saved"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, tokenizer, ending):
    expected = [f"{USER}{r['src']}{ASSISTANT}⟦{r['tgt']}{EOS}⟧" for r in RECORDS]
    is_list = ending in (".json", ".json.gz")
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=3)
    elif ending == "/saved":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    else:
        text = json.dumps(RECORDS, indent=1) if is_list else "\n".join(map(json.dumps, RECORDS))
        path.write_bytes(packed(b"\xef\xbb\xbf" + text.encode(), ending))
    section = FinetuneDataSection(dataset_name_or_path=str(path), data_cache_dir=str(tmp_path / "cache"))
    examples = load_finetune_data(section, tokenizer).train.examples
    assert [marked(example, tokenizer, color=False) for example in examples] == expected
    assert examples.where(2).endswith(":10" if is_list else ":3")


@settings(max_examples=30, deadline=None)
@given(
    records=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.none()), max_size=12
    ),
    indent=st.sampled_from([None, 1]),
    block=st.integers(1, 40),
)
def test_json_lists_are_read_in_pieces_of_any_size(records, indent, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "a.json"
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        items = [item for batch in FileRecords.of(path).batches() for item in batch.items]
        consumed = sum(batch.consumed for batch in FileRecords.of(path).batches())
    assert [item for _, item in items] == records and consumed == path.stat().st_size
    if indent:
        starts = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith(" {")]
        assert [line for line, _ in items] == starts


def test_other_wrong_files(tmp_path, tokenizer):
    for content, expected in (
        (b'[{"src": "a", "tgt": "b"},\n ', "a.json:2: the list is not closed"),
        (b'[{"src": "a", "tgt": "b"}\n oops]', "a.json:2: not valid JSON"),
        (b'[{"src": "a", "tgt": "b"},\n{"src": "\xff"}]', "a.json:2: not UTF-8"),
        (b'{"src": "\xff", "tgt": "b"}', "a.json:1: not UTF-8"),
        (b'{"q": 1}', "unknown form of record"),
        (b"\x1f\x8b\x08damaged", "a.json: damaged gz file"),
        (b"", "no usable record"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        section = FinetuneDataSection(dataset_name_or_path=str(tmp_path / "a.json"), data_cache_dir=str(tmp_path / "c"))
        with pytest.raises(DataError, match=expected):
            load_finetune_data(section, tokenizer)
    (tmp_path / "a.json").write_text('{"q": 1}\n{"r": 1}')
    with pytest.raises(DataError, match=r"no usable record \(2 bad ones, the first: .*a.json:1: unknown form"):
        load_finetune_data(dataclasses.replace(section, skip_bad=True), tokenizer)
    with pytest.raises(DataError, match="no hub gave it"):
        load_finetune_data(FinetuneDataSection(dataset_name_or_path=str(tmp_path / "absent.json")), tokenizer)


@pytest.mark.parametrize(
    ("files", "train", "dev"),
    [
        (["train.jsonl", "dev.json", "README.md"], ["train.jsonl"], ["dev.json"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-0.parquet", "test-0.parquet"],
         ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["validation-0.parquet"]),
        (["data/train/a.jsonl.zst", "data/train/b.jsonl.gz", "data/eval/a.jsonl"],
         ["data/train/a.jsonl.zst", "data/train/b.jsonl.gz"], ["data/eval/a.jsonl"]),
        (["a.jsonl", "b.json", "test.json", ".hidden.json", ".cache/a/c.json"], ["a.jsonl", "b.json"], ["test.json"]),
        (["trains.jsonl"], ["trains.jsonl"], []),
    ],
)  # fmt: skip
def test_files_of_a_folder_are_told_apart_by_name(tmp_path, files, train, dev):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"src": "a", "tgt": "b"}')
    found = find_records(str(tmp_path))
    assert [source.name for source in found.train] == [str(tmp_path / name) for name in train]
    assert [source.name for source in found.dev] == [str(tmp_path / name) for name in dev]


def test_a_saved_dataset_with_splits(tmp_path, tokenizer):
    sides = {
        side: datasets.Dataset.from_list(rows) for side, rows in (("train", RECORDS[:5]), ("validation", RECORDS[5:]))
    }
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "saved")
    section = FinetuneDataSection(dataset_name_or_path=str(tmp_path / "saved"), data_cache_dir=str(tmp_path / "cache"))
    data = load_finetune_data(section, tokenizer)
    assert (len(data.train), len(data.dev)) == (5, 3) and [prompt.answer for prompt in data.dev_prompts[1:]] == [
        "answer 7",
        "answer 8",
    ]
    assert data.dev.examples.where(1) == f"{tmp_path}/saved[validation]:2"
    datasets.DatasetDict({"validation": sides["validation"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match=r"half: no train split \(it has validation\)"):
        find_records(str(tmp_path / "half"))


def test_the_same_data_in_two_forms_is_refused(tmp_path):
    for name in ("train.json", "train.jsonl"):
        (tmp_path / name).write_text('{"src": "a", "tgt": "b"}')
    with pytest.raises(DataError, match="look like the same data in two forms"):
        find_records(str(tmp_path))


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
    example = encode_conversation(conversation("water", "fire", "sun", "moon"), tokenizer, template, 100, 100).example()
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
        example = encode_conversation(talk, tokenizer, template, 500, 500).example()
        prompt = encode_prompt(talk, tokenizer, template, 500)
        first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        assert example.input_ids[: first + 1] == prompt.input_ids and prompt.answer == "water fire"


def test_long_contexts_lose_their_beginning_and_long_answers_their_end(tokenizer):
    template = choose_template("plain", tokenizer, "src_tgt")
    talk = conversation("a b c d e f g h", "r s t u v w x y z")
    whole = encode_conversation(talk, tokenizer, template, 500, 500).example()
    first = sum(label == IGNORE_INDEX for label in whole.labels) + 1
    cut = encode_conversation(talk, tokenizer, template, 3, 4).example()
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
