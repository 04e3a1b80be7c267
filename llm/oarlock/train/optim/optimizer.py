"""Settings of the optimizer beyond the Trainer's: clipping, weight decay, frozen parameters."""

from __future__ import annotations

from typing import Any

from paddle import nn

from oarlock.train.optim.clip import SLICE, GlobalNormClip


def configure_optimizer(optimizer: Any, model: nn.Layer, clip: GlobalNormClip, *, trainable_only: bool) -> Any:
    """Set the clip and the decayed parameters of an AdamW optimizer, and return it.

    All parameters decay except biases and the weights of norms. A bias is recognised by its name in its layer, a norm
    by its class. PaddleNLP's Trainer searches for "bias" and "norm" in the full name, and therefore decays Bloom's
    `ln_f`, GPT-J's `ln_1` and the slices of stage 3. The result is that of transformers 5
    (Trainer.get_decay_parameter_names) for the supported families.

    Args:
        model: this rank's model, before it is wrapped.
        trainable_only: leave out frozen parameters, which sharding would otherwise broadcast in every step.
    """
    decayed = set()
    for layer in model.sublayers(include_self=True):
        # Every family of PaddleNLP has its own class of RMSNorm.
        if not any(base.__name__.endswith(("LayerNorm", "RMSNorm")) for base in type(layer).__mro__):
            named = layer._parameters.items()
            decayed |= {p.name for name, p in named if p is not None and not name.endswith("bias")}
    optimizer._grad_clip = clip
    optimizer._apply_decay_param_fun = lambda name: name.removeprefix(SLICE) in decayed
    if trainable_only:
        trained = [parameter for parameter in optimizer._parameter_list if not parameter.stop_gradient]
        optimizer._parameter_list = optimizer._param_groups = trained
    return optimizer
