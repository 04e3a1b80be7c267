"""For every folder, a text has the ids that transformers 5 gives it with the tokenizer of that folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oarlock.data.tokenizers.load import compute_tokenizer_fingerprint, load_encoder, load_tokenizer
from tokenizer_layouts import SHAPES, TEXTS, save, sentencepiece_model

MESSAGES = [{"role": "user", "content": "How far?"}]
TURNS = {"begin": "<|im_start|>", "end": "<|im_end|>"}
CASES = [text.replace("{begin}", TURNS["begin"]).replace("{end}", TURNS["end"]) for text in TEXTS]
CASES += ["<s>", "a </s> b", "<|endoftext|>\n", " [MASK] x", "<tool_call>\n{}", "<0x41>", "▁ <unk> ▁"]


class Matrix:
    """All folders, and what transformers 5 reads in them (one process for all)."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, self.folders = root, {}
        saved = []
        for name, (make, family) in SHAPES.items():
            tokenizer, config = make()
            self.add(name, save(root / name, tokenizer, config, family))
            saved.append((name, f"{name}, saved by transformers"))
            ours = root / f"{name}, saved by us"
            load_tokenizer(str(root / name)).save_pretrained(ours)
            self.add(ours.name, ours)
        self.vocabularies()
        self.real(Path(python).parents[1])
        jobs = {
            "save": [(str(self.folders[name]), str(root / target)) for name, target in saved],
            "read": [str(folder) for folder in self.folders.values()] + [str(root / target) for _, target in saved],
            "texts": CASES,
            "messages": MESSAGES,
        }
        for _, target in saved:
            self.add(target, root / target)
        (root / "jobs.json").write_text(json.dumps(jobs))
        peer = Path(__file__).with_name("tokenizer_peer.py")
        command = [python, str(peer), str(root / "jobs.json"), str(root / "found.json")]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert result.returncode == 0, result.stderr[-4000:]
        self.found = json.loads((root / "found.json").read_text())

    def add(self, name: str, folder: Path) -> None:
        self.folders[name] = folder

    def theirs(self, name: str) -> dict[str, Any]:
        return self.found[str(self.folders[name])]

    def vocabularies(self) -> None:
        """Folders without a tokenizer.json."""
        root = self.root
        for name, config, family in (
            ("qwen2", None, "qwen2"),
            ("gpt2", {"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
            ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "add_bos_token": True}, "opt"),
            ("gpt2", {}, "gptj"),
        ):
            tokenizer, own = SHAPES[name][0]()
            folder = save(root / f"vocab and merges of a {family}", None, own if config is None else config, family)
            tokenizer.model.save(str(folder))
            self.add(folder.name, folder)
        model = sentencepiece_model(root / "bpe", "bpe")
        unigram = sentencepiece_model(
            root / "unigram", "unigram", normalization_rule_name="nmt_nfkc", byte_fallback=False, vocab_size=400
        )
        bare = sentencepiece_model(root / "bare", "bpe", add_dummy_prefix=False, remove_extra_whitespaces=True)
        ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "bos_piece": "<bos>"}
        ids |= {"eos_piece": "<eos>", "user_defined_symbols": ["<mask>", "<|im_start|>", "<|im_end|>"]}
        gemma = sentencepiece_model(root / "gemma pieces", "bpe", add_dummy_prefix=False, **ids)
        for name, source, family, config in (
            ("gemma", gemma, "gemma", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
            ("llama", model, "llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
            ("old llama", model, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_eos_token": True}),
            (
                "mistral",
                model,
                "mistral",
                {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "pad_token": "<s>"},
            ),
            ("class of nobody", model, "", {"tokenizer_class": "YiTokenizer", "legacy": False}),
            ("no prefix", bare, "mistral", {}),
            ("unigram", unigram, "", {}),
            ("renamed", model, "mistral", {"added_tokens_decoder": {"3": {"content": "<|x|>", "special": True}}}),
        ):
            folder = save(root / f"pieces: {name}", None, config, family)
            shutil.copyfile(source, folder / "tokenizer.model")
            self.add(folder.name, folder)

    def real(self, environment: Path) -> None:
        """The files in mistral-common: the sentencepiece models and the tekken.json of Mistral."""
        data = next(environment.glob("lib/python3*/site-packages/mistral_common/data"), None)
        if data is None:
            return
        for number, source, config in (
            (1, "tokenizer.model.v1", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
            (2, "tokenizer.model.v1", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}),
            (3, "mistral_instruct_tokenizer_240323.model.v3", {"add_bos_token": True}),
            (4, "tekken_240911.json", {}),
        ):
            family = "llama" if number < 3 else "mistral"
            folder = save(self.root / f"mistral {number}", None, config, family)
            shutil.copyfile(data / source, folder / ("tekken.json" if number == 4 else "tokenizer.model"))
            self.add(folder.name, folder)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, parity_python) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("tokenizers"), parity_python)


TRAINED = [*SHAPES, *(f"{name}, saved by {whom}" for name in SHAPES for whom in ("us", "transformers"))]
VOCABULARIES = [
    *(f"vocab and merges of a {family}" for family in ("qwen2", "gpt2", "opt", "gptj")),
    *(
        f"pieces: {name}"
        for name in ("gemma", "llama", "old llama", "mistral", "class of nobody", "no prefix", "unigram", "renamed")
    ),
    *(f"mistral {number}" for number in (1, 2, 3, 4)),
]
# Folders for which AutoTokenizer of transformers 5 differs from their tokenizer.json: its LlamaTokenizer adds no
# space before a text that begins with one, nor (without "legacy", which its own save_pretrained loses) after a special
# token. The file takes precedence here, as in transformers 4 and in the servers.
DEPARTS = {"llama2 prepend", "llama2 always, saved by transformers"}


@pytest.mark.parametrize("name", [*TRAINED, *VOCABULARIES])
def test_ids_equal_transformers_for_every_text(matrix, name):
    if name not in matrix.folders:
        pytest.skip("mistral-common wants Python 3.11")
    theirs, ours = matrix.theirs(name), load_tokenizer(str(matrix.folders[name]))
    assert type(ours).__module__.startswith("oarlock.")
    bare = [ours(text, add_special_tokens=False)["input_ids"] for text in CASES]
    assert (bare == theirs["ids"]) is (name not in DEPARTS)
    theirs = theirs.get("as it stands", theirs)
    assert bare == ours(CASES, add_special_tokens=False)["input_ids"] == theirs["ids"]
    begin = [ours.bos_token_id]
    for text, own, whole in zip(CASES, bare, theirs["whole"], strict=True):
        # A text that begins with the begin token does not get a second one here.
        expected = whole[1:] if whole[:2] == 2 * begin and own[:1] == begin else whole
        assert ours(text)["input_ids"] == expected
    assert [ours.decode(row) for row in theirs["whole"]] == theirs["decoded"]
    assert [ours.decode(row, skip_special_tokens=True) for row in theirs["whole"]] == theirs["words"]


# (transformers names none of a tekken.json, which is the fourth.)
@pytest.mark.parametrize("name", [name for name in (*TRAINED, *VOCABULARIES) if name != "mistral 4"])
def test_special_tokens_equal_transformers(matrix, name):
    if name not in matrix.folders:
        pytest.skip("mistral-common wants Python 3.11")
    found = load_tokenizer(str(matrix.folders[name]))
    assert found.special_tokens_map == matrix.theirs(name)["special"]


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_saved_tokenizers_unchanged(matrix, name):
    before, after = matrix.theirs(name), matrix.theirs(f"{name}, saved by us")
    assert after["ids"] == before["as it stands"]["ids"] and after["whole"] == before["as it stands"]["whole"]
    assert after["special"] == before["special"] and after.get("prompt") == before.get("prompt")
    assert ("prompt" in after) is (
        "chat_template" in json.loads((matrix.folders[name] / "tokenizer_config.json").read_text())
    )


def test_the_fingerprint_does_not_depend_on_who_saved_the_tokenizer(matrix):
    seen: dict[str, str] = {}
    for name in set(SHAPES) - DEPARTS - {"llama2 always"}:
        folders = [matrix.folders[key] for key in (name, f"{name}, saved by us", f"{name}, saved by transformers")]
        found = {load_encoder(str(folder)).fingerprint for folder in folders if load_tokenizer(str(folder)).eos_token}
        assert len(found) <= 1, f"{name} changed its fingerprint"
        assert not found & seen.keys(), f"{name} and {seen} can't be told apart"
        seen |= dict.fromkeys(found, name)
        full = {compute_tokenizer_fingerprint(load_tokenizer(str(folder))) for folder in folders[:2]}
        assert len(full) == 1
    assert len(seen) >= 5
