"""A model folder in Hugging Face's or Paddle's layout: written tensor by tensor, compared before it has its name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.environment.console import get_logger, progress_bar
from oarlock.environment.paddle_import import on_cpu
from oarlock.errors import ModelError
from oarlock.export.convert_tensors import InTurn, converted_tensors, plain_config
from oarlock.export.manifest import write_manifest
from oarlock.export.tokenizer_files import write_companions
from oarlock.files import require_empty, write_json
from oarlock.merge.verify import TOLERANCES
from oarlock.model_config.family_detection import family_of
from oarlock.model_config.hf_config import to_hugging_face, words_of
from oarlock.model_config.load import config_content, config_writer, layout_of, read_config
from oarlock.models.build import model_class
from oarlock.models.layer_offload import empty_model, stream_logits
from oarlock.peft.adapter_folder import Base
from oarlock.weights.pickles import open_weights
from oarlock.weights.safetensors_file import FileRecord, TensorSource, main_dtype
from oarlock.weights.save import (
    MAX_SHARD_BYTES,
    check_space,
    file_order,
    save_config,
    whole_folder,
    write_weights,
)
from oarlock.weights.sources import FileSource

logger = get_logger(__name__)

Target = Literal["hf", "paddle"]
_LAYOUTS = {"hf": "pt", "paddle": "np"}
_BATCH = (2, 16)  # texts, tokens
_WHAT = "the converted model"


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        dtype: of float weights; None keeps each tensor's own.
        shard_bytes: the most of a weight file.
        proof: run the source and the result, and compare their scores.
        allow_pickle: read a source that is only there as a pickle.
        says_places: whether source and output are said at the end; not where they are steps of something else.
    """

    dtype: str | None = None
    shard_bytes: int = MAX_SHARD_BYTES
    proof: bool = True
    allow_pickle: bool = False
    says_places: bool = True


