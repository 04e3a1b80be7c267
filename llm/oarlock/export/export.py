"""Export a model for a server, as a folder with a manifest that records the results of the proofs."""

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
from oarlock.export.peft import export_peft
from oarlock.export.request import ExportRequest, check_source, has_template, name_adapters
from oarlock.export.servers import SERVERS
from oarlock.export.start_scripts import ADAPTERS, START_FILE, read_adapter_ranks, write_start_script
from oarlock.export.static_graph import GRAPH, write_graph
from oarlock.export.tokenizer_files import write_tokenizer_files
from oarlock.export.triton import export_triton
from oarlock.files import remove_folder
from oarlock.formats.quoting import quote_shell_word
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import MergeOptions, merge
from oarlock.model_config.load import read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.build import ModelSource
from oarlock.peft.adapter_folder import Base
from oarlock.weights.save import create_model_folder, save_config

logger = get_logger(__name__)


def export(request: ExportRequest) -> None:
    """Write the export into request.output. A failed export leaves nothing behind.

    Args:
        request: checked by check_options().

    Raises:
        ModelError: when the target can't run the model, something can't be read or written, or a proof fails.
    """
    mix = AdapterMix.open(request.adapters) if request.adapters else None
    name = request.model or (mix.base.name if mix else "")
    base = find_model_folder(name, with_weights=True, allow_pickle=request.allow_pickle)
    check_source(request, base)
    output = request.output.resolve()
    if request.target == "peft":
        export_peft(request.adapters[0], output, str(base))
    elif request.target == "triton":
        export_triton(base, name_adapters(request.adapters), output, request.name)
    else:
        with (
            _merge_adapters(request, base, mix) as (folder, facts),
            create_model_folder(output, "the export", (base, *request.adapters)) as result,
        ):
            facts |= {"target": request.target, "name": request.name}
            _write_model(request, folder, result, facts)
            if mix is not None and not request.merges:
                for adapter_name, adapter in name_adapters(request.adapters).items():
                    (result / ADAPTERS).mkdir(exist_ok=True)
                    export_peft(adapter, result / ADAPTERS / adapter_name, str(base))
                facts["source"]["adapters"] = [str(adapter) for adapter in request.adapters]
            _finish(request, result, facts)
    use = "exported"
    if request.target in ("vllm", "fastdeploy"):
        use = f"start it with `bash {quote_shell_word(request.output / START_FILE)}`"
    elif request.target == "triton":
        use = f"start it with `oarlock serve {quote_shell_word(request.output)}`"
    elif request.target == "paddle-inference":
        use = f"{GRAPH}.json and {GRAPH}.pdiparams for paddle.inference (call disable_mkldnn() on a CPU)"
    logger.info(f"{request.output}: {use}")


@contextmanager
def _merge_adapters(
    request: ExportRequest, base: Path, mix: AdapterMix | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder of the model to write, and facts for the manifest. A merged model is temporary."""
    source: dict[str, Any] = {"folder": str(base), "fingerprint": Base.from_folder("", base).fingerprint}
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


def _write_model(request: ExportRequest, folder: Path, result: Path, facts: dict[str, Any]) -> None:
    if not request.converts:
        config = read_config(folder)
        proof = write_graph(ModelSource(folder, config, from_weights=True), result, request.allow_pickle)
        save_config(config, result)
        write_tokenizer_files(folder, "paddle", config, result)
        facts["proof"]["graph"] = asdict(proof)
        facts |= {"family": config.model_type, "dtype": "float32", "disable_mkldnn": True}
        return
    options = ConvertOptions(
        request.dtype, request.max_shard_bytes, request.proof, request.allow_pickle, says_places=False
    )
    done = convert(folder, result, "hf", options)
    facts["proof"]["conversion"] = done.proof and asdict(done.proof)
    facts |= {"family": done.family, "dtype": done.dtype}
    logger.info(f"{done.family}, {len(done.names)} weights, {done.num_bytes / 1e6:,.1f} MB, {done.dtype}")


def _finish(request: ExportRequest, result: Path, facts: dict[str, Any]) -> None:
    """Write the start script and the manifest, and check the result by the server's rules."""
    if not has_template(result):
        logger.info("the model has no chat template: servers can complete text, but refuse chats or guess a template")
    if request.target in ("vllm", "fastdeploy"):
        config = read_object(result / "config.json")
        if isinstance(config, str):
            raise ModelError(f"{result / 'config.json'} {config}")
        write_start_script(request.target, config, request.name, result, read_adapter_ranks(result))
    known = {}
    if (result / MANIFEST_FILE).is_file():  # written by the conversion, whose hashes are still right
        known = {name: about["sha256"] for name, about in read_manifest(result)["files"].items()}
    write_manifest(result, known=known, **facts)
    if request.converts:
        findings = check_model(result, request.target)
        if findings:
            listed = "\n".join(f"  {finding.to_line()}" for finding in findings)
            raise ModelError(
                f"{SERVERS[request.target].title} could not serve the result; nothing was written:\n{listed}"
            )
