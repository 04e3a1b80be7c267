"""A corpus stores its documents as text without special tokens, and records its tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from oarlock.cli.main import main
from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus
from oarlock.data.corpus.tokenizer_check import check_corpus_tokenizers
from oarlock.data.tokenizers.load import load_encoder, load_tokenizer
from oarlock.errors import DataError
from oarlock.formats.sealed import SEAL, seal_text
from tokenizer_layouts import SHAPES, save

TEXTS = ["a plain one", "say <|endoftext|> twice: <|endoftext|>", "<|user|>x", "and\na last one"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def documents(prefix: Path) -> list[list[int]]:
    from paddlenlp.data.indexed_dataset import MMapIndexedDataset

    data = MMapIndexedDataset(str(prefix), skip_warmup=True)
    return [data[i].tolist() for i in range(len(data))]


@pytest.mark.parametrize("workers", [1, 2])
def test_special_tokens_spelled_in_documents_are_text(tiny_tokenizer, text, tmp_path, workers):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    report = build_corpus(BuildOptions((str(text),), str(tiny_tokenizer), str(tmp_path / "c"), workers))
    special = set(tokenizer.all_special_ids)
    for ids, spelled in zip(documents(tmp_path / "c"), TEXTS, strict=True):
        assert not special & set(ids[:-1]) and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == spelled
    assert report.spelled == 2
    notes = json.loads((tmp_path / "c.json").read_text())
    assert notes["documents_that_spell_special_tokens"] == 2 and not notes["special_tokens_parsed"]


def test_an_option_allows_special_tokens(tiny_tokenizer, text, tmp_path, capsys):
    words = ["data", "pretrain", "--input", str(text), "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--output-prefix", str(tmp_path / "text")])
    assert "2 documents spell special tokens; they are text (--parse-special-tokens)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--output-prefix", str(tmp_path / "parsed"), "--parse-special-tokens"])
    assert "2 documents spell special tokens; they became those tokens" in capsys.readouterr().out
    assert documents(tmp_path / "parsed")[1].count(0) == 3 and documents(tmp_path / "text")[1].count(0) == 1


def test_tokens_that_are_not_special_are_found_in_text(tmp_path):
    """As in transformers: <tool_call> of Qwen2.5 is an added token but not a special one."""
    tokenizer, config = SHAPES["qwen2"][0]()
    folder = save(tmp_path / "qwen2", tokenizer, config, "qwen2")
    ((call, turn), (none, told)) = load_encoder(str(folder)).encode_and_flag(["<tool_call>\nx", "a<|im_end|>"])
    assert tokenizer.token_to_id("<tool_call>") in call.tolist() and (none, told) == (False, True)
    assert tokenizer.token_to_id("<|im_end|>") not in turn.tolist() and tokenizer.decode(turn.tolist()) == "a<|im_end|>"


@pytest.fixture
def other(tiny_tokenizer, tmp_path) -> Path:
    """A tokenizer with other merges and the same number of tokens."""
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def corpus(tiny_tokenizer, text, tmp_path) -> Path:
    build_corpus(BuildOptions((str(text),), str(tiny_tokenizer), str(tmp_path / "corpus")))
    return tmp_path / "corpus"


def note(corpus: Path, **changes: str | None) -> None:
    path = corpus.with_suffix(".json")
    notes = {**json.loads(path.read_text()), **changes}
    path.write_text(seal_text({name: value for name, value in notes.items() if value is not None and name != SEAL}))


def check(corpus: Path, tokenizer: Path, allow: bool = False) -> None:
    check_corpus_tokenizers([str(corpus)], load_tokenizer(str(tokenizer)), str(tokenizer), allow)


def test_a_tokenizer_saved_again_is_accepted(corpus, tiny_tokenizer, tmp_path, capsys):
    load_tokenizer(str(tiny_tokenizer)).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(content, indent=3))
    check(corpus, tmp_path / "saved")
    assert capsys.readouterr().out == ""


def test_another_tokenizer_is_refused_with_both_names(corpus, tiny_tokenizer, other, capsys):
    with pytest.raises(DataError, match="which gives other ids") as error:
        check(corpus, other)
    assert str(tiny_tokenizer) in str(error.value) and str(other) in str(error.value)
    assert "--allow_other_tokenizer" in str(error.value)
    check(corpus, other, allow=True)
    assert "continuing because of --allow_other_tokenizer" in capsys.readouterr().out


def test_every_corpus_of_a_blend_is_checked(corpus, text, other, tiny_tokenizer, tmp_path):
    build_corpus(BuildOptions((str(text),), str(other), str(tmp_path / "second")))
    with pytest.raises(DataError, match="second was made with"):
        check_corpus_tokenizers([str(corpus), str(tmp_path / "second")], load_tokenizer(str(tiny_tokenizer)), "mine")


def test_corpora_of_earlier_versions(corpus, tiny_tokenizer, other, tmp_path, capsys):
    earlier = hashlib.sha256((tiny_tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:16]
    note(corpus, tokenizer_fingerprint=earlier)
    check(corpus, tiny_tokenizer)  # the same file
    load_tokenizer(str(tiny_tokenizer)).save_pretrained(tmp_path / "saved")
    check(corpus, tmp_path / "saved")  # found again by its recorded name
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="which gives other ids"):
        check(corpus, other)
    note(corpus, tokenizer=str(tmp_path / "gone"))
    check(corpus, other)
    assert (
        f"{corpus}: made by an earlier version with the tokenizer {tmp_path / 'gone'}; can't check"
        in capsys.readouterr().out
    )
    corpus.with_suffix(".json").unlink()
    check(corpus, other)
    assert "its tokenizer is not recorded" in capsys.readouterr().out
