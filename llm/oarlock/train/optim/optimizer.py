"""Settings of the optimizer beyond the Trainer's: clipping, weight decay, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import nn

from oarlock.train.optim.clip import SLICE, GlobalNormClip


def configure_optimizer(optimizer: Any, model: nn.Layer, clip: GlobalNormClip, *, trainable_only: bool) -> Any:
    """Set the clip and the decayed parameters of an AdamW optimizer, and return it.

    Args:
        model: this rank's model, before it is wrapped.
        trainable_only: leave out frozen parameters, which sharding would otherwise broadcast in every step.
    """
    optimizer._grad_clip = clip
    optimizer._apply_decay_param_fun = choose_decayed_parameters(model)
    if trainable_only:
        trained = [parameter for parameter in optimizer._parameter_list if not parameter.stop_gradient]
        optimizer._parameter_list = optimizer._param_groups = trained
    return optimizer


def choose_decayed_parameters(model: nn.Layer) -> Callable[[str], bool]:
    """Choose the parameters with weight decay: all except biases and the weights of norms.

    A bias is recognised by its name in its layer, a norm by its class. PaddleNLP's Trainer searches for "bias" and
    "norm" in the full name, and therefore decays Bloom's `ln_f`, GPT-J's `ln_1` and the slices of stage 3. The result
    is that of transformers 5 (Trainer.get_decay_parameter_names) for the supported families.

    Args:
        model: this rank's model, before it is wrapped.

    Returns:
        A function from Paddle's name of a parameter (or of its stage 3 slice) to whether it decays.
    """
    decayed = {
        parameter.name
        for layer in model.sublayers(include_self=True)
        if not _is_norm(layer)
        for name, parameter in layer._parameters.items()
        if parameter is not None and not name.endswith("bias")
    }
    return lambda name: name.removeprefix(SLICE) in decayed


def _is_norm(layer: Any) -> bool:
    """True for LayerNorm, and for RMSNorm, of which every family of PaddleNLP has its own class."""
    return any(base.__name__.endswith(("LayerNorm", "RMSNorm")) for base in type(layer).__mro__)
