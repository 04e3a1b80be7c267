"""Finds and loads oarlock_ops.so, the library of fused operators that custom_ops/build.py makes."""

from __future__ import annotations

import functools
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from oarlock.environment.console import log_once
from oarlock.errors import EnvironmentProblem
from oarlock.formats.json_file import read_json

LIBRARY = Path(__file__).with_name("oarlock_ops.so")
INTERFACE = 8  # of custom_ops/build.py
_HOW = "`bash scripts/setup.sh` or `python custom_ops/build.py` builds them, with g++ (and nvcc for GPUs)"


class Stamp(TypedDict):
    """The description of a build: number of its interface, version of Paddle, version of CUDA or ""."""

    interface: int
    paddle: str
    cuda: str
    objects: NotRequired[list[str]]


def why_missing(on_gpu: bool = False) -> str:
    """Return why the operators can't be used and what to do, or "" if they can. Does not import paddle."""
    try:
        built = built_for()
    except EnvironmentProblem as error:
        return f"the fused ops' build is damaged: {error} ({_HOW})"
    if built is None:
        return f"the fused ops are not built ({_HOW})"
    if built["interface"] != INTERFACE:
        return f"the fused ops were built from the sources of another version of Oarlock ({_HOW})"
    here = _paddle_version()
    if here and here != built["paddle"]:
        return f"the fused ops were built for Paddle {built['paddle']}, this is {here} ({_HOW})"
    if on_gpu and not built["cuda"]:
        return f"the fused ops were built for the CPU only ({_HOW})"
    return ""


def usable(on_gpu: bool = False) -> bool:
    """Whether the operators can be used. If not, the reason is logged once."""
    reason = why_missing(on_gpu)
    if reason:
        log_once(f"{reason}; Paddle's own ops are used (same result, slower)")
    return not reason


def has_products() -> bool:
    """Whether this Paddle includes MKL, which some operators call for matrix products (on x86 it does)."""
    import paddle

    return (Path(paddle.__file__).parent / "libs" / "libmklml_intel.so").exists()


def built_for() -> Stamp | None:
    """Read the description of the build, or return None if there is no build.

    Raises:
        EnvironmentProblem: if it can't be read.
    """
    stamp = LIBRARY.with_suffix(".stamp")
    if not LIBRARY.exists() or not stamp.exists():
        return None
    return read_json(stamp, Stamp, error=EnvironmentProblem)


def _paddle_version() -> str:
    for name in ("paddlepaddle-gpu", "paddlepaddle"):
        try:
            return metadata.version(name).split("+")[0].split(".post")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def load() -> None:
    """Register the operators with Paddle; later calls do nothing.

    Raises:
        ImportError: if they are not built, or built for another Paddle.
    """
    if reason := why_missing():
        raise ImportError(reason)
    with warnings.catch_warnings():  # about a ccache that is not needed
        warnings.filterwarnings("ignore", "No ccache found")
        from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

    load_op_meta_info_and_register_op(str(LIBRARY))


def run(operator: str, *arguments: Any) -> Any:
    """Call an operator with its inputs, then its attributes. Returns its output, or a list of several.

    Raises:
        ImportError: if the operators are not built.
        ValueError: if the operator refuses shapes or types.
    """
    from paddle import _C_ops

    load()
    try:
        outputs = _C_ops._run_custom_op(operator, *arguments)
    except OSError as error:  # raised by PD_CHECK: "text\n  [file:line]"
        raise ValueError(f"{operator}: {str(error).splitlines()[0]}") from None
    return outputs[0] if len(outputs) == 1 else outputs
