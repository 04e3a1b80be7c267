"""The step of paddle.optimizer.AdamW for all parameters in one pass over memory (custom_ops/adamw).

AdamW: https://arxiv.org/abs/1711.05101. Float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oarlock.ops import library


def fused_adamw(optimizer: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Update parameters and their accumulators in place, so that checkpoints don't change.

    Args:
        optimizer: a paddle AdamW whose accumulators and learning rate exist.
        pairs: parameters and gradients, float32 on the CPU.
    """
    if not pairs:
        return
    parameters, gradients = [p for p, _ in pairs], [g for _, g in pairs]
    # Paddle refuses to write to a leaf that requires gradients. The detached tensor shares its memory.
    values = [p.detach() for p in parameters]
    names = (
        optimizer._moment1_acc_str,
        optimizer._moment2_acc_str,
        optimizer._beta1_pow_acc_str,
        optimizer._beta2_pow_acc_str,
    )
    accumulators = [[optimizer._get_accumulator_master(name, p) for p in parameters] for name in names]
    rate, decays_all = float(optimizer._global_learning_rate()), optimizer._apply_decay_param_fun
    rates, decays = [], []
    for parameter in parameters:
        ratio = 1.0 if optimizer._lr_ratio is None else optimizer._lr_ratio(parameter)
        rates.append(rate * parameter.optimize_attr["learning_rate"] * ratio)
        decayed = decays_all is None or decays_all(parameter.name)
        decays.append(optimizer._weight_decay if decayed else 0.0)
    library.run(
        "fused_adamw", values, gradients, *accumulators, rates, decays,
        optimizer._beta1, optimizer._beta2, optimizer._epsilon,
    )  # fmt: skip
