"""Finds the folder of a model by name.

A folder is used as it is. Other names are downloaded once into PaddleNLP's cache.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from oarlock.environment.console import log_once
from oarlock.errors import ModelError, first_line
from oarlock.files import ADAPTER_FILE, GENERATION_FILE
from oarlock.formats.links import check_links
from oarlock.hub import downloads
from oarlock.parallel.nodes import run_once_per_node
from oarlock.weights.weight_folder import INDEX_NAME
from oarlock.weights.weight_index import read_index


def find_model_folder(name_or_path: str, with_weights: bool, allow_pickle: bool = False) -> Path:
    """Find the folder of a model on the first rank of each machine. Every rank of the run has to call it.

    Args:
        name_or_path: a folder, a config.json, or a name on PaddleNLP's hub (including its built-in names; with
            from_modelscope=True in the environment, on ModelScope).
        with_weights: weights are needed, not only config.json.

    Raises:
        ModelError: when neither a folder nor a hub has it. StoppedWithOthers where another rank raises.
    """
    return Path(run_once_per_node(lambda: str(_find(name_or_path, with_weights, allow_pickle)))[0])


def _find(name_or_path: str, with_weights: bool, allow_pickle: bool) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.name == "config.json":
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").is_file():
            how = f": it is an adapter folder (`oarlock merge --adapter {path} --output DIR` turns it into a model)"
            how = how if (path / ADAPTER_FILE).is_file() else ", so it is not a model"
            raise ModelError(f"{path}: no config.json in this folder{how}")
        check_links(path)
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(f"--model_name_or_path {name_or_path}: no such folder")
    return _download(name_or_path, with_weights, allow_pickle)


def _download(name: str, with_weights: bool, allow_pickle: bool) -> Path:
    def fetch(*files: str) -> Path | None:
        try:
            return downloads.fetch(name, files)
        except ModelError as error:
            raise ModelError(_no_download(name, error)) from error

    log_once(f"{name}: looking in the cache, then on the hub")
    config = fetch("config.json", "model_config.json")
    if config is None:
        raise ModelError(f"model {name}: not a folder here, and the hub has no config.json under this name")
    check_links(config.parent)
    with contextlib.suppress(ModelError):  # not every model has it
        fetch(GENERATION_FILE)
    if with_weights:
        found = fetch(INDEX_NAME, "model.safetensors", *(("model_state.pdparams",) if allow_pickle else ()))
        if found is None:
            raise ModelError(
                f"model {name}: the hub has no safetensors weights under this name"
                + ("" if allow_pickle else "; add --allow_pickle_weights to use *.pdparams if you trust the source")
            )
        if found.name == INDEX_NAME:
            shards = sorted(set(read_index(found).values()))
            try:
                downloads.fetch_all(name, shards)
            except ModelError as error:
                raise ModelError(_no_download(name, error)) from error
    return config.parent


def _no_download(name: str, error: ModelError) -> str:
    return (
        f"model {name}: not a folder here, and it could not be downloaded ({first_line(error)}). Without network, set "
        "--model_name_or_path to the folder of a model on this machine"
    )
