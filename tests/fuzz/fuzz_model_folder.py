"""Model, tokenizer and adapter folders with one fuzzed file: a small model, or an error that names the folder.

An input is the name of a file, a line end, and its content; everything else in the folder is as it should be.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from harness import Harness
from safetensors.numpy import save

from oarlock.errors import OarlockError

os.environ["RUST_BACKTRACE"] = "0"  # otherwise every panic of the tokenizers library takes a second to print
MODEL, TOKENIZER, ADAPTER, PEFT = "model", "tokenizer", "adapter", "peft"
FILES = {
    "config.json": MODEL,
    "generation_config.json": MODEL,
    "model.safetensors": MODEL,
    "model.safetensors.index.json": MODEL,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": TOKENIZER,
    "added_tokens.json": TOKENIZER,
    "chat_template.json": TOKENIZER,
    "tokenizer.model": "sentencepiece",
    "vocab.json": "bytes",
    "merges.txt": "bytes",
    "tekken.json": "tekken",
    "vocab.txt": "paddlenlp",
    "adapter.json": ADAPTER,
    "peft_model.safetensors": ADAPTER,
    "adapter_config.json": PEFT,
    "adapter_model.safetensors": PEFT,
}
FAMILIES = ("llama", "bloom", "chatglm_v2", "gptj")
_READ = "Hello  world 12345\n"


def target(data: bytes, folder: Path, good: Path) -> None:
    name, _, content = data.partition(b"\n")
    file = name.decode("ascii", "replace")
    if file not in FILES:
        return
    kind = FILES[file]
    place = folder / kind
    place.mkdir(exist_ok=True)
    for path in place.iterdir():  # rmtree names files relative to descriptors, which looks like a path outside
        path.unlink()
    for path in (good / kind).iterdir():
        shutil.copyfile(path, place / path.name)
    (place / file).write_bytes(content)
    try:
        with mock.patch.object(tempfile, "tempdir", str(folder)):
            _open(kind, file, place, good)
    except OarlockError as error:
        assert len(str(error)) < 5000 and "\n" not in str(error), error
        raise


def _open(kind: str, file: str, place: Path, good: Path) -> None:
    from oarlock.data.templates.chat_template import choose_template
    from oarlock.data.tokenizers.load import load_tokenizer
    from oarlock.model_config.generation_config import find_end_tokens, read_generation_config, read_sampling_defaults
    from oarlock.model_config.load import find_model_class, read_config
    from oarlock.models.build import ModelSource, build_model
    from oarlock.peft.open_adapter import open_adapter

    if file == "generation_config.json":
        generation = read_generation_config(place)
        assert all(np.isfinite(value) for value in read_sampling_defaults(generation).values())
        assert all(token >= 0 for token in find_end_tokens(generation, None, None))
    elif kind == MODEL:
        model = build_model(ModelSource(place, read_config(place), from_weights=True))
        numbers = [parameter.numpy() for parameter in model.parameters()]
        assert sum(array.size for array in numbers) < 10**6 and all(np.isfinite(array).all() for array in numbers)
    elif kind in (ADAPTER, PEFT):
        config = read_config(good / MODEL)
        found = open_adapter(place).map_to_model(find_model_class(config), config)
        for name, shape in found.shapes().items():
            assert np.isfinite(found.value(name, shape)).all()
    else:
        tokenizer: Any = load_tokenizer(str(place))
        ids = tokenizer.encode(_READ) if kind != "paddlenlp" else tokenizer(_READ)["input_ids"]
        assert all(0 <= id_ < len(tokenizer) for id_ in ids)
        choose_template("auto", tokenizer, "src_tgt")


@contextlib.contextmanager
def around() -> Iterator[Path]:
    import jinja2.debug  # noqa: F401 (jinja2 imports it with its first error, which looks like code of the input)

    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle()
    set_paddlenlp_log_level("error")
    with tempfile.TemporaryDirectory(prefix="oarlock-fuzz-folders-") as folder:
        good = Path(folder)
        for kind, files in folders().items():
            (good / kind).mkdir()
            for name, content in files.items():
                (good / kind / name).write_bytes(content)
        yield good


def folders() -> dict[str, dict[str, bytes]]:
    """A valid folder of every kind: name -> content."""
    from families import family_model
    from helpers import make_tiny_tokenizer

    model = family_model("llama")
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    a, b = np.ones((32, 2), np.float32), np.ones((2, 32), np.float32)
    layer = "layers.0.self_attn.q_proj"
    with tempfile.TemporaryDirectory() as made:
        make_tiny_tokenizer(Path(made))
        tokenizer = {path.name: path.read_bytes() for path in Path(made).iterdir() if path.is_file()}
    letters = json.loads(tokenizer["tokenizer.json"])["model"]
    return {
        MODEL: {"config.json": _config("llama"), "model.safetensors": save(tensors, {"format": "np"})},
        TOKENIZER: tokenizer,
        "sentencepiece": {"tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer"}'},
        "bytes": {
            "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
            "vocab.json": json.dumps(letters["vocab"]).encode(),
            "merges.txt": "\n".join(m if isinstance(m, str) else " ".join(m) for m in letters["merges"]).encode(),
        },
        "tekken": {},
        "paddlenlp": {"tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'},
        ADAPTER: {
            "adapter.json": json.dumps(_adapter()).encode(),
            "peft_model.safetensors": save({f"llama.{layer}.lora_A": a, f"llama.{layer}.lora_B": b}, {"format": "np"}),
        },
        PEFT: {
            "adapter_config.json": json.dumps(_peft()).encode(),
            "adapter_model.safetensors": save(
                {
                    f"base_model.model.model.{layer}.lora_A.weight": np.ascontiguousarray(a.T),
                    f"base_model.model.model.{layer}.lora_B.weight": np.ascontiguousarray(b.T),
                }
            ),
        },
    }


def _config(family: str) -> bytes:
    from families import family_config

    content = family_config(family).to_diff_dict()
    return json.dumps(content, indent=1, default=str).encode()


def _adapter() -> dict[str, Any]:
    settings = {"r": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"], "rslora": False, "plus_scale": 1.0}
    return {
        "format": 1,
        "method": "lora",
        "settings": settings | {"quantization": None, "scaling": 2.0},
        "base": {"name": "base", "fingerprint": ""},
    }


def _peft() -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none",
        "target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True,
        "base_model_name_or_path": "base",
    }  # fmt: skip


def _sentencepiece() -> bytes:
    from oarlock.data.tokenizers.sentencepiece_file import _make_message_class

    model = _make_message_class()()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("\u2581", 1), ("H", 1), ("e", 1), ("He", 1)]
    for i, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, type=kind, score=-float(i))
    model.trainer_spec.model_type = 2
    return bytes(model.SerializeToString())


def seeds() -> list[bytes]:
    found = [(name, content) for files in folders().values() for name, content in files.items()]
    found += [("config.json", _config(family)) for family in FAMILIES]
    tekken = {"config": {"pattern": "\\w+|\\s", "default_vocab_size": 5, "default_num_special_tokens": 3},
              "vocab": [{"token_bytes": text} for text in ("SA==", "ZQ==", "SGU=")],
              "special_tokens": [{"rank": i, "token_str": text} for i, text in enumerate(("<unk>", "<s>", "</s>"))]}  # fmt: skip
    contents = {
        "generation_config.json": {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 1},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "bos_token": "<s>"},
        "added_tokens.json": {"<x>": 512, "<y>": 513},
        "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
        "tekken.json": tekken,
        "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}},
        "tokenizer_config.json": {
            "tokenizer_class": "PretrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 10**30,
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}, "600": {"content": "<z>"}},
            "additional_special_tokens": ["<a>", {"content": "<b>"}], "add_bos_token": True, "chat_template": "{{ a }}",
        },
    }  # fmt: skip
    found += [(name, json.dumps(content).encode()) for name, content in contents.items()]
    found += [
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n"),
        ("tokenizer.model", _sentencepiece()),
    ]
    return [name.encode() + b"\n" + content for name, content in found]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        *(f"{name}\n".encode() for name in FILES),
        *(b'"__class__": 5,', b'"to_dict": 5,', b'"hidden_size":', b'"num_hidden_layers":', b'"vocab_size":'),
        *(b'"model_type": "gptj",', b'"rope_scaling": {"type": "linear", "factor": 2},', b'"head_dim":', b'"type":'),
        *(b"1000000000", b"-1", b"0", b"null", b"[]", b"{}", b'"x"', b"true", b"1e30", b"4294967295", b"0.5"),
        *(b'"Regex": "(a+)+$"', b'{"type": "ByteLevel"}', b'{"type": "Sequence", "pretokenizers": [', b'"vocab": {'),
        *(b'{"type": "Strip", "content": "H", "start": 9, "stop": 9}', b'"dropout": 0.5', b'"byte_fallback": true'),
        *(b'"id": 600,', b'"content": "",', b'"normalizer": {"type": "NFC"},', b'"single_word": true,', b'"I32"'),
        *(b'"__metadata__":{', b'"format":"pt"', b"\\ud800", b"\xff\xff\x7f\x7f", b"\x00\x00\xc0\x7f", b'"model": {'),
        *(b'"continuing_subword_prefix": "##"', b'"unk_token": "q"', b'"type": "WordPiece"', b'"type": "Unigram"'),
    ],
    around=around,
)
