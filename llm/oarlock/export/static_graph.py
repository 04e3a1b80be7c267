"""Write a static graph for Paddle Inference (token ids and mask in, logits out), run it and compare it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from oarlock.environment.console import get_logger
from oarlock.environment.paddle_import import on_cpu
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.models.build import ModelSource, build_model
from oarlock.models.forward import make_position_pairs
from oarlock.models.proof import TOLERANCES, Proof, require_equal
from oarlock.ops.install import originals

logger = get_logger(__name__)

GRAPH = "model"  # model.json and model.pdiparams
_SHAPES = ((1, 1), (1, 7), (3, 16), (2, 40))  # texts, tokens


@dataclass(frozen=True)
class GraphProof(Proof):
    """A comparison of the saved graph with the model.

    Attributes:
        inputs: inputs of the graph, int64 [batch, tokens] each.
        shapes: texts and tokens of the compared batches. Those with several texts have padding on the left.
    """

    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


def write_graph(source: ModelSource, folder: Path, allow_pickle: bool = False) -> GraphProof:
    """Write model.json and model.pdiparams in float32, for any batch size and length, and compare them with the model.

    Needs memory for the whole model in float32, and for twice that while the graph runs.

    Raises:
        ModelError: when Paddle can't translate the model, or the graph's logits differ.
    """
    family = source.config.model_type
    with on_cpu(), originals():  # a graph for any machine can only have Paddle's own operators
        source.config.use_cache = False
        model = build_model(source, allow_pickle=allow_pickle)
        model.eval()
        limit = int(getattr(source.config, "max_position_embeddings", 0) or _SHAPES[-1][1])
        batches = [_make_batch(family, source.config, texts, min(tokens, limit)) for texts, tokens in _SHAPES]
        expected = [_compute_logits(model, batch) for batch in batches]
        _save_graph(model, family, folder)
        del model
        found = [_run_graph(folder, batch) for batch in batches]
    largest = max(float(np.abs(logits).max()) for logits in expected) or 1.0
    text = [batch["attention_mask"].astype(bool) for batch in batches]
    difference = max(
        float(np.abs(mine - theirs)[real].max()) for mine, theirs, real in zip(found, expected, text, strict=True)
    )
    shapes = tuple((int(batch["input_ids"].shape[0]), int(batch["input_ids"].shape[1])) for batch in batches)
    proof = GraphProof(difference / largest, TOLERANCES["float32"], _list_inputs(family), shapes)
    require_equal(proof, "float32", "the static graph differs from the model")
    lengths = ", ".join(f"{texts} x {tokens}" for texts, tokens in shapes)
    logger.info(
        f"proof: logits of the static graph (paddle.inference) and the model differ by {proof.difference:.1e} of the "
        f"largest (allowed: {proof.allowed:.1e}), on {lengths} tokens"
    )
    return proof


def _list_inputs(family: str) -> tuple[str, ...]:
    both = ("input_ids", "attention_mask")
    return (*both, "position_ids") if FAMILIES[family].takes_position_ids else both


def _make_batch(family: str, config: Any, texts: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(tokens).integers(0, config.vocab_size, (texts, tokens))
    mask = np.ones_like(ids)
    mask[1:, : tokens // 4] = 0
    everything = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    return {name: everything[name] for name in _list_inputs(family)}


def _compute_logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    with paddle.no_grad():
        result = model(**{name: paddle.to_tensor(values) for name, values in batch.items()})
    return (result[0] if isinstance(result, (tuple, list)) else result).astype("float32").numpy()


# the graph


def _make_causal_mask(mask: paddle.Tensor) -> paddle.Tensor:
    """Mark the keys that each query attends to, int64 [batch, 1, queries, keys], without Python control flow."""
    index = paddle.arange(mask.shape[1])
    earlier = (index.unsqueeze(0) <= index.unsqueeze(1)).astype("int64")
    return earlier.unsqueeze([0, 1]) * mask.astype("int64").unsqueeze([1, 2])


def _make_attention_bias(mask: paddle.Tensor) -> paddle.Tensor:
    """Make the bias that is added to attention scores for a mask, float32 [batch, 1, queries, keys]."""
    lowest = paddle.full([1], paddle.finfo(paddle.float32).min)
    return paddle.where(_make_causal_mask(mask).astype("bool"), paddle.zeros([1]), lowest)


def _make_bloom_mask(
    attention_mask: paddle.Tensor, input_shape: Any, past_key_values_length: int, num_heads: int
) -> paddle.Tensor:
    tokens = attention_mask.shape[1]
    return paddle.tile(_make_attention_bias(attention_mask), [1, num_heads, 1, 1]).reshape([-1, tokens, tokens])


def _make_opt_mask(attention_mask: paddle.Tensor, input_shape: Any, past_key_values_length: int) -> paddle.Tensor:
    return _make_attention_bias(attention_mask)


class _LogitsGraph(nn.Layer):
    """The layer that becomes the graph. Paddle translates its code, so it has plain statements and no closures."""

    def __init__(self, model: nn.Layer, family: str) -> None:
        super().__init__()
        self.model, self.forward_kind = model, FAMILIES[family].forward

    def forward(
        self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor, position_ids: paddle.Tensor | None = None
    ) -> paddle.Tensor:
        """Compute logits [batch, tokens, vocabulary]."""
        if self.forward_kind == "pairs_of_positions":
            positions = make_position_pairs(self.model.config, input_ids, attention_mask)
            result = self.model(
                input_ids=input_ids, attention_mask=_make_causal_mask(attention_mask), position_ids=positions
            )
        elif self.forward_kind == "no_position_ids":
            # The model itself can't be translated: OPT's __getattr__ returns None for attributes that Paddle looks up.
            result = self.model.lm_head(self.model.opt(input_ids, attention_mask=attention_mask))
        elif position_ids is None:
            result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        else:
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        logits = result[0] if isinstance(result, (tuple, list)) else result
        return logits.astype("float32")


def _save_graph(model: nn.Layer, family: str, folder: Path) -> None:
    model.__dict__.pop("forward", None)  # set by oarlock.models.forward; Paddle translates only the forward of a class
    match FAMILIES[family].graph_change:
        case "bloom_mask":  # Bloom and OPT make no mask for one token, but here the length is unknown
            object.__setattr__(model.bloom, "_prepare_attn_mask", _make_bloom_mask)
        case "opt_mask":
            object.__setattr__(model.opt, "_prepare_decoder_attention_mask", _make_opt_mask)
        case "chatglm_rotary":  # the last length, which is a tensor after the model has run
            rotary = model.chatglm.transformer.rotary_embeddings
            del rotary.max_seq_len_cached
            rotary.max_seq_len_cached = -1
    layer = _LogitsGraph(model, family)
    layer.eval()
    spec = [paddle.static.InputSpec([None, None], "int64", name) for name in _list_inputs(family)]
    try:
        with paddle.no_grad(), _lenient_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the translator, about names in PaddleNLP's code
            graph = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
            paddle.jit.save(graph, str(folder / GRAPH))
    except Exception as error:  # the translated code can raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"Paddle can't make a static graph of {type(model).__name__}: {lines[-1]}") from error


@contextlib.contextmanager
def _lenient_names() -> Iterator[None]:
    """While a graph is made, let OPT's code read the names of its layers' outputs, which have none."""
    value = paddle.pir.Value
    name = value.name

    def read_name(self: Any) -> str:
        try:
            return name.fget(self)
        except ValueError:
            return ""

    value.name = property(read_name, name.fset)
    try:
        yield
    finally:
        value.name = name


def _run_graph(folder: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    from paddle.inference import Config, create_predictor

    config = Config(str(folder / f"{GRAPH}.json"), str(folder / f"{GRAPH}.pdiparams"))
    config.disable_glog_info()
    # With oneDNN, Paddle 3.3.1 computes the rotary angles of Gemma and ChatGLM wrong: logits are off by 0.3.
    config.disable_mkldnn()
    predictor = create_predictor(config)
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(batch[name])
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
