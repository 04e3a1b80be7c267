"""Asking, converting, merging and exporting models from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.files import require_empty

if TYPE_CHECKING:
    from oarlock.export.checks.findings import Finding
    from oarlock.export.convert import Conversion
    from oarlock.merge.verify import MergeProof

Dtype = Literal["float32", "float16", "bfloat16"]
ExportTarget = Literal["hf", "vllm", "fastdeploy", "triton", "paddle-inference", "peft"]
_SHARD_BYTES = 5_000_000_000


def ask(
    model: str | Path, questions: Sequence[str], *, max_new_tokens: int | None = None, base: str | None = None
) -> list[str]:
    """Answer questions with a trained model or adapter, in the chat template saved with it.

    The model is loaded for each call. For many questions, sampling or streaming use `Engine`.

    Args:
        model: folder of a model or an adapter.
        questions: each is answered on its own, with the most likely tokens.
        max_new_tokens: longest answer. Default: 64, or as many as fit in the context.
        base: base model of an adapter, if it has moved since training.

    Returns:
        One answer for each question.

    Raises:
        ConfigError: `max_new_tokens` does not fit in the context after a question.
        ModelError: the model can't be loaded, or a question is longer than its context.

    Example:
        >>> ask("output/lora", ["Repeat the words.\\nriver window"])
        ['river window']
    """
    import_paddle()
    from oarlock.models.generate import ask_model

    return [answer for _, answer in ask_model(str(model), questions, max_new_tokens, base)]


def convert_model(
    source: str | Path,
    output: str | Path,
    to: Literal["hf", "paddle"],
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
    proof: bool = True,
    allow_pickle_weights: bool = False,
) -> Conversion:
    """Write a model in Hugging Face's or Paddle's layout, and prove that it equals its source.

    Args:
        source: model folder in either layout, or a hub name.
        output: folder to write. It must not exist yet.
        to: layout of the result.
        dtype: type of the weights. Default: that of each weight in the source.
        max_shard_bytes: size of the largest weight file.
        proof: compare the logits of result and source.
        allow_pickle_weights: read pytorch_model.bin or *.pdparams if there are no safetensors files.

    Returns:
        What was written, and what the comparison found.

    Raises:
        ModelError: the model can't be read, converted or written, or the comparison fails. Nothing is left then.

    Example:
        >>> convert_model("output/base", "output/base_hf", "hf").proof.difference < 1e-4
        True
    """
    output = Path(output)
    require_empty(output)
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.export.convert import ConvertOptions, convert
    from oarlock.model_config.model_folder import find_model_folder

    folder = find_model_folder(str(source), with_weights=True, allow_pickle=allow_pickle_weights)
    return convert(folder, output, to, ConvertOptions(dtype, max_shard_bytes, proof, allow_pickle_weights))


def merge_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | None = None,
    weights: Sequence[float] = (),
    dtype: Dtype | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
    proof: bool = True,
    allow_pickle_weights: bool = False,
) -> MergeProof | None:
    """Merge LoRA adapters into their base model, and prove that the result equals both.

    Args:
        adapters: folders of adapters of one base.
        output: folder to write. It must not exist yet.
        model: folder or hub name of the base. Default: where it was in training.
        weights: factor of each adapter, in their order. Default: 1 for all.
        dtype: type of the weights. Default: that of each weight in the base.
        max_shard_bytes: size of the largest weight file.
        proof: compare the logits of the merged model with those of base and adapters.
        allow_pickle_weights: read the base from a pickle if there are no safetensors files.

    Returns:
        What the comparison found; None without it.

    Raises:
        ConfigError: there are not as many weights as adapters.
        ModelError: base and adapters don't belong together, something can't be read or written, or the comparison
            fails. Nothing is left then.

    Example:
        >>> merge_adapters(["output/lora"], "output/merged")
    """
    from oarlock.merge.inputs import AdapterMix

    output, mix = Path(output), AdapterMix.open([Path(adapter) for adapter in adapters], weights)
    require_empty(output)
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.merge.merge import MergeOptions, merge
    from oarlock.model_config.model_folder import find_model_folder
    from oarlock.peft.adapter_base import find_base

    if model:
        base = find_model_folder(str(model), with_weights=True, allow_pickle=allow_pickle_weights)
    else:
        base = find_base(mix.parts[0].adapter, "Name it: --model BASE", allow_pickle=allow_pickle_weights)
    return merge(base, mix, output, MergeOptions(dtype, max_shard_bytes, proof, allow_pickle_weights))


def export_model(
    target: ExportTarget,
    output: str | Path,
    *,
    model: str | Path = "",
    adapters: Sequence[str | Path] = (),
    name: str = "oarlock",
    keep_adapters: bool = False,
    dtype: Dtype | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
    proof: bool = True,
    allow_pickle_weights: bool = False,
) -> Path:
    """Write a folder that a server reads, and prove that it equals the model.

    Args:
        target: what will read the folder.
        output: folder to write. It must not exist yet.
        model: model folder or hub name. Default: the base of the adapters.
        adapters: LoRA adapters. They are merged into the model, except for triton and peft.
        name: name of the model for clients.
        keep_adapters: for vllm, export the adapters next to the model instead of merging them.
        dtype: type of the weights. Default: that of each weight in the model.
        max_shard_bytes: size of the largest weight file.
        proof: compare the logits of the result and the model.
        allow_pickle_weights: read the model from a pickle if there are no safetensors files.

    Returns:
        The folder.

    Raises:
        ConfigError: arguments that don't go together.
        ModelError: the target can't run the model, something can't be read or written, or the comparison fails. Nothing
            is left then.

    Example:
        >>> export_model("vllm", "output/served", model="output/base", adapters=["output/lora"])
        PosixPath('output/served')
    """
    from oarlock.export.request import ExportRequest, check_options, check_source
    from oarlock.formats.links import check_links
    from oarlock.merge.inputs import AdapterMix

    request = ExportRequest(
        target=target,
        model=str(model),
        output=Path(output),
        adapters=tuple(map(Path, adapters)),
        name=name,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        proof=proof,
        allow_pickle=allow_pickle_weights,
        keep_adapters=keep_adapters,
    )
    check_options(request)
    if request.adapters:
        AdapterMix.open(request.adapters)
    if request.model and Path(request.model).is_dir():
        check_links(request.model)
        check_source(request, Path(request.model))
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.export.export import export

    export(request)
    return request.output


def check_export(folder: str | Path, server: str | None = None, *, hashes: bool = False) -> list[Finding]:
    """Check an exported folder by the rules of the server that will read it.

    Args:
        folder: the export.
        server: "hf", "vllm", "fastdeploy" or "triton". Default: the one that it was exported for.
        hashes: compare every file with the manifest as well.

    Returns:
        The problems, most important first; each has a kind, a place, the problem and a remedy.

    Raises:
        ConfigError: there is no such folder, or no server's rules apply to it.

    Example:
        >>> check_export("output/served")
        []
    """
    from oarlock.errors import ConfigError
    from oarlock.export.checks.check import check_folder, guess_server

    folder = Path(folder)
    server = server or guess_server(folder)
    if not folder.is_dir():
        raise ConfigError(f"--check {folder}: no such folder")
    import_paddle()
    set_paddlenlp_log_level("error")
    return check_folder(folder, server, hashes)
