"""A static graph for Paddle Inference: ids and mask in, scores out; run and compared before it is handed over."""

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
from oarlock.ops.install import originals

logger = get_logger(__name__)

GRAPH = "model"  # model.json and model.pdiparams
ALLOWED = 1e-4  # of the largest score, in float32
_SHAPES = ((1, 1), (1, 7), (3, 16), (2, 40))  # texts, tokens


@dataclass(frozen=True)
class GraphProof:
    """What running the saved graph found.

    Attributes:
        inputs: of the graph, int64 [batch, tokens] each.
        shapes: texts and tokens of the batches compared, the later ones with padding on the left.
        difference: the largest of a score from the model's own, relative to the largest score.
        allowed: the most it may be.
    """

    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    difference: float
    allowed: float = ALLOWED

    def text(self) -> str:
        """One sentence for the log."""
        lengths = ", ".join(f"{texts} x {tokens}" for texts, tokens in self.shapes)
        return (
            f"proof: scores of the static graph (paddle.inference) and of the model differ by {self.difference:.1e} of "
            f"the largest (allowed: {self.allowed:.1e}), on {lengths} tokens"
        )


def write_graph(source: ModelSource, folder: Path, allow_pickle: bool = False) -> GraphProof:
    """Write model.json and model.pdiparams, in float32 and for any batch and length, and compare them with the model.

    Memory: the whole model in float32, twice while the graph is run.

    Raises:
        ModelError: when Paddle can't translate the model, or the graph's scores are others.
    """
    family = source.config.model_type
    with on_cpu(), originals():  # a graph for any machine has Paddle's operators alone
        source.config.use_cache = False
        model = build_model(source, allow_pickle=allow_pickle)
        model.eval()
        limit = int(getattr(source.config, "max_position_embeddings", 0) or _SHAPES[-1][1])
        batches = [_batch(family, source.config, texts, min(tokens, limit)) for texts, tokens in _SHAPES]
        expected = [_scores(model, batch) for batch in batches]
        _save(model, family, folder)
        del model
        found = [_run(folder, batch) for batch in batches]
    largest = max(float(np.abs(scores).max()) for scores in expected) or 1.0
    text = [batch["attention_mask"].astype(bool) for batch in batches]
    difference = max(
        float(np.abs(mine - theirs)[real].max()) for mine, theirs, real in zip(found, expected, text, strict=True)
    )
    if not difference / largest <= ALLOWED:  # NaN too
        raise ModelError(
            f"proof: the static graph is not the model: scores differ by {difference / largest:.1e} of the largest, "
            f"allowed are {ALLOWED:.1e}; nothing was written"
        )
    shapes = tuple((int(batch["input_ids"].shape[0]), int(batch["input_ids"].shape[1])) for batch in batches)
    proof = GraphProof(_inputs(family), shapes, difference / largest)
    logger.info(proof.text())
    return proof


def _inputs(family: str) -> tuple[str, ...]:
    both = ("input_ids", "attention_mask")
    return (*both, "position_ids") if FAMILIES[family].takes_position_ids else both


