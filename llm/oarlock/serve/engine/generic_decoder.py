"""Any model as a Decoder, through its own forward and its keys and values of earlier tokens.

Rows of a batch are padded on the left. Sequences with the same adapter form a batch, so a step runs the model once for
each adapter (and the base) in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.serve.engine.decoder import Feed, LoraWeights
from oarlock.serve.engine.step_tensor import StepTensor

_PAST = ("past_key_values", "cache")


@dataclass(eq=False)
class _GenericSequence:
    """The tokens of a sequence. Its keys and values are in a batch."""

    adapter: str | None
    tokens: list[int] = field(default_factory=list)


@dataclass
class _Batch:
    """Sequences whose keys and values are in the same tensors, padded on the left to one length."""

    sequences: list[_GenericSequence]
    past: Any
    length: int  # of the keys


class GenericDecoder:
    """Any model of PaddleNLP's interface, ours included."""

    chunk: int | None = None

    def __init__(self, model: Any, adapters: dict[str, LoraWeights]) -> None:
        """Serve a model in evaluation mode.

        Raises:
            ModelError: when its keys and values have a form that can't be joined.
        """
        self._model, self._step_tensor = model, StepTensor()
        self.vocabulary = int(model.config.vocab_size)
        self._batches: dict[str | None, _Batch] = {}
        self._active: dict[str, tuple[paddle.Tensor, paddle.Tensor]] = {}
        dtype = next(iter(model.parameters())).dtype
        self._adapters = {
            name: {
                layer: (paddle.to_tensor(a).astype(dtype), paddle.to_tensor(b).astype(dtype))
                for layer, (a, b) in weights.items()
            }
            for name, weights in adapters.items()
        }
        layers = dict(model.named_sublayers())
        for name in sorted({layer for weights in adapters.values() for layer in weights}):
            layers[name].register_forward_post_hook(self._make_lora_hook(name))
        # If positions are counted from the first column, keys can't be moved to another one.
        family = FAMILIES.get(model.config.model_type)
        self._fixed_columns = family is not None and family.counts_padding
        self._axes = self._find_axes()

    def _make_lora_hook(self, name: str) -> Callable[..., Any]:
        def hook(layer: Any, inputs: Any, output: Any) -> Any:
            matrices = self._active.get(name)
            return output if matrices is None else output + inputs[0] @ matrices[0] @ matrices[1]

        return hook

    def start(self, capacity: int, adapter: str | None) -> _GenericSequence:
        """An empty sequence. Its capacity is not limited here."""
        return _GenericSequence(adapter)

    def drop(self, sequence: _GenericSequence) -> None:
        """Forget a sequence."""
        batch = self._batches.get(sequence.adapter)
        if batch is None or sequence not in batch.sequences:
            return
        left = [other for other in batch.sequences if other is not sequence]
        if left:
            self._batches[sequence.adapter] = self._select(batch, left)
        else:
            del self._batches[sequence.adapter]

    @paddle.no_grad()
    def feed(self, feeds: Sequence[Feed]) -> np.ndarray:
        """Read tokens. Returns logits, float32 [feeds that want logits, vocabulary]."""
        logits: dict[int, np.ndarray] = {}
        by_adapter: dict[str | None, list[Feed]] = {}
        for given in feeds:
            by_adapter.setdefault(given.sequence.adapter, []).append(given)
        for adapter, some in by_adapter.items():
            self._active = self._adapters[adapter] if adapter is not None else {}
            batch = self._batches.pop(adapter, None)
            new = [given for given in some if not given.sequence.tokens]
            if new and self._fixed_columns:
                new, batch = some, None  # read all of them again
            old = [given for given in some if given not in new]
            for given in some:
                given.sequence.tokens.extend(given.tokens)
            if old:
                assert batch is not None
                batch = self._select(batch, [given.sequence for given in old])
                batch, found = self._run(batch.sequences, batch)
                logits.update({id(s): row for s, row in zip(batch.sequences, found, strict=True)})
            if new:
                begun, found = self._run([given.sequence for given in new], None)
                logits.update({id(s): row for s, row in zip(begun.sequences, found, strict=True)})
                batch = begun if batch is None else self._join(batch, begun)
            assert batch is not None
            self._batches[adapter] = batch
        return np.stack([logits[id(given.sequence)] for given in feeds if given.wants_logits])

    def _run(self, sequences: list[_GenericSequence], batch: _Batch | None) -> tuple[_Batch, np.ndarray]:
        """Run the new tokens of a batch: one token of each sequence if it has keys already, else the prompts."""
        length = batch.length + 1 if batch else max(len(sequence.tokens) for sequence in sequences)
        ids = np.zeros([len(sequences), length], np.int64)
        mask = np.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, length - len(sequence.tokens) :] = sequence.tokens
            mask[i, length - len(sequence.tokens) :] = 1
        past, logits = self._forward(ids, mask, batch.past if batch else None)
        return _Batch(sequences, past, length), logits

    def _forward(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[Any, np.ndarray]:
        """Run the model as PaddleNLP's generation does. Returns keys and values, and logits [rows, vocabulary]."""
        model = self._model
        arguments = {
            "attention_mask": self._step_tensor.copy(mask),
            "position_ids": self._step_tensor.copy(np.maximum(mask.cumsum(axis=1) - 1, 0)),
            "use_cache": True,
        }
        if past is not None:
            arguments |= dict.fromkeys(_PAST, past) | {"is_first_forward": False}
        outputs = model(**model.prepare_inputs_for_generation(self._step_tensor.copy(ids), **arguments))
        arguments = model.update_model_kwargs_for_generation(outputs, arguments)
        past = next((arguments[name] for name in _PAST if arguments.get(name) is not None), None)
        if past is None:
            raise ModelError(f"{type(model).__name__} returns no keys and values to continue with")
        return past, outputs[0][:, -1].astype("float32").numpy()

    # keys and values

    @paddle.no_grad()
    def _find_axes(self) -> list[tuple[int, int]]:
        """Find the (batch, token) axes of each tensor of keys and values: those whose size follows that of the ids."""
        shapes = []
        for rows, tokens in ((2, 5), (3, 7)):
            ids = np.arange(3, 3 + rows * tokens).reshape(rows, tokens) % self.vocabulary
            past, _ = self._forward(ids, np.ones_like(ids), None)
            shapes.append([tensor.shape for tensor in _flatten(past)])
        axes = []
        for first, second in zip(*shapes, strict=True):
            batch = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair == (2, 3)]
            token = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair == (5, 7)]
            if len(batch) != 1 or len(token) != 1:
                name = type(self._model).__name__
                raise ModelError(f"{name} has keys and values {first}: their rows can't be joined")
            axes.append((batch[0], token[0]))
        return axes

    def _select(self, batch: _Batch, sequences: list[_GenericSequence]) -> _Batch:
        """Select some sequences, without padding that none of them needs. Their tokens may be one ahead of the keys."""
        rows = [batch.sequences.index(sequence) for sequence in sequences]
        if rows == list(range(len(batch.sequences))):
            return batch
        order = self._step_tensor.copy(rows)
        length = min(batch.length, max(len(sequence.tokens) for sequence in sequences))
        length = batch.length if self._fixed_columns else length

        past = [
            paddle.slice(
                paddle.index_select(tensor, order, axis=batch_axis),
                [token_axis], [batch.length - length], [batch.length],
            )
            for tensor, (batch_axis, token_axis) in zip(_flatten(batch.past), self._axes, strict=True)
        ]  # fmt: skip
        return _Batch(sequences, _unflatten(batch.past, iter(past)), length)

    def _join(self, first: _Batch, second: _Batch) -> _Batch:
        length = max(first.length, second.length)
        past = []
        for *tensors, (batch_axis, token_axis) in zip(
            _flatten(first.past), _flatten(second.past), self._axes, strict=True
        ):
            for i, batch in enumerate((first, second)):
                if batch.length < length:
                    shape = tensors[i].shape
                    shape[token_axis] = length - batch.length
                    padding = paddle.zeros(shape, tensors[i].dtype)
                    tensors[i] = paddle.concat([padding, tensors[i]], axis=token_axis)
            past.append(paddle.concat(tensors, axis=batch_axis))
        return _Batch(first.sequences + second.sequences, _unflatten(first.past, iter(past)), length)


def _flatten(past: Any) -> list[paddle.Tensor]:
    return [past] if isinstance(past, paddle.Tensor) else [leaf for part in past for leaf in _flatten(part)]


def _unflatten(past: Any, leaves: Any) -> Any:
    """Put other tensors into the same nest of tuples and lists."""
    if isinstance(past, paddle.Tensor):
        return next(leaves)
    parts = [_unflatten(part, leaves) for part in past]
    return parts if isinstance(past, list) else tuple(parts)
