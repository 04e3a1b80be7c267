"""P-tuning (arXiv 2103.10385): trained virtual tokens before the text, made by an LSTM or an MLP.

PaddleNLP supports it only for classification with templates (paddlenlp.prompt), not for causal language models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddlenlp.transformers.model_utils import dtype_guard

from oarlock.compat.model_forward import bind_arguments, set_forward
from oarlock.ops.linear_cross_entropy import DeferredLogits


@dataclass(frozen=True)
class PTuning:
    """Trained embeddings of virtual tokens.

    Attributes:
        num_tokens: number of virtual tokens.
        encoder: makes the embeddings: "lstm" (two bidirectional layers and an MLP) or "mlp".
        hidden_size: of the encoder; None for the model's.
    """

    num_tokens: int
    encoder: str = "lstm"
    hidden_size: int | None = None

    name = "p_tuning"

    def attach(self, model: nn.Layer) -> None:
        for parameter in model.parameters():
            parameter.stop_gradient = True
        embedding = model.get_input_embeddings()
        width = embedding.weight.shape[1]
        with dtype_guard(model.config.dtype):
            model.prompt_encoder = PromptEncoder(self.num_tokens, width, self.encoder, self.hidden_size or width)
        plain, encoder = embedding.forward, model.prompt_encoder

        def forward(ids: paddle.Tensor) -> paddle.Tensor:
            virtual = ids == _VIRTUAL
            words = plain(paddle.where(virtual, paddle.zeros_like(ids), ids))
            if not bool(virtual.any()):
                return words
            # The encoder's rows, in their order.
            order = (virtual.astype("int64").cumsum(axis=1) - 1).clip(min=0)
            rows = F.embedding(order, encoder()).astype(words.dtype)
            return paddle.where(virtual.unsqueeze(-1), rows, words)

        embedding.forward = forward
        set_forward(model, _wrap_forward(model.forward, self.num_tokens))

    def check(self, family: str) -> None:
        """Every family supports it."""

    def positions(self, family: str) -> int:
        return 0

    def initial(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Uniform by the width of the input, as torch.nn.LSTM and Linear; the tokens normal."""
        if name.endswith("tokens"):
            return random.normal(0.0, 1.0, shape).astype(np.float32)
        bound = 1 / np.sqrt(shape[0] if name.endswith(".weight") else shape[-1])
        return random.uniform(-bound, bound, shape).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return asdict(self)


class PromptEncoder(nn.Layer):
    """Makes the embeddings of the virtual tokens, [virtual tokens, width of the model]."""

    def __init__(self, num_tokens: int, width: int, encoder: str, hidden: int) -> None:
        super().__init__()
        self.tokens = self.create_parameter([num_tokens, width], dtype=paddle.get_default_dtype())
        self.recurrent = nn.LayerList()
        if encoder == "lstm":
            self.recurrent.extend([_BidirectionalLSTM(width, hidden), _BidirectionalLSTM(2 * hidden, hidden)])
        last = 2 * hidden if encoder == "lstm" else width
        self.mlp = nn.Sequential(nn.Linear(last, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self) -> paddle.Tensor:
        hidden = self.tokens
        for layer in self.recurrent:
            hidden = layer(hidden)
        return self.mlp(hidden)


class _BidirectionalLSTM(nn.Layer):
    """A bidirectional LSTM layer over one sequence, [tokens, width] -> [tokens, 2 x hidden].

    nn.LSTM keeps its weights in one piece of memory, which sharding would have to split. nn.LSTMCell returns tensors
    inside
    tuples, where stage 3 does not find them.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 8 * hidden)  # four gates in each direction
        self.state = nn.LayerList([nn.Linear(hidden, 4 * hidden, bias_attr=False) for _ in range(2)])
        self.hidden = hidden

    def forward(self, sequence: paddle.Tensor) -> paddle.Tensor:
        gates = self.input(sequence).split(2, axis=-1)
        forwards = self._run(self.state[0], gates[0])
        backwards = self._run(self.state[1], gates[1].flip(0)).flip(0)
        return paddle.concat([forwards, backwards], axis=-1)

    def _run(self, state: nn.Layer, gates: paddle.Tensor) -> paddle.Tensor:
        hidden = cell = paddle.zeros([1, self.hidden], dtype=gates.dtype)
        found = []
        for token_gates in gates.unsqueeze(1).unbind(0):
            input_gate, forget_gate, output_gate, value = (token_gates + state(hidden)).split(4, axis=-1)
            cell = F.sigmoid(forget_gate) * cell + F.sigmoid(input_gate) * F.tanh(value)
            hidden = F.sigmoid(output_gate) * F.tanh(cell)
            found.append(hidden)
        return paddle.concat(found)


_VIRTUAL = -1  # the id of a virtual token


def _wrap_forward(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Wrap a model's forward: insert virtual tokens before a text that starts, and count their keys where it continues.

    Padding on the left stays before them. Models that count positions or distances from the first token (GPT-J) must
    find
    the virtual tokens equally far from the text in every row.
    """
    name, past = bind_arguments(forward)

    def prompted(*args: Any, **kwargs: Any) -> Any:
        named = name(*args, **kwargs)
        ids, mask, positions = named["input_ids"], named.get("attention_mask"), named.get("position_ids")
        starts = named.get(past) is None
        first = paddle.zeros([ids.shape[0], 1], "int64")
        if mask is not None:
            first = mask.astype("int64").argmax(axis=1, keepdim=True)
            named["attention_mask"] = _insert(mask, first, paddle.ones([number], mask.dtype))
        if positions is not None and positions.ndim == 3 and starts:
            named["position_ids"] = None  # oarlock.models.forward derives the pairs from the ids
        elif positions is not None:
            after = number if positions.ndim == 2 else paddle.to_tensor([[number], [0]])
            named["position_ids"] = positions + after
            if starts:
                named["position_ids"] = _insert(positions + number, first, paddle.arange(number))
        if not starts:
            return forward(**named)
        named["input_ids"] = _insert(ids, first, paddle.full([number], _VIRTUAL, ids.dtype))
        outputs = forward(**named)
        # Drop the logits of the virtual tokens (and as many of the padding on the left).
        if isinstance(outputs, (paddle.Tensor, DeferredLogits)):
            return outputs[:, number:]
        if isinstance(outputs, tuple):
            return (outputs[0][:, number:], *outputs[1:])
        outputs["logits"] = outputs["logits"][:, number:]
        return outputs

    return prompted


def _insert(rows: paddle.Tensor, first: paddle.Tensor, new: paddle.Tensor) -> paddle.Tensor:
    """Insert the same values [number] into every row [batch, tokens] before its index `first` [batch, 1]."""
    number = new.shape[0]
    index = paddle.arange(rows.shape[1] + number).unsqueeze(0).expand([rows.shape[0], -1])
    old = paddle.where(index < first, index, index - number).clip(min=0)
    there = (index >= first) & (index < first + number)
    inserted = paddle.gather(new, (index - first).clip(0, number - 1).flatten()).reshape(index.shape)
    return paddle.where(there, inserted, paddle.take_along_axis(rows, old, axis=1))
