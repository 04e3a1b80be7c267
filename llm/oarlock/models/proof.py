"""Proof that a model just written computes what its source computes: a comparison of their logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oarlock.errors import ModelError

# Largest difference of a logit, relative to the largest logit, by the type of the weights written. Rounding changes a
# weight by up to 2**-11 (float16) or 2**-9 (bfloat16) of itself; the factor of 16 covers what the layers make of it.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 16 * 2.0**-11, "bfloat16": 16 * 2.0**-9}


@dataclass(frozen=True)
class Proof:
    """The result of a comparison.

    Attributes:
        difference: the largest of a logit, relative to the largest logit of the reference.
        allowed: the largest difference that passes.
    """

    difference: float
    allowed: float


def coarsest_dtype(dtypes: set[str]) -> str:
    """The type with the largest tolerance, "float32" where none of them has one (integers)."""
    return max(dtypes & TOLERANCES.keys(), key=lambda dtype: (TOLERANCES[dtype], dtype), default="float32")


def compare_logits(subject: str, found: np.ndarray, reference: str, expected: np.ndarray) -> float:
    """The largest difference of a logit, relative to the largest of `expected`.

    Args:
        subject, reference: what the logits are of, for messages.

    Raises:
        ModelError: when some of them are not finite.
    """
    for name, logits in ((reference, expected), (subject, found)):
        if not np.isfinite(logits).all():
            raise ModelError(f"proof: {name} gives logits that are not finite numbers, so nothing was written")
    return float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)


def require_equal(proof: Proof, dtype: str, failure: str) -> None:
    """Refuse a model whose logits differ from those of its reference by more than is allowed.

    Args:
        dtype: of its weights.
        failure: what the message says, for example "the converted model is not the source".

    Raises:
        ModelError: with both numbers.
    """
    if not proof.difference <= proof.allowed:  # NaN too
        raise ModelError(
            f"proof: {failure}: logits differ by {proof.difference:.1e} of the largest, allowed for "
            f"{dtype} are {proof.allowed:.1e}; nothing was written"
        )
