"""Any PaddleNLP model as a Decoder, through its own forward and its keys and values of earlier tokens.

Rows of a batch are padded on the left. Sequences of an adapter make up a batch of their own, so that a step runs the
model once for each adapter (and the base) that is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.serve.engine.adapters import LoraWeights
from oarlock.serve.engine.decoder import Feed
from oarlock.serve.engine.step_tensors import StepTensor

_PAST = ("past_key_values", "cache")


@dataclass(eq=False)
class _Sequence:
    adapter: str | None
    tokens: list[int] = field(default_factory=list)


@dataclass
class _Batch:
    """Sequences that are in one set of keys and values, padded on the left to one length."""

    sequences: list[_Sequence]
    past: Any
    length: int  # of the keys


class GenericDecoder:
    """See the module."""

    chunk: int | None = None

    def __init__(self, model: Any, adapters: dict[str, LoraWeights]) -> None:
        """Of a model in evaluation mode.

        Raises:
            ModelError: when its keys and values are of a form that can't be joined.
        """
        self._model, self._made = model, StepTensor()
        self.vocabulary = int(model.config.vocab_size)
        self._batches: dict[str | None, _Batch] = {}
        self._active: dict[str, tuple[paddle.Tensor, paddle.Tensor]] = {}
        dtype = next(iter(model.parameters())).dtype
        self._adapters = {name: _tensors(weights, dtype) for name, weights in adapters.items()}
        layers = dict(model.named_sublayers())
        for name in sorted({layer for weights in adapters.values() for layer in weights}):
            layers[name].register_forward_post_hook(self._beside(name))
        # Where positions are counted from the first column on, keys can't be moved to another one.
        family = FAMILIES.get(model.config.model_type)
        self._fixed_columns = family is not None and family.counts_padding
        self._axes = self._find_axes()

    def _beside(self, name: str) -> Callable[..., Any]:
        def hook(layer: Any, inputs: Any, output: Any) -> Any:
            matrices = self._active.get(name)
            return output if matrices is None else output + inputs[0] @ matrices[0] @ matrices[1]

        return hook

    def start(self, capacity: int, adapter: str | None) -> _Sequence:
        """See Decoder."""
        return _Sequence(adapter)

    def drop(self, sequence: _Sequence) -> None:
        """See Decoder."""
        batch = self._batches.get(sequence.adapter)
        if batch is None or sequence not in batch.sequences:
            return
        left = [other for other in batch.sequences if other is not sequence]
        if left:
            self._batches[sequence.adapter] = self._only(batch, left)
        else:
            del self._batches[sequence.adapter]

    @paddle.no_grad()
    def feed(self, feeds: Sequence[Feed]) -> np.ndarray:
        """See Decoder."""
        scores: dict[int, np.ndarray] = {}
        by_adapter: dict[str | None, list[Feed]] = {}
        for given in feeds:
            by_adapter.setdefault(given.sequence.adapter, []).append(given)
        for adapter, some in by_adapter.items():
            self._active = self._adapters[adapter] if adapter is not None else {}
            batch = self._batches.pop(adapter, None)
            new = [given for given in some if not given.sequence.tokens]
            if new and self._fixed_columns:
                new, batch = some, None  # all of them are read anew
            old = [given for given in some if given not in new]
            for given in some:
                given.sequence.tokens.extend(given.tokens)
            if old:
                assert batch is not None
                batch = self._only(batch, [given.sequence for given in old])
                batch, found = self._run(batch.sequences, batch)
                scores.update({id(s): row for s, row in zip(batch.sequences, found, strict=True)})
            if new:
                begun, found = self._run([given.sequence for given in new], None)
                scores.update({id(s): row for s, row in zip(begun.sequences, found, strict=True)})
                batch = begun if batch is None else self._joined(batch, begun)
            assert batch is not None
            self._batches[adapter] = batch
        return np.stack([scores[id(given.sequence)] for given in feeds if given.scored])

    def _run(self, sequences: list[_Sequence], batch: _Batch | None) -> tuple[_Batch, np.ndarray]:
        """All new tokens of a batch through the model: a token of each where there is one already, else the prompts."""
        length = batch.length + 1 if batch else max(len(sequence.tokens) for sequence in sequences)
        ids = np.zeros([len(sequences), length], np.int64)
        mask = np.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, length - len(sequence.tokens) :] = sequence.tokens
            mask[i, length - len(sequence.tokens) :] = 1
        past, scores = self._forward(ids, mask, batch.past if batch else None)
        return _Batch(sequences, past, length), scores

    def _forward(self, ids: np.ndarray, mask: np.ndarray, past: Any) -> tuple[Any, np.ndarray]:
        """Keys and values, and scores [rows, vocabulary], by the rules that PaddleNLP's generation goes by."""
        model = self._model
        known = {
            "attention_mask": self._made.copy_of(mask),
            "position_ids": self._made.copy_of(np.maximum(mask.cumsum(axis=1) - 1, 0)),
            "use_cache": True,
        }
        if past is not None:
            known |= dict.fromkeys(_PAST, past) | {"is_first_forward": False}
        outputs = model(**model.prepare_inputs_for_generation(self._made.copy_of(ids), **known))
        known = model.update_model_kwargs_for_generation(outputs, known)
        past = next((known[name] for name in _PAST if known.get(name) is not None), None)
        if past is None:
            raise ModelError(f"{type(model).__name__} gives no keys and values to go on with")
        return past, outputs[0][:, -1].astype("float32").numpy()

    # keys and values

    @paddle.no_grad()
    def _find_axes(self) -> list[tuple[int, int]]:
        """(batch, token) axis of each tensor that the model remembers: where its shape follows that of the ids."""
        shapes = []
        for rows, tokens in ((2, 5), (3, 7)):
            ids = np.arange(3, 3 + rows * tokens).reshape(rows, tokens) % self.vocabulary
            past, _ = self._forward(ids, np.ones_like(ids), None)
            shapes.append([tensor.shape for tensor in _leaves(past)])
        axes = []
        for first, second in zip(*shapes, strict=True):
            batch = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair == (2, 3)]
            token = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair == (5, 7)]
            if len(batch) != 1 or len(token) != 1:
                raise ModelError(f"{type(self._model).__name__} remembers {first}: rows of it can't be joined")
            axes.append((batch[0], token[0]))
        return axes

    def _only(self, batch: _Batch, sequences: list[_Sequence]) -> _Batch:
        """Some of the sequences, without padding that none of them needs. Their tokens may be one ahead of the keys."""
        rows = [batch.sequences.index(sequence) for sequence in sequences]
        if rows == list(range(len(batch.sequences))):
            return batch
        order = self._made.copy_of(rows)
        length = min(batch.length, max(len(sequence.tokens) for sequence in sequences))
        length = batch.length if self._fixed_columns else length

        def cut(tensor: paddle.Tensor, batch_axis: int, token_axis: int) -> paddle.Tensor:
            some = paddle.index_select(tensor, order, axis=batch_axis)
            return paddle.slice(some, [token_axis], [batch.length - length], [batch.length])

        return _Batch(sequences, self._each(cut, batch.past), length)

    def _joined(self, first: _Batch, second: _Batch) -> _Batch:
        length = max(first.length, second.length)

        def padded(batch: _Batch) -> Callable[[paddle.Tensor, int, int], paddle.Tensor]:
            def pad(tensor: paddle.Tensor, batch_axis: int, token_axis: int) -> paddle.Tensor:
                if batch.length == length:
                    return tensor
                shape = tensor.shape
                shape[token_axis] = length - batch.length
                return paddle.concat([paddle.zeros(shape, tensor.dtype), tensor], axis=token_axis)

            return pad

        pasts = [_leaves(self._each(padded(batch), batch.past)) for batch in (first, second)]
        both = [
            paddle.concat([a, b], axis=batch_axis) for a, b, (batch_axis, _) in zip(*pasts, self._axes, strict=True)
        ]
        return _Batch(first.sequences + second.sequences, _like(first.past, iter(both)), length)

    def _each(self, change: Callable[[paddle.Tensor, int, int], paddle.Tensor], past: Any) -> Any:
        changed = [change(tensor, *axes) for tensor, axes in zip(_leaves(past), self._axes, strict=True)]
        return _like(past, iter(changed))


def _leaves(past: Any) -> list[paddle.Tensor]:
    return [past] if isinstance(past, paddle.Tensor) else [leaf for part in past for leaf in _leaves(part)]


def _like(past: Any, leaves: Any) -> Any:
    """The same nest of tuples and lists, with other tensors."""
    if isinstance(past, paddle.Tensor):
        return next(leaves)
    parts = [_like(part, leaves) for part in past]
    return parts if isinstance(past, list) else tuple(parts)


def _tensors(weights: LoraWeights, dtype: Any) -> dict[str, tuple[paddle.Tensor, paddle.Tensor]]:
    return {
        layer: (paddle.to_tensor(a).astype(dtype), paddle.to_tensor(b).astype(dtype))
        for layer, (a, b) in weights.items()
    }
