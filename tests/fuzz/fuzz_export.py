"""The checker of exports on a directory with one fuzzed file: it returns findings or one OarlockError."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Harness
from safetensors.numpy import save

from oarlock.errors import OarlockError
from oarlock.export.checks.check import check_folder, guess_server
from oarlock.export.checks.findings import Finding
from oarlock.export.manifest import MANIFEST_FILE, find_changed_files, read_manifest, write_manifest
from oarlock.export.start_scripts import format_start_script

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 4,
    "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0,
    "rope_scaling": None, "torch_dtype": "float32",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PBTXT = """\
name: "chat"
backend: "python"
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
parameters { key: "adapters" value { string_value: "a" } }
"""


@functools.cache
def good_files() -> dict[str, bytes]:
    """The files of a model directory, and in `repository` those of a Triton repository."""
    weights = save({"model.norm.weight": np.zeros(4, np.float32)}, {"format": "pt"})
    index = {"metadata": {"total_size": 16}, "weight_map": {"model.norm.weight": "model.safetensors"}}
    tokenizer = {"added_tokens": [{"id": 0, "content": "</s>"}], "model": {"type": "BPE", "vocab": {"a": 1}}}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    contents = {
        "config.json": CONFIG, "model.safetensors.index.json": index, "tokenizer.json": tokenizer,
        "tokenizer_config.json": about, "generation_config.json": {"eos_token_id": [0], "top_p": 0.9, "do_sample": True},
        "adapters/tone/adapter_config.json": {"r": 4},
    }  # fmt: skip
    files = {name: json.dumps(content).encode() for name, content in contents.items()}
    files |= {"chat_template.jinja": TEMPLATE.encode(), "model.safetensors": weights}
    files |= {"start.sh": format_start_script("vllm", CONFIG, "served", {"tone": 4}).encode()}
    repository = {
        "chat/config.pbtxt": PBTXT.encode(), "chat/1/model.py": b"class TritonPythonModel:\n    pass\n",
        "chat/1/model/model.safetensors": weights, "requirements.txt": b"numpy\n",
    }  # fmt: skip
    return files | {f"repository/{name}": content for name, content in repository.items()}


NAMES = (
    MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "start.sh",
    "model.safetensors.index.json", "adapters/tone/adapter_config.json", "chat_template.jinja", "model.safetensors",
    "repository/chat/config.pbtxt", "repository/chat/1/model.py", f"repository/{MANIFEST_FILE}",
)  # fmt: skip


def target(data: bytes, folder: Path) -> None:
    """Check a directory; the first byte of the input chooses the file that gets the rest."""
    model = folder / "model"
    if not model.exists():
        write(model)
    name = NAMES[(data[0] if data else 0) % len(NAMES)]
    path = model / name
    before = path.read_bytes()
    try:
        path.write_bytes(data[1:])
        if name.startswith("repository/"):
            judge(model / "repository", "triton")
        else:
            judge(model, "vllm")
    finally:
        path.write_bytes(before)


def judge(folder: Path, server: str) -> None:
    guess_server(folder)
    for finding in check_folder(folder, server):
        assert isinstance(finding, Finding) and "Traceback" not in finding.to_line()
    with contextlib.suppress(OarlockError):
        read_manifest(folder)
        find_changed_files(folder)


def write(model: Path) -> None:
    for name, content in good_files().items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    write_manifest(model / "repository", target="triton")
    write_manifest(model, target="vllm", name="served")


def seeds() -> list[bytes]:
    manifest = {"format": 1, "target": "vllm", "name": "served", "template": None, "versions": {"oarlock": "1"}}
    manifest["files"] = {"config.json": {"bytes": 1, "sha256": "0" * 64}}
    contents = {**good_files(), MANIFEST_FILE: json.dumps(manifest).encode()}
    contents[f"repository/{MANIFEST_FILE}"] = contents[MANIFEST_FILE]
    return [bytes([i]) + contents[name] for i, name in enumerate(NAMES)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    from oarlock.compat import lazy_imports
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    lazy_imports.install()
    import_paddle()
    set_paddlenlp_log_level("error")
    yield


TOKENS = [
    b"$(touch x)", b"`touch x`", b'"../', b'"/etc/passwd"', b"1e999", b"99999999999999999999", b"-1", b"null", b"true",
    b'"rope_scaling":', b'"eos_token_id":', b'"temperature":', b'"files":', b'"sha256":', b"{" * 80, b"[" * 80,
    b"parameters {", b"EXECUTION_ENV_PATH", b"default_model_filename: ", b"{{ ", b"{% for x in range(9**9) %}", b"\0",
]  # fmt: skip
HARNESS = Harness(target, seeds, tokens=TOKENS, around=quiet)
