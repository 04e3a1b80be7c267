"""What this rank holds of the model and of the optimizer, after Fleet's wrappers, as pieces of whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from oarlock.environment.ranks import rank
from oarlock.errors import CheckpointError
from oarlock.train.clip import SLICE
from oarlock.weights.layout import Block, Holding, holdings, shared_between_stages
from oarlock.weights.shard_index import MASTER, WEIGHTS, Piece
from oarlock.weights.sharded_store import PieceFolder

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer

_MASTER_NAME = "_fp32_master_0"  # what Optimizer._gen_master_weight_var_name makes of a parameter's name


@dataclass(frozen=True)
class Local:
    """A parameter on this rank.

    Attributes:
        holding: its name and block.
        flat: range of the flattened block that stage 3 leaves here.
        optimizer_name: under which the optimizer keeps its states.
        owned: the optimizer of this rank updates it.
        writer: this rank writes it into checkpoints (of those that hold the same).
    """

    holding: Holding
    flat: tuple[int, int] | None
    optimizer_name: str
    owned: bool
    writer: bool

    @property
    def elements(self) -> int:
        """How many of the parameter's are here."""
        if self.flat is not None:
            return self.flat[1] - self.flat[0]
        return int(np.prod(self.holding.block.part_shape))

    @property
    def data(self) -> paddle.Tensor:
        """The weights that are here, without the padding of stage 3."""
        parameter = self.holding.tensor
        return parameter if self.flat is None else parameter.fw_storage._slice(0, self.elements)


class Held:
    """The parameters of a trainer's model on this rank.

    Made before the model is wrapped (stage 3 takes the parameters apart), asked after it.
    """

    def __init__(self, trainer: OarlockTrainer) -> None:
        self._trainer = trainer
        held = holdings(trainer.model)
        # Beside a frozen model, only what a method trains is the run's own: it is all that checkpoints hold.
        self._holdings = [h for h in held if not h.tensor.stop_gradient] if trainer.method is not None else held

    def weights(self) -> list[Holding]:
        """What is saved of the model, as it was before wrapping."""
        return self._holdings

    def check_names(self, folder: PieceFolder) -> None:
        """Refuse a checkpoint that holds more than this model (a pipeline's stage can't tell that).

        Raises:
            CheckpointError: naming what has no place.
        """
        if self._trainer.plan.pipeline > 1:
            return
        extra = sorted(set(folder.names()) - {holding.name for holding in self._holdings})
        if extra:
            shown = ", ".join(extra[:4]) + (", ..." if len(extra) > 4 else "")
            raise CheckpointError(
                f"{folder.folder}: {shown}: the model of this run has no such weight; go on with the configuration "
                "that wrote the checkpoint"
            )

    def locals(self) -> Iterator[Local]:
        """After wrapping."""
        plan = self._trainer.plan
        at = plan.coordinates(rank())
        owners = self._owners()
        shared = shared_between_stages(self._trainer.model)
        for i, holding in enumerate(self._holdings):
            parameter = holding.tensor
            once = (
                shared.get(parameter.name, True)
                and (holding.block.axis is not None or at.tensor == 0)
                and at.data == i % plan.data
            )
            if plan.sharding_strategy == "parameters" and getattr(parameter, "fw_storage", None) is not None:
                yield Local(holding, self._slice(parameter), f"{SLICE}{parameter.name}", True, once)
                continue
            owner = owners.get(parameter.name, i % plan.sharding)
            owned = at.sharding == owner if parameter.name in owners else True
            yield Local(holding, None, parameter.name, owned, once and at.sharding == owner)

    def _owners(self) -> dict[str, int]:
        """Parameter -> sharding rank that updates it; empty where all do."""
        optimizer, plan = self._trainer.optimizer, self._trainer.plan
        if plan.sharding_strategy in ("none", "parameters"):
            return {}
        if plan.sharding_strategy == "gradients":
            return dict(optimizer.param2rank)
        return dict(optimizer._inner_opt._param2rank)

    def _slice(self, parameter: Any) -> tuple[int, int]:
        """This rank's range, cut at the parameter's end (Fleet pads the last slices)."""
        stage3 = self._trainer.model_wrapped
        start, stop = stage3._param2buffer[parameter.name][stage3._rank]
        size = int(np.prod(parameter.shape))
        return min(start, size), min(stop, size)


def innermost(optimizer: Any) -> Any:
    """The paddle.optimizer.Optimizer inside Fleet's and PaddleNLP's wrappers."""
    while True:
        inner = vars(optimizer).get("_inner_opt") or vars(optimizer).get("_optim")
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner


