"""Finds and loads oarlock_ops.so, the library of fused operators that custom_ops/build.py makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("oarlock_ops.so")
BUILD = "bash scripts/setup.sh, or `python custom_ops/build.py`, builds them"
_loaded = False


def why_missing() -> str:
    """What keeps the library from being used, with what to do; "" when nothing does. Does not import paddle."""
    from importlib import metadata

    stamp = LIBRARY.with_suffix(".stamp")
    if not LIBRARY.exists() or not stamp.exists():
        return f"the fused ops are not built ({BUILD}; it takes g++)"
    built_for = json.loads(stamp.read_text(encoding="utf-8"))["paddle"]
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        try:
            version = metadata.version(name).split("+")[0].split(".post")[0]
        except metadata.PackageNotFoundError:
            continue
        if version != built_for:
            return f"the fused ops were built for Paddle {built_for}, here is {version} ({BUILD})"
    return ""


def load() -> None:
    """Register the operators with Paddle; later calls do nothing.

    Raises:
        ImportError: when they are not built, or for another Paddle.
    """
    global _loaded
    if _loaded:
        return
    if reason := why_missing():
        raise ImportError(reason)
    from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

    load_op_meta_info_and_register_op(str(LIBRARY))
    _loaded = True


def run(operator: str, *arguments: Any) -> Any:
    """Call a loaded operator: its inputs, then its attributes; gives its output, or a list of several."""
    from paddle import _C_ops

    try:
        outputs = _C_ops._run_custom_op(operator, *arguments)
    except OSError as error:  # what PD_CHECK becomes: "text\n  [file:line]"
        raise ValueError(f"{operator}: {str(error).splitlines()[0]}") from None
    return outputs[0] if len(outputs) == 1 else outputs
