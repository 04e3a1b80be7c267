"""Files and folders of fine-tuning data."""

from __future__ import annotations

import dataclasses
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.examples.preview import mark_trained
from oarlock.data.files import byte_streams
from oarlock.data.records.dataset_resolver import find_records
from oarlock.data.records.record_stream import FileRecords
from oarlock.errors import DataError
from support.finetune_files import write

# files


def packed(text: bytes, ending: str) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(text)
    return zstandard.compress(text) if ending.endswith(".zst") else text


RECORDS = [{"src": f"question {i} é", "tgt": f"answer {i}"} for i in range(1, 9)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", "", ".parquet", "/saved"])
def test_all_file_formats_give_the_same_examples(tmp_path, tokenizer, ending):
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
    assert [mark_trained(example, tokenizer, color=False) for example in examples] == expected
    assert examples.locate(2).endswith(":10" if is_list else ":3")


@settings(max_examples=30, deadline=None)
@given(
    records=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.none()), max_size=12
    ),
    indent=st.sampled_from([None, 1]),
    block=st.integers(1, 40),
)
def test_json_lists_are_read_in_chunks_of_any_size(records, indent, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "a.json"
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_streams, "BLOCK_BYTES", block)
        items = [item for batch in FileRecords.detect(path).batches() for item in batch.items]
        consumed = sum(batch.consumed for batch in FileRecords.detect(path).batches())
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
    with pytest.raises(DataError, match="not found on the hub"):
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
def test_train_and_dev_files_of_a_folder_are_distinguished_by_name(tmp_path, files, train, dev):
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
    assert data.dev.examples.locate(1) == f"{tmp_path}/saved[validation]:2"
    datasets.DatasetDict({"validation": sides["validation"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match=r"half: no train split \(it has validation\)"):
        find_records(str(tmp_path / "half"))


def test_the_same_data_in_two_formats_is_refused(tmp_path):
    for name in ("train.json", "train.jsonl"):
        (tmp_path / name).write_text('{"src": "a", "tgt": "b"}')
    with pytest.raises(DataError, match="seem to be the same data in two formats"):
        find_records(str(tmp_path))


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