def pieces_to_write(held: Held, optimizer: Any) -> Iterator[tuple[Piece, paddle.Tensor]]:
    """All that this rank writes into a checkpoint."""
    inner = innermost(optimizer)
    for local in held.locals():
        if not local.writer or not local.elements:
            continue
        holding = local.holding
        yield Piece(WEIGHTS, holding.name, holding.block, local.flat), local.data
        names = (local.optimizer_name, local.optimizer_name + _MASTER_NAME)
        for kind, table in inner._accumulators.items():
            tensor = next((table[name] for name in names if name in table), None)
            if tensor is None:
                continue
            if tensor._numel() == 1 != local.elements:  # powers of beta: one number a parameter
                if local.flat is None or local.flat[0] == 0:
                    yield Piece(kind, holding.name, Block(tuple(tensor.shape))), tensor
                continue
            yield Piece(kind, holding.name, holding.block, local.flat), _unpadded(tensor, local)
        master = inner._master_weights.get(local.optimizer_name)
        if master is not None:
            yield Piece(MASTER, holding.name, holding.block, local.flat), _unpadded(master, local)


def _unpadded(tensor: paddle.Tensor, local: Local) -> paddle.Tensor:
    return tensor if local.flat is None else tensor._slice(0, local.elements)


def load_weights(held: Held, folder: PieceFolder) -> None:
    """Before wrapping: every parameter of this rank from a checkpoint, whatever plan wrote it.

    Raises:
        CheckpointError: for a weight that is not stored, or one that the model has not.
    """
    from oarlock.models.build import set_parameter

    held.check_names(folder)
    for holding in held.weights():
        set_parameter(holding.tensor, folder.read_part(_kind(holding, folder), holding.name, holding.block))


def reload_weights(held: Held, folder: PieceFolder) -> None:
    """The same after wrapping, for a model that is not trained on (the optimizer's states stay what they are)."""
    from oarlock.models.build import set_parameter

    for local in held.locals():
        holding = local.holding
        values = folder.read_part(_kind(holding, folder), holding.name, holding.block, local.flat)
        target = holding.tensor if local.flat is None else holding.tensor.fw_storage
        set_parameter(target, _padded(values, local))


def _kind(holding: Holding, folder: PieceFolder) -> str:
    """Float32 parameters come from the master weights where a half-precision run left some."""
    exact = holding.tensor.dtype == paddle.float32 and f"{MASTER}/{holding.name}" in folder.where
    return MASTER if exact else WEIGHTS


def load_states(held: Held, optimizer: Any, folder: PieceFolder, lr_scheduler: Mapping[str, Any]) -> None:
    """After wrapping: the optimizer states of the parameters this rank updates.

    Args:
        lr_scheduler: state of the learning rate, without which the optimizer takes none.
    """
    inner = innermost(optimizer)
    kinds = [kind for kind in folder.kinds if kind not in (WEIGHTS, MASTER)]
    state: dict[str, Any] = {"LR_Scheduler": lr_scheduler}
    masters: dict[str, Any] = {}
    for local in held.locals():
        holding, name = local.holding, local.optimizer_name
        if not local.owned or holding.tensor.stop_gradient:
            continue
        half = holding.tensor.dtype in (paddle.float16, paddle.bfloat16)
        multi_precision = half and getattr(inner, "_multi_precision", False)
        for kind in kinds:
            if f"{kind}/{holding.name}" not in folder.where:
                continue
            if folder.shape(kind, holding.name) != holding.block.shape:
                values = folder.read(holding.name, kind)
            else:
                values = _padded(folder.read_part(kind, holding.name, holding.block, local.flat), local)
            key = f"{name}{_MASTER_NAME if multi_precision else ''}_{kind}_0"
            state[key] = paddle.to_tensor(values)
        if multi_precision and f"{MASTER}/{holding.name}" in folder.where:
            values = folder.read_part(MASTER, holding.name, holding.block, local.flat)
            masters[name] = paddle.to_tensor(_padded(values, local))
    if masters:
        state["master_weights"] = masters
    inner.set_state_dict(state)


def _padded(values: np.ndarray, local: Local) -> np.ndarray:
    """Stage 3 keeps slices of equal length; the last ones end in padding."""
    if local.flat is None:
        return values
    length = local.holding.tensor.fw_storage._numel()
    return np.pad(values, (0, length - len(values)))
