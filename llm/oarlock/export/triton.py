"""Export a Triton model repository that needs only the packages of its requirements.txt.

    oarlock/        config.pbtxt, 1/model.py        the engine: streams (decoupled), Triton's generate fields
            1/model/, 1/adapters/NAME/, 1/lib/      weights, tokenizer and template; LoRA adapters; this package
    oarlock_json/   config.pbtxt, 1/model.py        FastDeploy's JSON form, IN -> OUT, streams
    oarlock_infer/  config.pbtxt, 1/model.py        one request, one response
    requirements.txt, oarlock_export.json

The last two pass requests on to the first one inside Triton, so one engine answers all. FastDeploy Serving 1.x reads
the same layout, but its Triton (21.10) is too old for decoupled Python models.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.errors import ModelError
from oarlock.export.manifest import write_manifest
from oarlock.export.requirements import REQUIREMENTS_FILE, format_requirements
from oarlock.export.servers import SERVED_NAME
from oarlock.files import compute_sha256, create_folder, require_empty
from oarlock.model_config.load import find_model_class, read_config
from oarlock.models.load_finetuned import check_base
from oarlock.models.open_weights import open_weights
from oarlock.peft.adapter_folder import Base
from oarlock.peft.open_adapter import open_lora
from oarlock.triton_repository.config_pbtxt import TRITON_CONFIG, make_template_config
from oarlock.triton_repository.model_code import PACKAGE, TEMPLATES
from oarlock.weights.folder_files import ADAPTER_FILES, MODEL_FILES, find_readers, link_files

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# The modules of this package that the two relaying models import.
_RELAY_MODULES = (
    *("__init__.py", "errors.py", "sampling/__init__.py", "sampling/ranges.py", "sampling/params.py"),
    *("triton_repository/__init__.py", "triton_repository/inputs.py", "serve/__init__.py", "serve/request.py"),
    *("serve/triton/__init__.py", "serve/triton/fields.py", "serve/triton/fastdeploy_json.py", "serve/triton/relay.py"),
)
# Of this package, what no server needs; a wheel has all of it inside.
_NOT_SERVED = ("__pycache__", "*.pyc", "configs", "entrypoints")


@dataclass(frozen=True)
class TritonExport:
    """A written repository.

    Attributes:
        folder: of the repository.
        models: names of the Triton models.
        files: path in the folder -> SHA-256.
    """

    folder: Path
    models: tuple[str, ...]
    files: dict[str, str]


def export_triton(model: Path, adapters: Mapping[str, Path], output: Path, name: str = "oarlock") -> TritonExport:
    """Write a model repository. A failed export leaves nothing behind.

    Weights are hard links if the file system supports them, otherwise copies.

    Args:
        model: model folder in either layout, with its tokenizer.
        adapters: LoRA adapters of this model, by their names for clients.
        output: folder to write. It must not exist yet.
        name: name of the streaming model.

    Raises:
        ModelError: when something is missing, does not belong together, or can't be written.
        EnvironmentProblem: `tritonclient` is not installed; its protobuf checks the configurations.
    """
    model, output = Path(model), Path(output).resolve()
    configs = {folder: _make_config(folder, name, tuple(adapters)) for folder in _name_models(name)}
    _check(model, adapters, name)
    require_empty(output)
    try:
        with create_folder(output, find_readers(model, *map(Path, adapters.values()))) as folder:
            for own, config in configs.items():
                _write_model(folder / config.name, own, config)
            version = folder / name / "1"
            link_files(model, version / "model", MODEL_FILES)
            sources = {version / "model": model}
            for adapter, place in adapters.items():
                link_files(Path(place), version / "adapters" / adapter, ADAPTER_FILES)
                sources[version / "adapters" / adapter] = Path(place)
            (folder / REQUIREMENTS_FILE).write_text(format_requirements(), encoding="utf-8")
            hashes = {
                path.relative_to(folder).as_posix(): compute_sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            template = version / "model" / "chat_template.jinja"
            write_manifest(
                folder,
                hashes,
                target="triton",
                source={
                    "folder": str(model),
                    "fingerprint": Base.from_folder("", model).fingerprint,
                    "adapters": [{"name": adapter, "folder": str(place)} for adapter, place in adapters.items()],
                },
                proof={"same_files": _count_same_files(folder, sources, hashes)},
                template=template.read_text(encoding="utf-8") if template.is_file() else None,
            )
    except OSError as error:
        raise ModelError(f"{output}: the repository could not be written: {error.strerror or error}") from error
    return TritonExport(output, tuple(config.name for config in configs.values()), hashes)


def _name_models(name: str) -> dict[str, str]:
    """Map the folder of each template to the name of its model in the repository."""
    return {own: own.replace("oarlock", name, 1) for own in ("oarlock", "oarlock_json", "oarlock_infer")}


def _make_config(own: str, name: str, adapters: tuple[str, ...]) -> ModelConfig:
    config = make_template_config(own)
    config.name = _name_models(name)[own]
    if own == "oarlock":
        config.parameters["adapters"].string_value = " ".join(adapters)
    else:
        config.parameters["engine"].string_value = name
    return config


def _check(model: Path, adapters: Mapping[str, Path], name: str) -> None:
    for word, what in ((name, "model"), *((adapter, "adapter") for adapter in adapters)):
        if not SERVED_NAME.fullmatch(word):
            raise ModelError(f"{word!r} can't be the name of the {what}; use letters, digits, . _ -")
    if set(adapters) & {name, *_name_models(name).values()}:
        raise ModelError(f"an adapter can't have the name of the model, {name!r}")
    if not (model / "config.json").is_file():
        raise ModelError(f"{model}: no config.json in this folder, so it is not a model")
    if not has_tokenizer(model):
        raise ModelError(f"{model}: no tokenizer in this folder; a server needs one")
    config = read_config(model)
    open_weights(model, find_model_class(config), config).close()  # refuses what the model does not compute with
    base = Base.from_folder(str(model), model) if adapters else None
    for place in adapters.values():
        assert base is not None
        check_base(open_lora(place, "served").base, base)


def _write_model(folder: Path, own: str, config: ModelConfig) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / TRITON_CONFIG).write_text(str(config), encoding="utf-8")  # protobuf's text format
    shutil.copyfile(TEMPLATES / own / "model.py", version / "model.py")
    library = version / "lib" / "oarlock"
    if own == "oarlock":
        shutil.copytree(PACKAGE, library, ignore=shutil.ignore_patterns(*_NOT_SERVED))
    else:
        for module in _RELAY_MODULES:
            (library / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / module, library / module)


def _count_same_files(folder: Path, sources: Mapping[Path, Path], hashes: Mapping[str, str]) -> int:
    """Count the files of the model and its adapters, after comparing each with its source.

    Raises:
        ModelError: when one differs.
    """
    count = 0
    for target, source in sources.items():
        for path in sorted(path for path in target.rglob("*") if path.is_file()):
            own = source / path.relative_to(target)
            if not path.samefile(own) and compute_sha256(own) != hashes[path.relative_to(folder).as_posix()]:
                raise ModelError(f"{own} changed while it was exported; nothing was written")
            count += 1
    return count
