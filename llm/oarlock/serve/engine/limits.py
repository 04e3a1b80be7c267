"""What a server was told about its limits, and how it and its models tell each other. Does not import paddle.

An exported repository has its limits as parameters in config.pbtxt; `oarlock serve` changes them by OARLOCK_SERVE, a
JSON object in the environment, and reads from the folder OARLOCK_SERVE_RUN how busy the model is and why it failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from oarlock.errors import ConfigError
from oarlock.files import write_text_atomically
from oarlock.serve.engine.prompts import PARSINGS, Parsing

LIMITS_VARIABLE, RUN_VARIABLE = "OARLOCK_SERVE", "OARLOCK_SERVE_RUN"
_FAILURE_FILE = "failure.txt"


@dataclass(frozen=True)
class Settings:
    """Limits of a server, all at least 1, and how it reads texts.

    Attributes:
        max_batch: requests that are answered at a time.
        max_queue: requests that wait.
        max_tokens: of an answer.
        max_length: tokens of a prompt and its answer; 0 for the model's context.
        timeout: seconds for a request.
        max_body: bytes of a request.
        parse_special_tokens: where a client's text is read as special tokens, see prompts.py.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int = 4096
    max_length: int = 0
    timeout: float = 600.0
    max_body: int = 1 << 20
    parse_special_tokens: Parsing = "prompts"

    def __post_init__(self) -> None:
        if self.parse_special_tokens not in PARSINGS:
            raise ConfigError(
                f"--parse-special-tokens {self.parse_special_tokens}: it has to be one of {', '.join(PARSINGS)}"
            )
        for name, value in asdict(self).items():
            if isinstance(value, str):
                continue
            least = 0 if name == "max_length" else 1
            if not least <= value < 1 << 40:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: it has to be at least {least}")

    @classmethod
    def read(cls, parameters: Mapping[str, str], over: Mapping[str, Any] | None = None) -> Settings:
        """Of a model's parameters.

        Args:
            over: what counts in their place; by default that of the environment.

        Raises:
            ConfigError: when one is no number, or out of range.
        """
        over = json.loads(os.environ.get(LIMITS_VARIABLE) or "{}") if over is None else over
        given: dict[str, Any] = {**parameters, **over}
        kinds: dict[str, Callable[[Any], Any]] = {"timeout": float, "parse_special_tokens": str}
        try:
            found = {
                item.name: kinds.get(item.name, int)(given[item.name]) for item in fields(cls) if item.name in given
            }
        except ValueError as error:
            raise ConfigError(f"config.pbtxt: a parameter is not a number: {error}") from error
        return cls(**found)

    def engine_limits(self) -> dict[str, Any]:
        """The arguments of oarlock.serve.engine.sampling_params.Limits."""
        return {
            "max_batch": self.max_batch,
            "max_queue": self.max_queue,
            "max_tokens": self.max_tokens,
            "max_length": self.max_length or None,
            "seconds": self.timeout,
        }


def busy_file(process: int) -> int | None:
    """A descriptor to write the number of open requests to; None where nobody asks for it."""
    run = os.environ.get(RUN_VARIABLE)
    return os.open(Path(run) / f"busy-{process}", os.O_CREAT | os.O_WRONLY, 0o600) if run else None


def num_busy(run: Path) -> int:
    """Open requests of all models of a server that are alive."""
    total = 0
    for path in run.glob("busy-*"):
        if Path("/proc", path.name.removeprefix("busy-")).exists():
            total += int(path.read_text() or 0)
    return total


def note_failure(text: str) -> None:
    """Tell the server why the model does not load."""
    run = os.environ.get(RUN_VARIABLE)
    if run:
        write_text_atomically(Path(run) / _FAILURE_FILE, text)


def noted_failure(run: Path, *, forget: bool = False) -> str:
    """What note_failure() was told, once more or for the last time; "" for nothing."""
    path = run / _FAILURE_FILE
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    if forget:
        path.unlink(missing_ok=True)
    return text


def forget_processes(run: Path) -> None:
    """Of a Triton that has ended: how busy its models were, and why they did not load."""
    for path in (*run.glob("busy-*"), run / _FAILURE_FILE):
        path.unlink(missing_ok=True)
