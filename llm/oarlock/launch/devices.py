"""Which GPUs the ranks of this node use."""

from __future__ import annotations

import os
import re
import subprocess

from oarlock.errors import ConfigError
from oarlock.launch.options import LaunchOptions, name_option

_COUNT = re.compile(r"[1-9][0-9]{0,5}")
_LIST = re.compile(r"[A-Za-z0-9-]+(,[A-Za-z0-9-]+)+")


def choose_devices(options: LaunchOptions) -> list[str]:
    """Return the names of this node's devices, one per rank. On the CPU they are numbers from 0.

    A count takes the first visible GPUs: with CUDA_VISIBLE_DEVICES=4,5,6, two GPUs are 4 and 5. A single digit is a
    count, never a name.

    Raises:
        ConfigError: the value has the wrong form, or this machine lacks the GPUs.
    """
    wanted = options.gpus
    if wanted is None and options.device == "cpu":
        wanted = "1"
    if wanted is not None and not (_COUNT.fullmatch(wanted) or _LIST.fullmatch(wanted)):
        raise ConfigError(f"{name_option('gpus')} must be a list (0,1,2,3) or a number of GPUs (4); got {wanted!r}")
    if options.device == "cpu":
        return _expand(wanted or "1")
    # A dry run may describe another machine. CUDA_VISIBLE_DEVICES counts even then.
    if options.dry_run and wanted and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return _expand(wanted)
    available = list_gpus()
    if not available:
        reason = "CUDA_VISIBLE_DEVICES is empty" if "CUDA_VISIBLE_DEVICES" in os.environ else "nvidia-smi lists none"
        command = options.rehearsal or "oarlock launch --device cpu --gpus N SCRIPT --model_name_or_path SMALL_MODEL"
        raise ConfigError(
            f"no NVIDIA GPU here ({reason}). To rehearse on the CPU, with the model of the quickstart or another small "
            f"one:\n  {command}"
        )
    if wanted is None:
        return available
    if _COUNT.fullmatch(wanted):
        if int(wanted) > len(available):
            raise ConfigError(
                f"{name_option('gpus')} asks for {wanted} GPUs, but {len(available)} can be seen "
                f"({' '.join(available)})"
            )
        return available[: int(wanted)]
    devices = _expand(wanted)
    for device in devices:
        if device not in available:
            raise ConfigError(
                f"{name_option('gpus')} is {wanted}: no GPU {device} here (there are: {' '.join(available)})"
            )
    return devices


def list_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use.

    Paddle's launcher takes the names in CUDA_VISIBLE_DEVICES (a batch system may set it), not positions in it.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return listed.split(",") if listed else []
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return []
    return re.findall(r"^GPU (\d+):", listing.stdout, re.MULTILINE)


def _expand(wanted: str) -> list[str]:
    return [str(i) for i in range(int(wanted))] if _COUNT.fullmatch(wanted) else wanted.split(",")
