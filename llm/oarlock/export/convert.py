"""Convert a model folder to Hugging Face's or Paddle's layout, tensor by tensor, and compare it with its source."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from paddlenlp.transformers import PretrainedConfig

from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.environment.paddle_import import on_cpu
from oarlock.export.convert_tensors import OrderedReader, list_converted_tensors, unfuse_config
from oarlock.export.manifest import write_manifest
from oarlock.export.tokenizer_files import write_tokenizer_files
from oarlock.families.registry import find_hf_config
from oarlock.files import require_empty, write_json
from oarlock.model_config.family_detection import detect_family
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.load import (
    detect_config_writer,
    detect_layout,
    find_model_class,
    read_config,
    read_config_content,
)
from oarlock.models.layer_offload import make_empty_model, stream_logits
from oarlock.models.open_weights import open_weights
from oarlock.models.proof import TOLERANCES, Proof, coarsest_dtype, compare_logits, require_equal
from oarlock.peft.adapter_folder import Base
from oarlock.weights.safetensors_file import FileRecord, TensorSource, find_main_dtype
from oarlock.weights.save import (
    MAX_SHARD_BYTES,
    check_space,
    create_model_folder,
    save_config,
    split_into_files,
    write_weights,
)
from oarlock.weights.sources import FileSource
from oarlock.weights.weight_folder import WeightFolder

logger = get_logger(__name__)

Target = Literal["hf", "paddle"]
_LAYOUTS = {"hf": "pt", "paddle": "np"}
_BATCH = (2, 16)  # texts, tokens
_WHAT = "the converted model"


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        dtype: type of float weights; None keeps that of each tensor.
        shard_bytes: size of the largest weight file.
        proof: run the source and the result, and compare their logits.
        allow_pickle: read a pickle if there are no safetensors files.
        says_places: log source and output at the end. False if the conversion is a step of something else.
    """

    dtype: str | None = None
    shard_bytes: int = MAX_SHARD_BYTES
    proof: bool = True
    allow_pickle: bool = False
    says_places: bool = True


@dataclass(frozen=True)
class ConversionProof(Proof):
    """A comparison of the converted model with its source.

    Attributes:
        tokens: number of tokens that were compared.
    """

    tokens: int


@dataclass(frozen=True)
class Conversion:
    """A written conversion.

    Attributes:
        family: model_type.
        proof: result of the comparison; None without it.
        names: names of the weights.
        hashes: weight file -> SHA-256.
        num_bytes: size of all weight files.
        dtype: type in config.json.
    """

    family: str
    proof: ConversionProof | None
    names: tuple[str, ...]
    hashes: Mapping[str, str]
    num_bytes: int
    dtype: str


def convert(source: Path, output: Path, to: Target, options: ConvertOptions | None = None) -> Conversion:
    """Write a model folder in the other layout (or in its own again), on the CPU.

    Needs memory for two tensors and about 100 MB. The proof runs both models layer by layer and needs no more. A failed
    conversion leaves nothing behind.

    Args:
        source: model folder in either layout. The layout is detected from its weights.
        output: folder to write. It must not exist yet.
        to: layout of the result.

    Raises:
        ModelError: when the family can't be converted, a weight is missing or unknown, the configuration has a setting
            that the other side does not support, something can't be read or written, or the proof fails.
    """
    source, output = Path(source), Path(output).resolve()
    options = options or ConvertOptions()
    require_empty(output)
    find_hf_config(detect_family(read_config_content(source), str(source / "config.json")))
    layout = detect_layout(source)
    if not options.allow_pickle:
        WeightFolder.open(source)  # raises if there are only pickles
    config = read_config(source)
    with on_cpu(), create_model_folder(output, _WHAT, [source]) as folder:
        with closing(open_weights(source, find_model_class(config), config, options.allow_pickle)) as weights:
            result = unfuse_config(config)
            tensors, records = _write(weights, config, result, to, options, folder)
        dtype = find_main_dtype(tensors)
        _write_config(source, result, to, dtype, folder)
        write_tokenizer_files(source, to, result, folder)
        proof = None
        if options.proof:
            proof = _prove(source, config, folder, options.allow_pickle, {tensor.dtype for tensor in tensors})
        hashes = {name: record.sha256 for name, record in records.items()}
        facts = {"target": to, "family": config.model_type, "dtype": dtype, "proof": proof and asdict(proof)}
        about = {"folder": str(source), "layout": layout, "fingerprint": Base.from_folder("", source).fingerprint}
        write_manifest(folder, known=hashes, source=about, **facts)
    num_bytes = sum(record.num_bytes for record in records.values())
    names = tuple(tensor.name for tensor in tensors)
    if options.says_places:
        logger.info(
            f"{source} -> {output}: {config.model_type}, {len(names)} weights, {num_bytes / 1e6:,.1f} MB, {dtype}"
        )
    return Conversion(config.model_type, proof, names, hashes, num_bytes, dtype)