@dataclass(frozen=True)
class SameScores:
    """What the comparison of source and result found.

    Attributes:
        difference: the largest of a score, relative to the largest score.
        allowed: the most it may be, for the coarsest type that weights were rounded to.
        tokens: that were scored.
    """

    difference: float
    allowed: float
    tokens: int


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        family: model_type.
        proof: None where it was left out.
        names: of the weights.
        hashes: weight file -> SHA-256.
        num_bytes: of the weight files.
        dtype: that config.json names.
    """

    family: str
    proof: SameScores | None
    names: tuple[str, ...]
    hashes: Mapping[str, str]
    num_bytes: int
    dtype: str


def convert(source: Path, output: Path, to: Target, options: ConvertOptions | None = None) -> Conversion:
    """Write a model folder in the other layout (or again in its own), on the CPU.

    Memory: two tensors and some 100 MB; the proof runs both models layer by layer and needs no more. Nothing is left of
    a conversion that fails.

    Args:
        source: model folder in either layout; which one is seen from its weights.

    Raises:
        ModelError: when the family can't be converted, a weight is missing or left over, the configuration says what
            the other side does not compute, something can't be read or written, or the proof fails.
    """
    source, output = Path(source), Path(output).resolve()
    options = options or ConvertOptions()
    require_empty(output)
    words_of(family_of(config_content(source), str(source / "config.json")))
    layout = _layout(source, options.allow_pickle)
    config = read_config(source)
    with on_cpu(), whole_folder(output, _WHAT, [source]) as folder:
        with closing(open_weights(source, model_class(config), config, options.allow_pickle)) as weights:
            result = plain_config(config)
            tensors, records = _write(weights, config, result, to, options, folder)
        dtype = main_dtype(tensors)
        _write_config(source, result, to, dtype, folder)
        write_companions(source, to, result, folder)
        proof = None
        if options.proof:
            proof = _prove(source, config, folder, options.allow_pickle, {tensor.dtype for tensor in tensors})
        hashes = {name: record.sha256 for name, record in records.items()}
        facts = {"target": to, "family": config.model_type, "dtype": dtype, "proof": proof and asdict(proof)}
        about = {"folder": str(source), "layout": layout, "fingerprint": Base.of("", source).fingerprint}
        write_manifest(folder, known=hashes, source=about, **facts)
    num_bytes = sum(record.num_bytes for record in records.values())
    names = tuple(tensor.name for tensor in tensors)
    if options.says_places:
        logger.info(
            f"{source} -> {output}: {config.model_type}, {len(names)} weights, {num_bytes / 1e6:,.1f} MB, {dtype}"
        )
    return Conversion(config.model_type, proof, names, hashes, num_bytes, dtype)


def _layout(source: Path, allow_pickle: bool) -> str:
    """See layout_of; refuses pickles that were not allowed before anything is read."""
    layout = layout_of(source)
    if not allow_pickle:
        from oarlock.weights.weight_folder import WeightFolder

        WeightFolder.open(source)
    return layout


def _write(
    weights: FileSource,
    config: PretrainedConfig,
    result: PretrainedConfig,
    to: Target,
    options: ConvertOptions,
    folder: Path,
) -> tuple[list[TensorSource], dict[str, FileRecord]]:
    with InTurn(weights) as reader:
        made = converted_tensors(weights, config, result, to, options.dtype, reader.read)
        tensors = [tensor for tensor, _ in made]
        check_space(tensors, folder, _WHAT)
        stored = {tensor.name: name for tensor, name in made}
        reader.expect([stored[tensor.name] for shard in file_order(tensors, options.shard_bytes) for tensor in shard])
        total = sum(tensor.num_bytes for tensor in tensors)
        with progress_bar(total, "convert", "B", unit_scale=True) as bar:
            return tensors, write_weights(tensors, folder, options.shard_bytes, bar.update, _LAYOUTS[to])


def _write_config(source: Path, config: PretrainedConfig, to: Target, dtype: str, folder: Path) -> None:
    if to == "paddle":
        save_config(config, folder, dtype)
        return
    if config_writer(source) == "pt":  # as it came, but for the type
        about = {"architectures": config.architectures, "model_type": config.model_type, "torch_dtype": dtype}
        content = {**config_content(source), **about}
        for name in ("dtype", "auto_map"):  # the latter names code to run
            content.pop(name, None)
        if content.get("tie_word_embeddings", True) and not config.tie_word_embeddings:
            content["tie_word_embeddings"] = False  # two that differ were stored
    else:
        content = to_hugging_face(config, dtype, str(source))
    write_json(folder / "config.json", content)


def _prove(source: Path, config: PretrainedConfig, folder: Path, allow_pickle: bool, dtypes: set[str]) -> SameScores:
    """Run the source and the result, one after the other, in float32, layer by layer from their files.

    Raises:
        ModelError: when their scores differ by more than rounding the weights can do.
    """
    ids = np.random.default_rng(0).integers(0, config.vocab_size, _BATCH)
    before = _scores(source, config, ids, allow_pickle)
    after = _scores(folder, read_config(folder), ids)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        where = "the source" if not np.isfinite(before).all() else _WHAT
        raise ModelError(f"proof: {where} gives scores that are not finite numbers, so nothing was written")
    difference = float(np.abs(after - before).max()) / (float(np.abs(before).max()) or 1.0)
    coarsest = max(dtypes, key=lambda dtype: TOLERANCES.get(dtype, 0))
    proof = SameScores(difference, TOLERANCES.get(coarsest, TOLERANCES["float32"]), ids.size)
    if difference > proof.allowed:
        raise ModelError(
            f"proof: {_WHAT} is not the source: scores differ by {difference:.1e} of the largest, allowed for "
            f"{coarsest} are {proof.allowed:.1e}; nothing was written"
        )
    logger.info(
        f"proof: scores of source and result differ by {difference:.1e} of the largest (allowed: {proof.allowed:.1e})"
    )
    return proof


def _scores(folder: Path, config: PretrainedConfig, ids: np.ndarray, allow_pickle: bool = False) -> np.ndarray:
    whole = model_class(config)
    with closing(open_weights(folder, whole, config, allow_pickle, read_ahead=False)) as weights:
        return stream_logits(empty_model(whole, config), weights.read, set(weights.shapes), ids)
