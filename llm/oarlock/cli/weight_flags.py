"""Flags of the commands that write the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oarlock.cli.flags import flag
from oarlock.config.options import at_least


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """The flag for the size of weight files."""

    max_shard_size: float = flag(5.0, at_least(1e-9), metavar="GB")
    """Largest weight file."""

    @property
    def shard_bytes(self) -> int:
        """Largest weight file in bytes."""
        return round(self.max_shard_size * 1e9)


@dataclass(frozen=True, kw_only=True)
class WeightFlags(ShardSize):
    """The flags for reading, writing and comparing weights."""

    dtype: str | None = flag(None, choices=("float32", "float16", "bfloat16"))
    """Type of the weights. Default: that of each weight in the source."""
    proof: bool = flag(True)
    """Skip the comparison of the result's logits with those of the source."""
    allow_pickle_weights: bool = flag(False)
    """Read pytorch_model.bin or *.pdparams if there are no safetensors files."""

    def to_arguments(self) -> dict[str, Any]:
        """Convert the flags to arguments of the functions in oarlock.api.models."""
        return {
            "dtype": self.dtype,
            "max_shard_bytes": self.shard_bytes,
            "proof": self.proof,
            "allow_pickle_weights": self.allow_pickle_weights,
        }
