"""LoRA (arXiv 2106.09685) with PaddleNLP's layers under every plan; rsLoRA (2312.03732) and LoRA+ (2402.12354)."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from paddle import nn
from paddle.distributed.fleet.meta_parallel import PipelineLayer
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.peft.lora.lora_layers import LoRALinear

from oarlock.errors import ConfigError, ModelError
from oarlock.families.registry import FAMILIES
from oarlock.parallel.object_collectives import all_gather_objects
from oarlock.peft.qlora import quantize_base
from oarlock.peft.quantization import Quantization
from oarlock.weights.layout import TensorSlice, parameter_shards

if TYPE_CHECKING:
    from oarlock.config.method import MethodSection

_MATRIX_A, _MATRIX_B = "lora_A", "lora_B"


@dataclass(frozen=True)
class LoRA:
    """y = W x + scaling * B A x, with W frozen.

    Attributes:
        r: rank of A and B.
        alpha: scaling is alpha / r, or alpha / sqrt(r) with rslora.
        dropout: on the input of A.
        targets: last components of the names of the layers with LoRA; empty for the family's (Family.lora_targets).
        plus_scale: factor of B's learning rate relative to A's (LoRA+).
        quantization: of W, for QLoRA.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    plus_scale: float = 1.0
    quantization: Quantization | None = None

    name = "lora"

    @classmethod
    def from_config(cls, section: MethodSection) -> LoRA:
        """Make it from the options."""
        # PaddleNLP's own defaults: 2 r, and 4 with rslora.
        alpha = section.lora_alpha if section.lora_alpha is not None else (4 if section.rslora else 2 * section.r)
        targets = tuple(word for word in re.split(r"[,\s]+", section.lora_target_modules or "") if word)
        how = None
        if section.qlora:
            how = Quantization(
                section.weight_quantize_algo, section.qlora_weight_blocksize, section.qlora_weight_double_quant
            )
        return cls(section.r, alpha, section.lora_dropout, targets, section.rslora, section.lora_plus_scale, how)

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def attach(self, model: nn.Layer) -> None:
        held = parameter_shards(model)
        before = {id(parameter.tensor): parameter.slice for parameter in held}
        targets = self._make_patterns(model)
        # LoRAModel changes the model in place. Its own saving and merging are not used: they keep tensor-parallel
        # shards in separate files and do not support pipeline stages.
        LoRAModel(model, LoRAConfig(
            r=self.r,
            target_modules=targets,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            rslora=self.rslora,
            lora_plus_scale=self.plus_scale,
            tensor_parallel_degree=model.config.tensor_parallel_degree,
            dtype=model.config.dtype,
        ))  # fmt: skip
        if isinstance(model, PipelineLayer):
            model._single_to_pp_mapping = None  # it lacks the names of the new parameters
        for layer in model.sublayers():
            if hasattr(layer, _MATRIX_A):  # [in, r], and B [r, out]: one of them is split where the weight is
                weight = before[id(layer.weight)]
                if weight.axis is not None and isinstance(layer, LoRALinear):
                    raise ModelError(
                        "LoRA on experts can't be combined with --tensor_parallel_degree: leave their layers out of "
                        "--lora_target_modules, or use --expert_parallel_degree instead"
                    )
                rows, columns = weight.shape
                axis, runs = weight.axis, weight.runs
                first, second = (rows, self.r), (self.r, columns)
                layer.lora_A.tensor_slice = TensorSlice(first, 0, runs) if axis == 0 else TensorSlice(first)
                layer.lora_B.tensor_slice = TensorSlice(second, 1, runs) if axis == 1 else TensorSlice(second)
        if self.quantization is not None:
            quantize_base(model, held, self.quantization)

    def _make_patterns(self, model: nn.Layer) -> list[str]:
        family = model.config.model_type
        targets = self.targets or FAMILIES[family].lora_targets
        found: set[str] = set()
        for path, layer in model.named_sublayers():
            weight = getattr(layer, "weight", None)
            if "Linear" in type(layer).__name__ and weight is not None and len(weight.shape) == 2:
                found.add(path.rsplit(".", 1)[-1])
        if isinstance(model, PipelineLayer):  # stages have different layers
            found = set().union(*all_gather_objects(found))
        unknown = [target for target in self.targets if target not in found]
        if unknown:
            raise ConfigError(
                f"--lora_target_modules {', '.join(unknown)}: no such linear layer in this {family} model; it has "
                f"{', '.join(sorted(found))}"
            )
        if not self.targets and not found & set(targets):
            raise ModelError(f"LoRA: none of {', '.join(targets)} is a linear layer of this {family} model")
        return [rf"(.*\.)?{re.escape(target)}" for target in targets]

    def check(self, family: str) -> None:
        """Every family supports it."""

    def positions(self, family: str) -> int:
        return 0

    def initial(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """A as PaddleNLP draws it (Kaiming uniform with a = sqrt 5), B zero."""
        if name.endswith(_MATRIX_B):
            return np.zeros(shape, np.float32)
        bound = 1 / math.sqrt(shape[0])
        return random.uniform(-bound, bound, shape).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"targets": list(self.targets), "scaling": self.scaling}

    @classmethod
    def from_description(cls, settings: dict[str, Any]) -> LoRA:
        """Restore it from what describe() returned."""
        known = {key: value for key, value in settings.items() if key != "scaling"}
        how = known.get("quantization")
        known["quantization"] = Quantization(**how) if how else None
        return cls(**known | {"targets": tuple(known["targets"])})
