"""An adapter folder as a model: the base it was trained on, and the tokenizer and template saved with it."""

from __future__ import annotations

from pathlib import Path

from oarlock.environment.console import log_once
from oarlock.errors import ModelError
from oarlock.formats.links import check_links, find_own_links
from oarlock.model_config.load import find_model_class, read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.peft.adapter_folder import UNKNOWN_BASE, AdapterFolder
from oarlock.weights.folder_files import TEXT_FILES, find_files


def find_base(adapter: AdapterFolder, way_out: str, with_weights: bool = True, allow_pickle: bool = False) -> Path:
    """Find the folder of the base that an adapter records.

    A relative path is resolved from the working directory, then from every folder above the adapter's. Whoever loads
    the
    base compares its fingerprint. An adapter without a fingerprint of its base (PEFT's have none) may not name a folder
    outside of these. Nothing is downloaded because an adapter names it: the user has to name it.

    Args:
        way_out: how to say where the base is, for the message.
        with_weights, allow_pickle: as for find_model_folder().

    Raises:
        ModelError: when it is missing, or has to be named. StoppedWithOthers where another rank raises.
    """
    name = adapter.base.name
    places = [Path(name), *(parent / name for parent in adapter.folder.resolve().parents)]
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        if adapter.base.fingerprint in ("", UNKNOWN_BASE):
            raise ModelError(
                f"{adapter.folder}: its base is recorded as {name!r}, without a fingerprint to verify it; a "
                f"folder elsewhere is not opened because an adapter names it. {way_out}"
            )
        places = places[: 1 if Path(name).is_absolute() else None]
    found = next((place for place in places if (place / "config.json").is_file()), None) if name else None
    if found is None:
        raise ModelError(
            f"{adapter.folder}: its base is recorded as {name!r}: there is no such folder here or in a "
            f"folder above the adapter, and nothing is downloaded because an adapter names it. {way_out}"
        )
    if found != places[0]:
        log_once(f"{adapter.folder}: its base {name} is taken from {found}")
    return find_model_folder(str(found), with_weights, allow_pickle)


def map_to_base(adapter: AdapterFolder, base: Path) -> AdapterFolder:
    """Map an adapter to our names of a base's layers (AdapterFolder.map_to_model).

    Raises:
        ModelError: when the base's configuration can't be read, or the adapter does not belong to it.
    """
    config = read_config(base)
    return adapter.map_to_model(find_model_class(config), config)


def add_texts_of(adapter: Path, base: Path, into: Path) -> Path:
    """Make a folder of links to the base, with the tokenizer and the template that the adapter was trained with.

    Returns:
        The folder, or the base itself if the adapter has none of its own.
    """
    own = _list_texts(adapter)
    if not own:
        return base
    folder = into / base.resolve().name
    for source in (adapter, base):
        check_links(source)
    folder.mkdir()
    find_own_links(folder, (adapter, base))
    texts_of_base = _list_texts(base)
    for path in base.iterdir():
        if path.is_file() and path.relative_to(base) not in texts_of_base:
            (folder / path.name).symlink_to(path.resolve())
    for place in own:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).symlink_to((adapter / place).resolve())
    return folder


def _list_texts(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in find_files(folder, TEXT_FILES)}