def _batch(family: str, config: Any, texts: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(tokens).integers(0, config.vocab_size, (texts, tokens))
    mask = np.ones_like(ids)
    mask[1:, : tokens // 4] = 0
    everything = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    return {name: everything[name] for name in _inputs(family)}


def _scores(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    with paddle.no_grad():
        result = model(**{name: paddle.to_tensor(values) for name, values in batch.items()})
    return (result[0] if isinstance(result, (tuple, list)) else result).astype("float32").numpy()


# the graph


def _seen(mask: paddle.Tensor) -> paddle.Tensor:
    """Which keys each query sees, int64 [batch, 1, queries, keys] (oarlock.models.forward.whole_mask for a graph)."""
    index = paddle.arange(mask.shape[1])
    earlier = (index.unsqueeze(0) <= index.unsqueeze(1)).astype("int64")
    return earlier.unsqueeze([0, 1]) * mask.astype("int64").unsqueeze([1, 2])


def _added(mask: paddle.Tensor) -> paddle.Tensor:
    """What is added to scores of attention for it, float32 [batch, 1, queries, keys]."""
    lowest = paddle.full([1], paddle.finfo(paddle.float32).min)
    return paddle.where(_seen(mask).astype("bool"), paddle.zeros([1]), lowest)


def _bloom_mask(
    attention_mask: paddle.Tensor, input_shape: Any, past_key_values_length: int, num_heads: int
) -> paddle.Tensor:
    tokens = attention_mask.shape[1]
    return paddle.tile(_added(attention_mask), [1, num_heads, 1, 1]).reshape([-1, tokens, tokens])


def _opt_mask(attention_mask: paddle.Tensor, input_shape: Any, past_key_values_length: int) -> paddle.Tensor:
    return _added(attention_mask)


class _Scores(nn.Layer):
    """What becomes the graph. Its code is translated by Paddle: plain statements, no closures."""

    def __init__(self, model: nn.Layer, family: str) -> None:
        super().__init__()
        self.model, self.forward_kind = model, FAMILIES[family].forward

    def forward(
        self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor, position_ids: paddle.Tensor | None = None
    ) -> paddle.Tensor:
        """Scores [batch, tokens, vocabulary]."""
        if self.forward_kind == "pairs_of_positions":
            positions = make_position_pairs(self.model.config, input_ids, attention_mask)
            result = self.model(input_ids=input_ids, attention_mask=_seen(attention_mask), position_ids=positions)
        elif (
            self.forward_kind == "no_position_ids"
        ):  # OPT: its __getattr__ answers None to what Paddle asks of a layer it translates
            result = self.model.lm_head(self.model.opt(input_ids, attention_mask=attention_mask))
        elif position_ids is None:
            result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        else:
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        scores = result[0] if isinstance(result, (tuple, list)) else result
        return scores.astype("float32")


def _save(model: nn.Layer, family: str, folder: Path) -> None:
    model.__dict__.pop("forward", None)  # of oarlock.models.forward; Paddle translates only that of a class
    match FAMILIES[family].graph_change:
        case "bloom_mask":  # Bloom and OPT make no causal mask where there is one token, which is not known here
            object.__setattr__(model.bloom, "_prepare_attn_mask", _bloom_mask)
        case "opt_mask":
            object.__setattr__(model.opt, "_prepare_decoder_attention_mask", _opt_mask)
        case "chatglm_rotary":  # the last length, a tensor once the model has run
            rotary = model.chatglm.transformer.rotary_embeddings
            del rotary.max_seq_len_cached
            rotary.max_seq_len_cached = -1
    layer = _Scores(model, family)
    layer.eval()
    spec = [paddle.static.InputSpec([None, None], "int64", name) for name in _inputs(family)]
    try:
        with paddle.no_grad(), _lenient_values(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the translator, about names in PaddleNLP's code
            graph = paddle.jit.to_static(layer, input_spec=spec, full_graph=True)
            paddle.jit.save(graph, str(folder / GRAPH))
    except Exception as error:  # Paddle raises whatever the translated code does
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"Paddle can't make a static graph of {type(model).__name__}: {lines[-1]}") from error


@contextlib.contextmanager
def _lenient_values() -> Iterator[None]:
    """Let code pass that asks a tensor of a graph for what it has not got, while a graph is made.

    Qwen2, Mistral and Gemma of paddlenlp 3.0.0b4 compare lists of sizes and raise where they differ; a size of any
    length has no value yet, and Paddle 3.3 refuses to take one for a bool. (Conditions on tensors that decide what is
    computed are translated and do not come here.) OPT notes the names of its layers' outputs, which have none.
    """
    value = paddle.pir.Value
    as_bool, name = value.__bool__, value.name

    def name_or_none(self: Any) -> str:
        try:
            return name.fget(self)
        except ValueError:
            return ""

    value.__bool__, value.name = lambda _: True, property(name_or_none, name.fset)
    try:
        yield
    finally:
        value.__bool__, value.name = as_bool, name


def _run(folder: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    from paddle.inference import Config, create_predictor

    config = Config(str(folder / f"{GRAPH}.json"), str(folder / f"{GRAPH}.pdiparams"))
    config.disable_glog_info()
    config.disable_mkldnn()  # with it Paddle 3.3.1 gets the rotary angles of Gemma and ChatGLM wrong (0.3 of a score)
    predictor = create_predictor(config)
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(batch[name])
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
