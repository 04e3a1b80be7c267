"""The device of a run, and adapting a configuration to it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from oarlock.config.run_config import RunConfig
from oarlock.environment.console import log_once
from oarlock.errors import EnvironmentProblem

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def choose_device(requested: str | None) -> str:
    """ "gpu" or "cpu"; for None, a GPU if one is available.

    Raises:
        EnvironmentProblem: --device gpu was given, but Paddle is a CPU build or there is no GPU.
    """
    import paddle

    compiled = paddle.device.is_compiled_with_cuda()
    count = paddle.device.cuda.device_count() if compiled else 0
    if requested == "gpu" and not count:
        raise EnvironmentProblem(
            "--device gpu: no GPU is visible to Paddle (check nvidia-smi and CUDA_VISIBLE_DEVICES)"
            if compiled
            else "--device gpu: this is a CPU build of Paddle. Install paddlepaddle-gpu (bash scripts/setup.sh chooses "
            "the wheel for your driver), or use --device cpu"
        )
    return requested or ("gpu" if count else "cpu")


def fit_to_device(config: ConfigT, device: str) -> ConfigT:
    """Replace what a CPU does not support in a configuration, and log each replacement once."""
    if device != "cpu":
        return config
    precision = config.precision
    if precision.fp16 or precision.bf16:
        log_once(f"{'fp16' if precision.fp16 else 'bf16'} on a CPU: training in float32")
    precision = replace(precision, fp16=False, bf16=False, amp_master_grad=False)
    runtime = replace(config.runtime, device="cpu")
    return replace(config, precision=precision, runtime=runtime)
