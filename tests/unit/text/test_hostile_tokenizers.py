"""Hostile or damaged tokenizers and vocabularies: the error names the fault."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import make_tiny_tokenizer
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ModelError

AT = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def _model(**changes: Any) -> Any:
    return lambda content: content["model"].update(changes)


def _vocab(**tokens: int) -> Any:
    return lambda content: content["model"]["vocab"].update(tokens)


def _added(**token: Any) -> Any:
    return lambda content: content["added_tokens"].append({"content": "<x>", **AT, **token})


def _part(**parts: Any) -> Any:
    return lambda content: content.update(parts)


GROWS, A = {"type": "Replace", "content": "eee"}, {"Sequence": {"id": "A", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LONG_TABLE = base64.b64encode(b"\4\0\0\0" + b"\0" * 4 + b"x" * 5000 + b"\0").decode()
PREPEND = {"type": "Prepend", "prepend": "x" * 4000}
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "huge id": (_vocab(zzq=10**9), "less than or equal to 16777216"),
    "holes": (_vocab(zzq=2**24), "so most ids are unused"),
    "negative": (_vocab(zzq=-1), "greater than or equal to 0"),
    "doubled id": (_vocab(zzq=5), "have the same id, 5"),
    "vocab of texts": (_vocab(zzq="5"), "must be an integer"),  # type: ignore[arg-type]
    "added id": (_added(id=10**9), "added_tokens"),
    "added twice": (_added(id=0), "two of them have the same id"),
    "added without content": (lambda c: c["added_tokens"].append({"id": 600, **AT}), "content is missing"),
    "merges": (_model(merges=[["qqq", "www"]]), "out of vocabulary"),
    "merges of ints": (_model(merges=[5]), "tokenizer.json: its model"),
    "no model": (_part(model=None), "its model must be an object"),
    "a model of another kind": (_model(type="__class__"), "its model"),
    "prefix": (_model(continuing_subword_prefix="##"), "tokenizer.json: "),
    "blows up": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(a+)+$"}}), "can't be used: .*retry-limit"),
    "long pattern": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "a" * 50_000}}), "a text of 50,000 characters"),
    "no pattern": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "["}}), "its pre_tokenizer"),
    "empty": (_part(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "b"}), "an empty pattern"),
    "prepend": (_part(normalizer={"type": "Prepend", "prepend": "x" * 10_000_000}), "characters"),
    "table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"}), "can't be used|invalid"),
    "table of 4 GB": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "4,294,967,295 bytes"),
    "no table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "\u00e9"}), "invalid precompiled_charsmap"),
    "long table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": LONG_TABLE}), "5,000 times as long"),
    "strip": (_part(decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}), "can't be used"),
    "number": (_part(decoder={"type": "Strip", "content": "a", "start": 10**12, "stop": 0}), "too large"),
    "template": (
        _part(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                              "pair": [], "special_tokens": {}}), "tokenizer.json|can't be used"),
    "ids": (
        _part(post_processor={
            "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "a", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"a": {"id": "a", "ids": [2**31 - 1], "tokens": ["a"]}}}), "the id 2,147,483,647"),
    "grows": (_part(normalizer={"type": "Sequence", "normalizers": [GROWS | {"pattern": {"String": "e"}}] * 40}), "as long"),
    "grows between": (_part(decoder={"type": "Sequence", "decoders": [GROWS | {"pattern": {"Regex": "(?=.)"}}] * 9}), "as long"),
    "bytes of bytes": (_part(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES] * 30}), "as long"),
    "prepends": (_part(normalizer={"type": "Sequence", "normalizers": [PREPEND] * 500}), "adds 2,000,000 characters"),
    "many texts": (_part(post_processor={"type": "TemplateProcessing", "single": [A] * 99, "pair": [A], "special_tokens": {}}),
                   "contains a text more than once"),
    "many tokens": (
        _part(post_processor={
            "type": "TemplateProcessing", "single": [A, *[{"SpecialToken": {"id": "a", "type_id": 0}}] * 99], "pair": [A],
            "special_tokens": {"a": {"id": "a", "ids": [1] * 99, "tokens": ["a"] * 99}}}), "adds 9,801 tokens around"),
    "deep": (_part(pre_tokenizer=json.loads('{"type":"Sequence","pretokenizers":[' * 70 + "]}" * 70)), "levels deep"),
    "parts": (_part(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}] * 30_000}), "parts|more than"),
    "not an object": (_part(normalizer=5), "normalizer must be an object or null"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizers_are_refused(tokenizer_folder, tmp_path, name):
    change, words = TOKENIZERS[name]
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value)


def test_padding_and_truncation_settings_allocate_nothing(tokenizer_folder, tmp_path):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    content["truncation"] = {"max_length": 3, "stride": 10**9, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(folder)).encode("Hello") == load_tokenizer(str(tokenizer_folder)).encode("Hello")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("special_tokens_map.json", {"__class__": "int"}, "'__class__' is not the name of a special token"),
        ("special_tokens_map.json", {"init_class": "x"}, "'init_class' is not the name of a special token"),
        ("special_tokens_map.json", {"_bos_token": "x"}, "'_bos_token' is not the name"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token must be"),
        ("special_tokens_map.json", {"eos_token": {"lstrip": True}}, "content is missing"),
        ("tokenizer_config.json", {"__class__": "int"}, "'__class__' is not the name"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999999999": {"content": "<x>"}}}, "is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}, "is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": {}}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"model_input_names": 5}, "model_input_names must be a list"),
        ("tokenizer_config.json", {"padding_side": "__class__"}, "padding_side must be 'left' or 'right'"),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "tokenizer_class must be a string"),
        ("tokenizer_config.json", {"additional_special_tokens": [[]]}, "additional_special_tokens"),
        ("added_tokens.json", {"<x>": 10**9}, "less than or equal"),
        ("added_tokens.json", {"<x>": 5, "<y>": 5}, "two tokens have the same id"),
        ("added_tokens.json", {"<x>": "5"}, "must be an integer"),
    ],
)
def test_files_next_to_a_tokenizer_are_type_checked(tokenizer_folder, tmp_path, file, content, words):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words) as error:
        load_tokenizer(str(folder))
    assert file in str(error.value)


def test_paths_and_code_names_in_tokenizer_files_are_ignored(tokenizer_folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("a private key")
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    path = folder / "tokenizer_config.json"
    names = ("vocab_file", "tokenizer_file", "merges_file", "spm_file", "sp_model_file", "special_tokens_map_file")
    content = json.loads(path.read_text()) | dict.fromkeys(names, str(secret)) | {"auto_map": {"AutoTokenizer": "x.Y"}}
    path.write_text(
        json.dumps(content | {"tokenizer_class": "os.system", "sp_model_kwargs": {"model_file": str(secret)}})
    )
    plain, found = load_tokenizer(str(tokenizer_folder)), load_tokenizer(str(folder))
    assert found.get_vocab() == plain.get_vocab()
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("*.model"):
        file.unlink()
    (folder / "vocab.txt").write_text("a\nb\n")
    for named in ("os.system", "AutoTokenizer", "PretrainedTokenizer", "LlamaTokenizer", "__class__", "Taskflow"):
        path.write_text(json.dumps({"tokenizer_class": named, "vocab_file": str(secret)}))
        with pytest.raises(ModelError, match=f"its class '{named}' is not supported"):
            load_tokenizer(str(folder))


def test_paddlenlp_tokenizers_get_only_checked_values(tmp_path, monkeypatch):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"query": "a private key"}))
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "vocab_file": str(secret), "chat_template": str(secret),
              "name_or_path": "/etc", "do_lower_case": True, "from_slow": 5, "never_split": 7}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"query": "x", "__class__": 5}))
    found: Any = load_tokenizer(str(folder))
    assert found("A b")["input_ids"] == [2, 5, 6, 3]
    assert found.chat_template is None and found.init_kwargs["vocab_file"] == str(folder / "vocab.txt")
    assert found.name_or_path == str(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"convert_tokens_to_ids": "x"}))
    with pytest.raises(ModelError, match="'convert_tokens_to_ids' is not the name of a special token"):
        load_tokenizer(str(folder))
    (folder / "special_tokens_map.json").write_text(json.dumps({"my_token": "x"}))
    with pytest.raises(ModelError, match="'my_token' is not a special token of a BertTokenizer"):
        load_tokenizer(str(folder))
    (folder / "special_tokens_map.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\nb\n")  # its ids exceed its size
    with pytest.raises(ModelError, match=r"a token appears twice in vocab\.txt"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tekken.json", {"config": {"pattern": "a", "default_num_special_tokens": 10**9}, "vocab": []}, "default_num_special"),
        ("tekken.json", {"config": {"pattern": "a" * 50_000}, "vocab": []}, "pattern"),
        ("tekken.json", {"config": {"pattern": "(a+)+$"}, "vocab": [{"token_bytes": "YQ=="}]}, "can't be used"),
        ("tekken.json", {"config": {"pattern": "a"}, "vocab": [{"token_bytes": "YWFh" * 1000}] * 200}, "too long or too many"),
        ("vocab.json", {"a": 10**9}, "less than or equal"),
        ("vocab.json", {"a": 0, "b": 0}, "have the same id"),
        ("vocab.json", {"a" * 5000: 0}, "tokens of up to 5,000 characters"),
    ],
)  # fmt: skip
def test_hostile_vocabularies_are_refused(tmp_path, file, content, words):
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ModelError, match=words):
        load_tokenizer(str(tmp_path))
