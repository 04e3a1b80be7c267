"""The one place where fused operators take the place of Paddle's and PaddleNLP's own, by their names.

A patch is a class or module, the name in it, and a function that is given what is there and returns what takes its
place. The replacement calls the original wherever `fits` says no: other devices, types and modes keep their way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import paddle

from oarlock.environment import say_once
from oarlock.ops import library
from oarlock.ops.norms import fused_rms_norm

Function = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """What is replaced.

    Attributes:
        owner: "module" or "module:Class".
        name: of the function or method in it.
        make: original -> replacement.
    """

    owner: str
    name: str
    make: Callable[[Function], Function]

    def find(self) -> Any:
        """The module or class."""
        module, _, of_class = self.owner.partition(":")
        found = import_module(module)
        return getattr(found, of_class) if of_class else found


def fits(*tensors: Any) -> bool:
    """Whether the fused operators serve these: all float32 on the CPU."""
    for tensor in tensors:
        if tensor.dtype != paddle.float32 or not tensor.place.is_cpu_place():
            say_once(f"the fused CPU ops are for float32; {tensor.dtype} goes through Paddle's own")
            return False
    return True


def _rms_norm(original: Function) -> Function:
    def forward(self: Any, hidden_states: paddle.Tensor) -> paddle.Tensor:
        if not fits(hidden_states, self.weight):
            return original(self, hidden_states)
        return fused_rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]

    return forward


_MODELS = "paddlenlp.transformers."
PATCHES: list[Patch] = [
    Patch(_MODELS + "llama.modeling:LlamaRMSNorm", "forward", _rms_norm),
    Patch(_MODELS + "qwen2.modeling:Qwen2RMSNorm", "forward", _rms_norm),
    Patch(_MODELS + "mistral.modeling:MistralRMSNorm", "forward", _rms_norm),
    Patch(_MODELS + "mixtral.modeling:MixtralRMSNorm", "forward", _rms_norm),
]
_originals: list[tuple[Any, str, Function]] = []


def install() -> bool:
    """Put the fused operators in place, once in a process, before models are built.

    Returns:
        Whether they are in place; where they are not built, that is said once and nothing changes.
    """
    if _originals:
        return True
    if reason := library.why_missing():
        say_once(f"{reason}; Paddle's own ops are used (same result, slower)")
        return False
    library.load()
    for patch in PATCHES:
        owner = patch.find()
        original = getattr(owner, patch.name)
        _originals.append((owner, patch.name, original))
        setattr(owner, patch.name, patch.make(original))
    return True


def uninstall() -> None:
    """Put the originals back (tests compare both)."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