def _write(
    weights: FileSource,
    config: PretrainedConfig,
    result: PretrainedConfig,
    to: Target,
    options: ConvertOptions,
    folder: Path,
) -> tuple[list[TensorSource], dict[str, FileRecord]]:
    with OrderedReader(weights) as reader:
        made = list_converted_tensors(weights, config, result, to, options.dtype, reader.read)
        tensors = [tensor for tensor, _ in made]
        check_space(tensors, folder, _WHAT)
        stored = {tensor.name: name for tensor, name in made}
        reader.expect(
            [stored[tensor.name] for shard in split_into_files(tensors, options.shard_bytes) for tensor in shard]
        )
        total = sum(tensor.num_bytes for tensor in tensors)
        with make_progress_bar(total, "convert", "B", unit_scale=True) as bar:
            return tensors, write_weights(tensors, folder, options.shard_bytes, bar.update, _LAYOUTS[to])


def _write_config(source: Path, config: PretrainedConfig, to: Target, dtype: str, folder: Path) -> None:
    if to == "paddle":
        save_config(config, folder, dtype)
        return
    if detect_config_writer(source) == "pt":  # unchanged, except for the type
        about = {"architectures": config.architectures, "model_type": config.model_type, "torch_dtype": dtype}
        content = {**read_config_content(source), **about}
        for name in ("dtype", "auto_map"):  # auto_map names code to run
            content.pop(name, None)
        if content.get("tie_word_embeddings", True) and not config.tie_word_embeddings:
            content["tie_word_embeddings"] = False  # two different tensors were stored
    else:
        content = to_hugging_face(config, dtype, str(source))
    write_json(folder / "config.json", content)


def _prove(
    source: Path, config: PretrainedConfig, folder: Path, allow_pickle: bool, dtypes: set[str]
) -> ConversionProof:
    """Compare the logits of source and result, computed in float32, layer by layer from their files.

    Raises:
        ModelError: when they differ by more than rounding the weights explains.
    """
    ids = np.random.default_rng(0).integers(0, config.vocab_size, _BATCH)
    expected = _compute_logits(source, config, ids, allow_pickle)
    difference = compare_logits(_WHAT, _compute_logits(folder, read_config(folder), ids), "the source", expected)
    dtype = coarsest_dtype(dtypes)
    proof = ConversionProof(difference, TOLERANCES[dtype], ids.size)
    require_equal(proof, dtype, f"{_WHAT} differs from the source")
    logger.info(
        f"proof: logits of source and result differ by {difference:.1e} of the largest (allowed: {proof.allowed:.1e})"
    )
    return proof


def _compute_logits(folder: Path, config: PretrainedConfig, ids: np.ndarray, allow_pickle: bool = False) -> np.ndarray:
    whole = find_model_class(config)
    with closing(open_weights(folder, whole, config, allow_pickle, read_ahead=False)) as weights:
        return stream_logits(make_empty_model(whole, config), weights.read, set(weights.shapes), ids)
