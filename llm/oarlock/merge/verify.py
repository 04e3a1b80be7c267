"""A comparison of a merged model with its base and adapters: the logits of both on a fixed batch."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ModelError
from oarlock.merge.deltas import restore_lora
from oarlock.merge.inputs import AdapterMix
from oarlock.model_config.load import find_model_class
from oarlock.models.layer_offload import make_empty_model, stream_logits
from oarlock.models.proof import TOLERANCES, Proof, coarsest_dtype, compare_logits, require_equal
from oarlock.peft.lora import LoRA
from oarlock.peft.method import trainable_parameters
from oarlock.weights.sources import SafetensorsSource, WeightSource
from oarlock.weights.weight_folder import WeightFolder

_BATCH = (2, 16)  # texts, tokens
_NOISE = 1e-5  # difference between two float32 computations of the same logits


@dataclass(frozen=True)
class MergeProof(Proof):
    """A comparison of the merged model with base + adapters.

    In float32 a difference of at most half of `effect` is allowed, so that a merge that forgets a part of a weak
    adapter is noticed too.

    Attributes:
        effect: difference between the base alone and base + adapters.
        dtype: coarsest type of the merged weights.
    """

    effect: float
    dtype: str

    def text(self) -> str:
        """One sentence for the log."""
        if self.effect == 0:
            return "proof: the adapters change nothing (their matrices are zero): the merged model equals the base"
        found = (
            f"proof: logits of the merged model and of base + adapters differ by {self.difference:.1e} of the largest "
            f"(allowed for {self.dtype}: {self.allowed:.1e}); the adapters change them by {self.effect:.1e}"
        )
        if self.difference > self.effect / 2:
            found += f". Rounding to {self.dtype} loses much of that; --dtype float32 keeps it"
        return found


def prove(base: WeightSource, mix: AdapterMix, folder: Path, config: PretrainedConfig, dtypes: set[str]) -> MergeProof:
    """Run base + adapters (PaddleNLP's LoRA layers), the base alone and the merged model, one after the other.

    All compute in float32, layer by layer from the files (oarlock.models.layer_offload).

    Args:
        folder: of the merged model.
        dtypes: of its weights.

    Raises:
        ModelError: when the merged model is another one, or equals the base.
    """
    model_type = find_model_class(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, _BATCH)
    both = _BaseWithAdapters(mix, base)
    model = make_empty_model(model_type, config, both.method)
    both.shapes = {held.name: held.slice.shape for held in trainable_parameters(model)}
    tuned = stream_logits(model, both.read, set(base.shapes), ids)
    both.off = True
    plain = stream_logits(model, both.read, set(base.shapes), ids)
    model = make_empty_model(model_type, config)
    with closing(SafetensorsSource(WeightFolder.open(folder), model_type, config, False)) as source:
        merged = stream_logits(model, source.read, set(source.shapes), ids)
    return judge(tuned, plain, merged, coarsest_dtype(dtypes))


def judge(tuned: np.ndarray, plain: np.ndarray, merged: np.ndarray, dtype: str) -> MergeProof:
    """Compare logits [texts, tokens, vocabulary] of base + adapters, the base, and the merged model.

    Args:
        dtype: of the merged weights.

    Raises:
        ModelError: as prove().
    """
    subject, reference = "the merged model", "base + adapters"
    difference = compare_logits(subject, merged, reference, tuned)
    effect = compare_logits("the base", plain, reference, tuned)
    allowed = TOLERANCES[dtype]
    if effect and allowed <= TOLERANCES["float32"]:
        allowed = min(allowed, max(effect / 2, _NOISE))
    proof = MergeProof(difference, allowed, effect, dtype)
    require_equal(proof, dtype, "the merged model is not base + adapters")
    if effect and np.array_equal(merged, plain):
        raise ModelError(
            f"proof: the adapters change logits by {effect:.1e} of the largest, and the merged model equals "
            f"the base: {dtype} is too coarse for so small a change (--dtype float32); nothing was written"
        )
    return proof


class _BaseWithAdapters:
    """The base with its adapters in LoRA layers. Several adapters become one with the sum of their ranks.

    Attributes:
        method: for the model.
        shapes: of the matrices in the model. Set them before reading.
        off: read B as zero, so that the model equals its base.
    """

    def __init__(self, mix: AdapterMix, base: WeightSource) -> None:
        self._parts, self._base = mix.parts, base
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.off = False
        self._alone = len(mix.parts) == 1
        if self._alone:
            self.method = restore_lora(mix.parts[0].adapter)
        else:
            rank = sum(part.adapter.settings["r"] for part in mix.parts)
            targets = {name.split(".")[-2] for part in mix.parts for name in part.adapter.names}
            self.method = LoRA(rank, alpha=rank, targets=tuple(sorted(targets)))

    def read(self, name: str, into: np.ndarray | None) -> np.ndarray:
        """Read a tensor of the model by its name."""
        shape = self.shapes.get(name)
        if shape is None:
            return self._base.read(name, into)
        is_b = name.endswith(".lora_B")
        if is_b and self.off:
            return np.zeros(shape, np.float32)
        matrices = []
        for part in self._parts:
            adapter, rank = part.adapter, part.adapter.settings["r"]
            own = (rank, shape[1]) if is_b else (shape[0], rank)
            if name not in adapter.names:  # this adapter has fewer layers
                matrices.append(np.zeros(own, np.float32))
                continue
            # PaddleNLP's layer scales a single adapter. Several are scaled here, each by the factor of its run.
            factor = part.weight * (1.0 if self._alone else adapter.settings["scaling"]) if is_b else 1.0
            matrices.append(adapter.value(name, own).astype(np.float32) * np.float32(factor))
        return np.concatenate(matrices, 0 if is_b else 1)
