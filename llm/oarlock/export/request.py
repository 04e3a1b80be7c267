"""An export request, and all its checks that don't need Paddle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oarlock.data.templates.chat_template import TEMPLATE_FILE
from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.errors import ConfigError, ModelError
from oarlock.export.checks.findings import read_object
from oarlock.export.servers import SERVED_NAME, SERVERS, check_architecture
from oarlock.families.registry import FAMILIES, find_hf_config
from oarlock.files import require_empty
from oarlock.model_config.family_detection import detect_family
from oarlock.weights.save import MAX_SHARD_BYTES

_CONVERTED = tuple(SERVERS)
_WITH_ADAPTERS = ("triton", "peft")  # targets that take adapters unmerged
_SPARE_BYTES = 50_000_000  # for the tokenizer, the manifest and so on


@dataclass(frozen=True)
class ExportRequest:
    """A request to export a model for a target.

    Attributes:
        model: folder or hub name; "" for the base of the adapters.
        adapters: folders of the adapters.
        name: name of the served model.
        dtype: type of the weights; None keeps that of each tensor.
        proof: compare the logits of the result and the source.
        keep_adapters: export the adapters next to the model instead of merging them (vllm).
    """

    target: str
    model: str
    output: Path
    adapters: tuple[Path, ...] = ()
    name: str = "oarlock"
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    proof: bool = True
    allow_pickle: bool = False
    keep_adapters: bool = False

    @property
    def merges(self) -> bool:
        """Whether adapters are merged into the weights."""
        return bool(self.adapters) and self.target not in _WITH_ADAPTERS and not self.keep_adapters

    @property
    def converts(self) -> bool:
        """Whether the result is in Hugging Face's layout."""
        return self.target in _CONVERTED


def name_adapters(adapters: Sequence[Path]) -> dict[str, Path]:
    """Name each adapter for clients, by its folder.

    Raises:
        ConfigError: when two have the same name, or a name is malformed.
    """
    found: dict[str, Path] = {}
    for path in adapters:
        name = path.resolve().name
        if name in found:
            raise ConfigError(f"--adapter {path}: two adapters have the name {name}, by which clients choose one")
        if not SERVED_NAME.fullmatch(name):
            raise ConfigError(
                f"--adapter {path}: the name of the folder is its name for clients; use letters, digits, . _ -"
            )
        found[name] = path
    return found


def check_options(request: ExportRequest) -> None:
    """Refuse options that don't go together, and an output folder that isn't empty. Reads no file.

    Raises:
        ConfigError: names the flag.
        ModelError: the output folder isn't empty.
    """
    target = request.target
    if not request.model and not request.adapters:
        raise ConfigError("--model DIR is missing")
    if target == "peft" and len(request.adapters) != 1:
        raise ConfigError("--target peft exports one LoRA adapter; give it by --adapter DIR")
    if request.keep_adapters and (target != "vllm" or not request.adapters):
        raise ConfigError("--keep-adapter needs --target vllm and --adapter DIR (triton always keeps adapters)")
    if request.dtype and not request.converts:
        raise ConfigError(f"--dtype is for --target {', '.join(_CONVERTED)}; {target} has a fixed type")
    if not SERVED_NAME.fullmatch(request.name):
        raise ConfigError(f"--name {request.name!r}: use letters, digits, . _ - (it is part of URLs)")
    if request.keep_adapters or target == "triton":
        name_adapters(request.adapters)
    require_empty(request.output)


def check_source(request: ExportRequest, folder: Path) -> None:
    """Refuse a model that the target can't run, and a disk that is too small.

    Args:
        folder: folder of the model, or of the base of the adapters.

    Raises:
        ModelError: with the reason.
    """
    config = read_object(folder / "config.json")
    if isinstance(config, str):
        raise ModelError(f"{folder / 'config.json'} {config}, so it is not a model")
    _check_family(request, detect_family(config, str(folder / "config.json")))
    if request.target == "peft":
        return
    if not any(map(has_tokenizer, (*(request.adapters if request.merges else ()), folder))):
        raise ModelError(
            f"{folder} has no tokenizer, which a server needs. Copy its files there, or use `oarlock convert`, "
            f"which doesn't need one"
        )
    patterns = ("*.safetensors", *(("*.bin", "*.pdparams") if request.allow_pickle else ()))
    size = sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
    needed = size * (2 if request.merges else 1) + _SPARE_BYTES
    place = next(parent for parent in (request.output.resolve(), *request.output.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        merged = ", half of it temporarily for merging the adapters" if request.merges else ""
        raise ModelError(
            f"{request.output}: the export takes about {needed / 1e9:,.2f} GB{merged}, but only {free / 1e9:,.2f} GB "
            "are free there"
        )


def _check_family(request: ExportRequest, family: str) -> None:
    if request.converts or request.target == "peft":
        find_hf_config(family)
    if request.converts:
        check_architecture(request.target, FAMILIES[family].architecture)


def has_template(folder: Path) -> bool:
    """Return whether a folder has a chat template."""
    about = read_object(folder / "tokenizer_config.json")
    inside = about.get("chat_template") if isinstance(about, dict) else None
    return (folder / TEMPLATE_FILE).is_file() or bool(inside)
