"""What a run changes about the optimizer that the Trainer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import nn

from oarlock.train.optim.clip import SLICE, GlobalNormClip


def configure_optimizer(optimizer: Any, model: nn.Layer, clip: GlobalNormClip, *, trainable_only: bool) -> Any:
    """Set the clip and the decayed parameters of an AdamW, and return it.

    Args:
        model: this rank's, before it is wrapped.
        trainable_only: leave the frozen parameters out. Sharding would distribute them too, in every step.
    """
    optimizer._grad_clip = clip
    optimizer._apply_decay_param_fun = apply_decay_param_fun(model)
    if trainable_only:
        trained = [parameter for parameter in optimizer._parameter_list if not parameter.stop_gradient]
        optimizer._parameter_list = optimizer._param_groups = trained
    return optimizer


def apply_decay_param_fun(model: nn.Layer) -> Callable[[str], bool]:
    """Whether a parameter decays, by Paddle's name of it, under every plan: all but biases and the weights of norms.

    They are told by what they are: a bias by what its layer calls it, a norm by its class. (PaddleNLP's Trainer looks
    for "bias" and "norm" in the whole name, and so decays Bloom's `ln_f` and GPT-J's `ln_1`; the slices of stage 3
    have names of their own.) transformers 5 (Trainer.get_decay_parameter_names) goes by name and class, and comes to
    the same on these families.

    Args:
        model: this rank's, before it is wrapped.
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
    """LayerNorm, or RMSNorm, of which every family of PaddleNLP's has a class of its own."""
    return any(base.__name__.endswith(("LayerNorm", "RMSNorm")) for base in type(layer).__mro__)
