"""Default sequence lengths are cut to the model's context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from oarlock.config.load import is_default
from oarlock.environment.console import log_once
from oarlock.models.build import find_position_limit

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.models.build import ModelSource

ConfigT = TypeVar("ConfigT", bound="RunConfig")


def fit_lengths(config: ConfigT, source: ModelSource, origins: Mapping[str, str], before: int = 0) -> ConfigT:
    """Cut lengths that are defaults to the model's context. check_lengths() refuses lengths that the user chose.

    Args:
        source: its configuration gets the new length.
        origins: origin of each option (see LoadedConfig).
        before: positions of a prefix (Method.positions).

    Returns:
        The configuration with the new lengths.
    """
    name, positions = find_position_limit(source.config)
    # P-tuning's virtual tokens are counted in the sequence, a prefix is not.
    room = positions - before - (config.sequence_length - config.data.row_length)
    data = config.data
    names = data.LENGTH_OPTIONS
    free = [name for name in names if is_default(config, origins, name)]
    asked = data.sample_length
    fixed = sum(getattr(data, name) for name in names if name not in free)
    if not positions or not free or asked <= room or room - fixed < 2 * len(free):
        return config
    lengths: dict[str, int] = {}
    for i, option in enumerate(free):
        left = room - fixed - sum(lengths.values())
        share = getattr(data, option) / sum(getattr(data, name) for name in free[i:])
        lengths[option] = max(1, int(left * share)) if i + 1 < len(free) else min(left, getattr(data, option))
    said = " and ".join(f"--{option} {value} (default {getattr(data, option)})" for option, value in lengths.items())
    log_once(f"the model was made for {positions:,} tokens ({name}): lengths are reduced to {said}")
    fitted = replace(config, data=replace(data, **lengths))
    source.config.seq_length = fitted.sequence_length
    return fitted
