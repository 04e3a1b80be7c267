"""Add LoRA adapters to their base, tensor by tensor; the result is compared before it gets its name."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from paddle.base.framework import EagerParamBase
from paddlenlp.transformers import PretrainedConfig

from oarlock.data.templates.chat_template import choose_template, find_own_template
from oarlock.data.tokenizers.load import has_tokenizer, load_tokenizer
from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.environment.paddle_import import on_cpu
from oarlock.files import require_empty, write_json
from oarlock.merge.deltas import LoraDelta, find_deltas
from oarlock.merge.dequantized_base import DequantizedBase
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.verify import MergeProof, prove
from oarlock.model_config.generation_config import read_first_generation_config
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.layer_offload import make_empty_model
from oarlock.models.load_finetuned import check_base
from oarlock.models.open_weights import open_weights
from oarlock.models.proof import TOLERANCES
from oarlock.peft.adapter_folder import Base
from oarlock.versions import read_package_versions
from oarlock.weights.buffers import array_type, copy_array, row_ranges
from oarlock.weights.layout import parameter_shards
from oarlock.weights.load import Request, check_source
from oarlock.weights.safetensors_file import TensorSource, find_main_dtype
from oarlock.weights.save import (
    MAX_SHARD_BYTES,
    check_space,
    create_model_folder,
    save_config,
    save_generation,
    save_tokenizer,
    write_weights,
)
from oarlock.weights.sources import WeightSource, stored_dtype

logger = get_logger(__name__)

MERGE_FILE = "merge.json"
_CHUNK_BYTES = 16 << 20  # of a weight in float32 that is merged at a time


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    Attributes:
        dtype: of the merged weights; None keeps each tensor's own.
        max_shard_bytes: largest weight file.
        proof: run base + adapter and the merged model, and compare their logits.
        allow_pickle: read a base that only exists as a pickle.
        replace: replace the content of the output folder once the merged model is complete.
        says_places: log base and output at the end. False where they are intermediate steps.
    """

    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    proof: bool = True
    allow_pickle: bool = False
    replace: bool = False
    says_places: bool = True


def merge(base: Path, mix: AdapterMix, output: Path, options: MergeOptions | None = None) -> MergeProof | None:
    """Write base + adapters as a model folder in Paddle's layout, on the CPU.

    Memory: two tensors (in the wider of stored and written type) and about 100 MB for rows in float32. The proof runs
    both models layer by layer and needs no more. A merge that fails leaves nothing.

    Args:
        base: folder of the model the adapters were trained on, in Paddle's or Hugging Face's layout.

    Returns:
        The result of the proof, None if it was skipped.

    Raises:
        ModelError: when the base is another one, something can't be read or written, or the proof fails.
    """
    options = options or MergeOptions()
    output = output.resolve()
    if not options.replace:
        require_empty(output)
    check_base(mix.base, Base.from_folder(str(base), base))
    config = read_config(base)
    mix = mix.map_to_model(find_model_class(config), config)
    with (
        on_cpu(),
        closing(open_weights(base, find_model_class(config), config, options.allow_pickle, read_ahead=False)) as source,
        create_model_folder(output, "the merged model", (base, *(part.adapter.folder for part in mix.parts))) as folder,
    ):
        trained_base = DequantizedBase(source, mix)
        merged = _list_tensors(source, trained_base, mix, config, options.dtype)
        check_space(merged, output, "the merged model")
        with make_progress_bar(sum(tensor.num_bytes for tensor in merged), "merge", "B", unit_scale=True) as bar:
            write_weights(merged, folder, options.max_shard_bytes, bar.update)
        _write_rest(base, mix, config, find_main_dtype(merged), folder)
        proof = None
        if options.proof:
            proof = prove(trained_base, mix, folder, config, {tensor.dtype for tensor in merged})
            logger.info(proof.text())
        record = {
            "base": {"name": str(base), "fingerprint": mix.base.fingerprint},
            "adapters": [
                {"folder": str(p.adapter.folder), "weight": p.weight, "settings": p.adapter.settings} for p in mix.parts
            ],
            "proof": None if proof is None else asdict(proof),
            "versions": read_package_versions(),
        }
        write_json(folder / MERGE_FILE, record)
    size = sum(tensor.num_bytes for tensor in merged)
    if options.says_places:
        logger.info(f"merged {_describe(mix)} into {base}: {size / 1e6:,.1f} MB, {output}")
    return proof


def _list_tensors(
    source: WeightSource, base: DequantizedBase, mix: AdapterMix, config: PretrainedConfig, dtype: str | None
) -> list[TensorSource]:
    """List all tensors of the merged model, in the order in which the base has them."""
    whole = find_model_class(config)
    held = {parameter.name: parameter for parameter in parameter_shards(make_empty_model(whole, config))}
    requests = [
        Request(name, parameter.slice, "float32", not isinstance(parameter.tensor, EagerParamBase))
        for name, parameter in held.items()
    ]
    names = check_source(source, requests)
    changes: dict[str, list[LoraDelta]] = {}
    for part in mix.parts:
        for change in find_deltas(part, whole, config):
            changes.setdefault(f"{change.layer}.weight", []).append(change)
    tensors = []
    for name in names:
        stored, shape = stored_dtype(source, name), held[name].slice.shape
        target = dtype if dtype and stored in TOLERANCES else stored  # integer buffers keep their type
        read = partial(_merge_tensor, base, name, shape, array_type(target), changes.get(name, []))
        tensors.append(TensorSource(name, target, shape, read))
    return tensors


def _merge_tensor(
    base: DequantizedBase, name: str, shape: tuple[int, ...], dtype: np.dtype, changes: list[LoraDelta]
) -> np.ndarray:
    """Merge a tensor: chunks of rows in float32, then in its own type."""
    whole = np.empty(shape, dtype)
    values = base.read(name, whole)
    if not changes:
        if values is not whole:
            copy_array(whole, values)
        return whole
    matrices = [change.read_matrices() for change in changes]
    for begin, end in row_ranges(shape, 4, _CHUNK_BYTES):
        rows = np.empty((end - begin, *shape[1:]), np.float32)
        copy_array(rows, values[begin:end])
        for a, b in matrices:
            rows += a[begin:end] @ b
        copy_array(whole[begin:end], rows)
    return whole


def _write_rest(base: Path, mix: AdapterMix, config: PretrainedConfig, dtype: str, folder: Path) -> None:
    """Write the configuration, and tokenizer, template and generation settings of the adapter or else of the base."""
    save_config(config, folder, dtype)
    places = (*(part.adapter.folder for part in mix.parts), base)
    found = next((place for place in places if has_tokenizer(place)), None)
    if found is None:
        logger.info(f"neither {places[0]} nor {base} has a tokenizer: the merged model has none")
    else:
        tokenizer = load_tokenizer(str(found))
        own = find_own_template(tokenizer) is not None
        save_tokenizer(tokenizer, folder, choose_template("tokenizer", tokenizer, "") if own else None)
    save_generation(read_first_generation_config(places), folder)


def _describe(mix: AdapterMix) -> str:
    return " + ".join(
        f"{part.weight:g} x {part.adapter.folder}" if part.weight != 1 else str(part.adapter.folder)
        for part in mix.parts
    )
