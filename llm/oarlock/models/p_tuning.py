"""P-tuning (arXiv 2103.10385): trained virtual tokens before the text, made by an LSTM or an MLP.

PaddleNLP has it for classification with templates only (paddlenlp.prompt), not for causal language models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from oarlock.models.prefix import seen_before

ENCODERS = ("lstm", "mlp")


@dataclass(frozen=True)
class PTuning:
    """Embeddings of virtual tokens in place of those of words.

    Attributes:
        num_tokens: virtual ones.
        encoder: what relates them to each other: "lstm" (two layers, both ways, and an MLP) or "mlp".
        hidden_size: of the encoder; None for the model's.
    """

    num_tokens: int
    encoder: str = "lstm"
    hidden_size: int | None = None

    name = "p_tuning"

    def attach(self, model: nn.Layer) -> None:
        """See Method."""
        for parameter in model.parameters():
            parameter.stop_gradient = True
        embedding = model.get_input_embeddings()
        width = embedding.weight.shape[1]
        model.prompt_encoder = PromptEncoder(self.num_tokens, width, self.encoder, self.hidden_size or width)
        dtype = model.config.dtype or "float32"
        if dtype != "float32":
            model.prompt_encoder.to(dtype=dtype)
        _embed_virtual_tokens(embedding, model.prompt_encoder)
        forward = _with_virtual_tokens(model, model.forward, self.num_tokens)
        object.__setattr__(model, "forward", forward)  # see oarlock.models.prefix

    def initial(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Uniform by the width of the input, as torch.nn.LSTM and Linear; the tokens normal."""
        if name.endswith("tokens"):
            return random.normal(0.0, 1.0, shape).astype(np.float32)
        bound = 1 / np.sqrt(shape[0] if name.endswith(".weight") else shape[-1])
        return random.uniform(-bound, bound, shape).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """See Method."""
        return asdict(self)


class PromptEncoder(nn.Layer):
    """Embeddings of the virtual tokens, [virtual tokens, width of the model]."""

    def __init__(self, num_tokens: int, width: int, encoder: str, hidden: int) -> None:
        super().__init__()
        self.tokens = self.create_parameter([num_tokens, width])
        self.recurrent = nn.LayerList()
        if encoder == "lstm":
            self.recurrent.extend([_BothWays(width, hidden), _BothWays(2 * hidden, hidden)])
        last = 2 * hidden if encoder == "lstm" else width
        self.mlp = nn.Sequential(nn.Linear(last, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self) -> paddle.Tensor:
        """All of them."""
        hidden = self.tokens
        for layer in self.recurrent:
            hidden = layer(hidden)
        return self.mlp(hidden)


class _BothWays(nn.Layer):
    """A bidirectional LSTM layer over one sequence, [tokens, width] -> [tokens, 2 x hidden].

    Not nn.LSTM, whose weights lie in one piece of memory that sharding would have to cut, nor nn.LSTMCell, which
    returns tensors inside of tuples, where stage 3 does not find them.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 8 * hidden)  # four gates of both directions
        self.state = nn.LayerList([nn.Linear(hidden, 4 * hidden, bias_attr=False) for _ in range(2)])
        self.hidden = hidden

    def forward(self, sequence: paddle.Tensor) -> paddle.Tensor:
        """See the class."""
        gates = self.input(sequence).split(2, axis=-1)
        forwards = self._run(self.state[0], gates[0])
        backwards = self._run(self.state[1], gates[1].flip(0)).flip(0)
        return paddle.concat([forwards, backwards], axis=-1)

    def _run(self, state: nn.Layer, gates: paddle.Tensor) -> paddle.Tensor:
        hidden = cell = paddle.zeros([1, self.hidden], dtype=gates.dtype)
        found = []
        for of_token in gates.unsqueeze(1).unbind(0):
            enter, forget, give, value = (of_token + state(hidden)).split(4, axis=-1)
            cell = F.sigmoid(forget) * cell + F.sigmoid(enter) * F.tanh(value)
            hidden = F.sigmoid(give) * F.tanh(cell)
            found.append(hidden)
        return paddle.concat(found)


_VIRTUAL = -1  # the id that stands for a virtual token


def _embed_virtual_tokens(embedding: nn.Layer, encoder: nn.Layer) -> None:
    """Have the embedding put the encoder's rows where ids are _VIRTUAL: the first ones of every sample."""
    plain = embedding.forward

    def forward(ids: paddle.Tensor) -> paddle.Tensor:
        virtual = ids == _VIRTUAL
        words = plain(paddle.where(virtual, paddle.zeros_like(ids), ids))
        number = int(encoder.tokens.shape[0])
        if ids.shape[1] < number or not bool(virtual[0, 0]):
            return words
        rows = encoder().astype(words.dtype).unsqueeze(0).expand([ids.shape[0], number, words.shape[-1]])
        return paddle.concat([rows, words[:, number:]], axis=1)

    embedding.forward = forward


def _with_virtual_tokens(model: nn.Layer, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The model's forward with the virtual tokens before a text that starts, and their keys where it goes on."""
    signature = inspect.signature(forward)

    def prompted(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        named = {**bound, **bound.pop("kwargs", {})}
        starts = named.get("past_key_values") is None and named.get("cache") is None
        ids = named["input_ids"]
        if starts:
            named["input_ids"] = paddle.concat([paddle.full([ids.shape[0], number], _VIRTUAL, ids.dtype), ids], axis=1)
        if named.get("attention_mask") is not None:
            named["attention_mask"] = seen_before(named["attention_mask"], number)
        positions = named.get("position_ids")
        if positions is not None:
            positions = positions + number
            if starts:
                first = paddle.arange(number, dtype=positions.dtype).expand([ids.shape[0], number])
                positions = paddle.concat([first, positions], axis=1)
            named["position_ids"] = positions
        outputs = forward(**named)
        return _without_first(outputs, number) if starts else outputs

    return prompted


def _without_first(outputs: Any, number: int) -> Any:
    """Scores of the text alone."""
    if isinstance(outputs, paddle.Tensor):
        return outputs[:, number:]
    if isinstance(outputs, tuple):
        return (outputs[0][:, number:], *outputs[1:])
    outputs["logits"] = outputs["logits"][:, number:]
    return outputs
