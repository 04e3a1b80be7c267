"""What is asked of `oarlock export`, and everything that can be refused before Paddle is imported."""

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
from oarlock.files import require_empty
from oarlock.model_config.family_detection import family_of
from oarlock.model_config.hf_config import words_of
from oarlock.parallel.family_rules import FAMILIES
from oarlock.weights.save import MAX_SHARD_BYTES

_CONVERTED = tuple(SERVERS)
_BESIDE = ("triton", "peft")  # take adapters as they are
_SPARE_BYTES = 50_000_000  # for tokenizer, manifest and the like


@dataclass(frozen=True)
class Request:
    """One export.

    Attributes:
        model: folder or hub name; "" for the base that the adapters name.
        adapters: their folders.
        name: of the served model.
        dtype: of the weights; None keeps each tensor's own.
        proof: compare scores.
        keep_adapters: beside the model, not merged (vllm).
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
        """Whether adapters become part of the weights."""
        return bool(self.adapters) and self.target not in _BESIDE and not self.keep_adapters

    @property
    def converts(self) -> bool:
        """Whether the result is a directory in Hugging Face's layout."""
        return self.target in _CONVERTED


def adapter_names(adapters: Sequence[Path]) -> dict[str, Path]:
    """What clients call each adapter: the name of its folder.

    Raises:
        ConfigError: when two have one name.
    """
    found: dict[str, Path] = {}
    for path in adapters:
        name = path.resolve().name
        if name in found:
            raise ConfigError(f"--adapter {path}: there is a second one of the name {name}, and it is asked for by it")
        if not SERVED_NAME.fullmatch(name):
            raise ConfigError(f"--adapter {path}: clients ask for it by the folder's name; use letters, digits, . _ -")
        found[name] = path
    return found


def check_options(request: Request) -> None:
    """Refuse options that do not go together, and an output that holds something. Reads nothing.

    Raises:
        ConfigError: naming the flag.
        ModelError: for the output.
    """
    target = request.target
    if not request.model and not request.adapters:
        raise ConfigError("--model DIR is missing: which model is to be exported?")
    if target == "peft" and len(request.adapters) != 1:
        raise ConfigError("--target peft exports one LoRA adapter: give it with --adapter DIR")
    if request.keep_adapters and (target != "vllm" or not request.adapters):
        raise ConfigError("--keep-adapter is for --target vllm with --adapter DIR (triton always keeps adapters)")
    if request.dtype and not request.converts:
        raise ConfigError(f"--dtype is for the weights of {', '.join(_CONVERTED)}; --target {target} has its own type")
    if not SERVED_NAME.fullmatch(request.name):
        raise ConfigError(f"--name {request.name!r}: use letters, digits, . _ - (it becomes part of addresses)")
    if request.keep_adapters or target == "triton":
        adapter_names(request.adapters)
    require_empty(request.output)


def check_source(request: Request, folder: Path) -> None:
    """Refuse a model that the target can't run, and a disk that is too small.

    Args:
        folder: of the model (the base).

    Raises:
        ModelError: with the reason.
    """
    config = read_object(folder / "config.json")
    if isinstance(config, str):
        raise ModelError(f"{folder / 'config.json'} {config}, so it is not a model")
    _check_family(request, family_of(config, str(folder / "config.json")))
    if request.target != "peft":
        _check_tokenizer(request, folder)
        _check_space(request, folder)


def _check_family(request: Request, family: str) -> None:
    if request.converts or request.target == "peft":
        words_of(family)
    if request.converts:
        check_architecture(request.target, FAMILIES[family].model)


def _check_tokenizer(request: Request, folder: Path) -> None:
    places = (*(request.adapters if request.merges else ()), folder)
    if not any(map(has_tokenizer, places)):
        raise ModelError(
            f"{folder} has no tokenizer, so that no server could be asked in words: copy its files there "
            f"(`oarlock convert` writes weights alone)"
        )


def _check_space(request: Request, folder: Path) -> None:
    patterns = ("*.safetensors", *(("*.bin", "*.pdparams") if request.allow_pickle else ()))
    size = sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
    needed = size * (2 if request.merges else 1) + _SPARE_BYTES
    place = next(parent for parent in (request.output.resolve(), *request.output.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        merged = ", half of it while the adapters are merged" if request.merges else ""
        raise ModelError(
            f"{request.output}: the export takes about {needed / 1e9:,.2f} GB{merged}, and {free / 1e9:,.2f} GB are "
            "free there"
        )


def template_of(folder: Path) -> bool:
    """Whether a folder has a chat template."""
    about = read_object(folder / "tokenizer_config.json")
    inside = about.get("chat_template") if isinstance(about, dict) else None
    return (folder / TEMPLATE_FILE).is_file() or bool(inside)
