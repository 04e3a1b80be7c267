"""Fine-tuning methods that train a few parameters of a frozen model, as the trainer sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from paddle import nn

from oarlock.errors import ModelError
from oarlock.peft.lora import LoRA
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.weights.copy_into_params import ParameterBuffer
from oarlock.weights.layout import ParameterShard, parameter_shards

if TYPE_CHECKING:
    from oarlock.config.method import MethodSection


class Method(Protocol):
    """One way to train few parameters.

    Attributes:
        name: in adapter.json.
    """

    name: str

    def check(self, family: str) -> None:
        """Refuse a family that lacks what the method needs, before anything is read.

        Raises:
            ModelError: with the reason and an alternative.
        """
        ...

    def positions(self, family: str) -> int:
        """Count the model's positions that the method takes from the text."""
        ...

    def attach(self, model: nn.Layer) -> None:
        """Add its parameters to this rank's unwrapped model, in place, and freeze all others.

        The model may have parameters without memory (paddle.LazyGuard). Each new parameter that is a slice of a whole
        tensor
        gets the attribute `tensor_slice` (oarlock.weights.layout).

        Raises:
            ModelError: when the family lacks what the method needs.
        """
        ...

    def initial(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Draw the initial value of a whole parameter, float32."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the settings from which the method can be restored."""
        ...


def choose_method(section: MethodSection) -> Method | None:
    """Make the method that the options ask for. None if all parameters are trained."""
    if section.lora or section.qlora:
        return LoRA.from_config(section)
    if section.prefix_tuning:
        return Prefix(section.num_prefix_tokens)
    if section.p_tuning:
        return PTuning(section.num_virtual_tokens, section.p_tuning_encoder, section.p_tuning_hidden_size)
    return None


def restore_method(name: str, settings: dict[str, Any]) -> Method:
    """Restore a method from its name and what its describe() returned.

    Raises:
        ModelError: for one that this version does not know.
    """
    try:
        if name == LoRA.name:
            return LoRA.from_description(settings)
        return {Prefix.name: Prefix, PTuning.name: PTuning}[name](**settings)
    except (KeyError, TypeError) as error:
        raise ModelError(f"a fine-tuning method this version does not know: {name} {settings}") from error


def trainable_parameters(model: nn.Layer) -> list[ParameterShard]:
    """List the parameters of this rank that have gradients."""
    return [parameter for parameter in parameter_shards(model) if not parameter.tensor.stop_gradient]


def fill_trained(model: nn.Layer, value: Callable[[str, tuple[int, ...]], np.ndarray]) -> None:
    """Set every trained parameter of this rank to its slice of a whole tensor.

    Args:
        value: returns a whole tensor by its name and shape.
    """
    for parameter in trainable_parameters(model):
        values = parameter.slice.cut(value(parameter.name, parameter.slice.shape))
        ParameterBuffer(parameter.tensor).put(0, max(1, values.shape[0] if values.ndim else 1), values)


def initial_values(method: Method, seed: int) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Return a function that draws initial values from the seed and the names, the same under every plan."""

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        return method.initial(name, shape, np.random.default_rng(int.from_bytes(digest[:8], "little")))

    return value
