"""`oarlock export`: one directory for one kind of server, whole or not there, with what was proven in its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oarlock.environment.console import get_logger
from oarlock.errors import ModelError
from oarlock.export.checks.check import check_model
from oarlock.export.checks.findings import read_object
from oarlock.export.convert import ConvertOptions, convert
from oarlock.export.manifest import MANIFEST_FILE, read_manifest, write_manifest
from oarlock.export.request import Request, adapter_names, check_source, template_of
from oarlock.export.servers import SERVERS
from oarlock.export.start_scripts import ADAPTERS, START_FILE, adapter_ranks, write_start_script
from oarlock.export.static_graph import GRAPH, write_graph
from oarlock.export.tokenizer_files import write_companions
from oarlock.files import remove_folder
from oarlock.formats.quoting import shell_word
from oarlock.hub.model_names import local_folder
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource
from oarlock.peft.adapter_folder import Base
from oarlock.weights.save import save_config, whole_folder

logger = get_logger(__name__)

_WHAT = "the export"


def export(request: Request) -> None:
    """Write what is asked for into request.output; nothing is left of an export that fails.

    Args:
        request: checked by check_options().

    Raises:
        ModelError: when the target can't run the model, something can't be read or written, or a proof fails.
    """
    mix = AdapterMix.open(request.adapters) if request.adapters else None
    name = request.model or (mix.base.name if mix else "")
    base = local_folder(name, with_weights=True, allow_pickle=request.allow_pickle)
    check_source(request, base)
    output = request.output.resolve()
    if request.target == "peft":
        _export_adapter(request, base, output)
    elif request.target == "triton":
        _export_repository(request, base, output)
    else:
        with (
            _whole_model(request, base, mix) as (folder, facts),
            whole_folder(output, _WHAT, (base, *request.adapters)) as result,
        ):
            facts |= {"target": request.target, "name": request.name}
            if request.converts:
                _write_converted(request, folder, result, facts)
            else:
                _write_graph(request, folder, result, facts)
            if mix is not None and not request.merges:
                _keep_adapters(request, base, result, facts)
            _finish(request, result, facts)
    _say_what_next(request)


@contextmanager
def _whole_model(request: Request, base: Path, mix: AdapterMix | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model to be written, merged into a folder beside the output where there are adapters; facts about it."""
    source: dict[str, Any] = {"folder": str(base), "fingerprint": Base.of("", base).fingerprint}
    facts: dict[str, Any] = {"source": source, "proof": {}}
    if mix is None or not request.merges:
        yield base, facts
        return
    source["adapters"] = [{"folder": str(p.adapter.folder), "settings": p.adapter.settings} for p in mix.parts]
    folder = request.output.resolve().with_name(f".{request.output.name}.merged")
    remove_folder(folder)
    try:
        options = MergeOptions(None, request.max_shard_bytes, request.proof, request.allow_pickle, says_places=False)
        proof = merge(base, mix, folder, options)
        facts["proof"]["merge"] = proof and asdict(proof)
        yield folder, facts
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_converted(request: Request, folder: Path, result: Path, facts: dict[str, Any]) -> None:
    options = ConvertOptions(
        request.dtype, request.max_shard_bytes, request.proof, request.allow_pickle, says_places=False
    )
    done = convert(folder, result, "hf", options)
    facts["proof"]["conversion"] = done.proof and asdict(done.proof)
    facts |= {"family": done.family, "dtype": done.dtype}
    logger.info(f"{done.family}, {len(done.names)} weights, {done.num_bytes / 1e6:,.1f} MB, {done.dtype}")


def _write_graph(request: Request, folder: Path, result: Path, facts: dict[str, Any]) -> None:
    config = read_config(folder)
    proof = write_graph(ModelSource(folder, config, from_weights=True), result, request.allow_pickle)
    save_config(config, result)
    write_companions(folder, "paddle", config, result)
    facts["proof"]["graph"] = asdict(proof)
    facts |= {"family": config.model_type, "dtype": "float32", "disable_mkldnn": True}


def _keep_adapters(request: Request, base: Path, result: Path, facts: dict[str, Any]) -> None:
    from oarlock.export.peft import export_peft

    for name, adapter in adapter_names(request.adapters).items():
        (result / ADAPTERS).mkdir(exist_ok=True)
        export_peft(adapter, result / ADAPTERS / name, str(base))
    facts["source"]["adapters"] = [str(adapter) for adapter in request.adapters]


def _finish(request: Request, result: Path, facts: dict[str, Any]) -> None:
    """Start script, manifest, and the checker's word on a directory that a server reads."""
    if not template_of(result):
        logger.info("the model has no chat template: servers complete text, and refuse or improvise chats")
    if request.target in ("vllm", "fastdeploy"):
        config = read_object(result / "config.json")
        if isinstance(config, str):
            raise ModelError(f"{result / 'config.json'} {config}")
        write_start_script(request.target, config, request.name, result, adapter_ranks(result))
    known = {}
    if (result / MANIFEST_FILE).is_file():  # of the conversion: its hashes hold
        known = {name: about["sha256"] for name, about in read_manifest(result)["files"].items()}
    write_manifest(result, known=known, **facts)
    if request.converts:
        findings = check_model(result, request.target)
        if findings:
            listed = "\n".join(f"  {finding.to_line()}" for finding in findings)
            raise ModelError(f"{SERVERS[request.target].title} would not serve this; nothing was written:\n{listed}")


def _export_adapter(request: Request, base: Path, output: Path) -> None:
    from oarlock.export.peft import export_peft

    export_peft(request.adapters[0], output, str(base))


def _export_repository(request: Request, base: Path, output: Path) -> None:
    from oarlock.export.triton import export_triton

    export_triton(base, adapter_names(request.adapters), output, request.name)


def _say_what_next(request: Request) -> None:
    output = request.output
    if request.target in ("vllm", "fastdeploy"):
        logger.info(f"{output}: start it with `bash {shell_word(output / START_FILE)}`")
    elif request.target == "triton":
        logger.info(f"{output}: start it with `oarlock serve {shell_word(output)}`")
    elif request.target == "paddle-inference":
        logger.info(
            f"{output}: {GRAPH}.json and {GRAPH}.pdiparams for paddle.inference (call disable_mkldnn() on a CPU)"
        )
    else:
        logger.info(f"{output}: exported")
