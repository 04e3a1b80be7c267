"""Every harness: the module beside this one that has it as HARNESS, and the packages whose branches atheris follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A harness; `instrument` names packages beside oarlock, read by Python code."""

    module: str
    instrument: tuple[str, ...] = ()


TABLE = {
    "json": Row("fuzz_json"),
    "yaml": Row("fuzz_yaml", ("yaml",)),
    "safetensors": Row("fuzz_safetensors"),
    "checkpoint": Row("fuzz_checkpoint"),
}
