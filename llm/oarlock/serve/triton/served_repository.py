"""Makes the repository that Triton reads: this installation's code, and the data of the repository that is served.

    RUN/models/NAME/config.pbtxt            this installation's, with the settings of the served one
    RUN/models/NAME/1/model.py, lib/        this installation's
    RUN/models/NAME/1/model, adapters       links to the served ones

So no code in somebody else's repository is run, and nothing is written to it (it may be read-only). A new time of its
model.py has Triton load a model again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.errors import ConfigError
from oarlock.serve.config import ENGINE_SETTINGS
from oarlock.serve.triton.repository import find_engine_model
from oarlock.triton_repository.config_pbtxt import TRITON_CONFIG, make_template_config, read_triton_config
from oarlock.triton_repository.model_code import PACKAGE, TEMPLATES

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_ENGINE, _KINDS = "oarlock", ("oarlock", "oarlock_infer", "oarlock_json")
_MAX_COPIES = 256


@dataclass(frozen=True)
class ServedTree:
    """The repository that Triton reads.

    Attributes:
        folder: which Triton reads.
        source: the repository that is served.
        kinds: name of each model -> name of our template.
    """

    folder: Path
    source: Path
    kinds: Mapping[str, str]

    def write(self, model: str) -> None:
        """Write a model as its source is now. Triton loads it on request."""
        kind, version = self.kinds[model], self.folder / model / "1"
        config = _make_config(self.source / model / TRITON_CONFIG, model, kind, self.source)
        version.mkdir(parents=True, exist_ok=True)
        (self.folder / model / TRITON_CONFIG).write_text(str(config), encoding="utf-8")  # protobuf's text format
        shutil.copyfile(TEMPLATES / kind / "model.py", version / "model.py")
        os.utime(version / "model.py")
        _link(version / "lib" / "oarlock", PACKAGE)
        if kind == _ENGINE:
            for part in ("model", "adapters"):
                _link(version / part, self.source / model / "1" / part)


def make_served_tree(source: Path, folder: Path) -> ServedTree:
    """Write all models of a repository of `oarlock export --target triton`.

    Raises:
        ConfigError: when one of its models is not ours, or its configuration asks for something else.
        ModelError: when a configuration can't be read.
    """
    source = source.resolve()
    engine = find_engine_model(source)
    kinds = {kind.replace(_ENGINE, engine, 1): kind for kind in _KINDS}
    found = sorted(path.parent.name for path in source.glob(f"*/{TRITON_CONFIG}"))
    foreign = [name for name in found if name not in kinds]
    if foreign:
        raise ConfigError(
            f"{source / foreign[0]}: not a model of `oarlock export --target triton`, which are {', '.join(kinds)}; "
            "remove it (a tritonserver of your own serves any model)"
        )
    tree = ServedTree(folder, source, {name: kinds[name] for name in found})
    for name in found:
        tree.write(name)
    return tree


def _make_config(path: Path, model: str, kind: str, source: Path) -> ModelConfig:
    """Make a model's configuration: this installation's, with the settings and number of copies of the served one."""
    served = read_triton_config(path)
    if served.backend not in ("", "python"):
        raise ConfigError(f"{path}: backend {served.backend!r}: a model of `oarlock export` has 'python'")
    config = make_template_config(kind)
    config.name = model
    if kind != _ENGINE:
        config.parameters["engine"].string_value = find_engine_model(source)
        copies = [group.count or 1 for group in served.instance_group]
        if copies:
            if min(copies) < 1 or sum(copies) > _MAX_COPIES:
                raise ConfigError(f"{path}: instance_group: {copies} copies: it must be 1 to {_MAX_COPIES} in all")
            config.instance_group[0].count = sum(copies)
        return config
    adapters = sorted(place.name for place in (source / model / "1" / "adapters").glob("*") if place.is_dir())
    config.parameters["adapters"].string_value = " ".join(adapters)
    for name in ENGINE_SETTINGS:
        if name in served.parameters:
            config.parameters[name].string_value = served.parameters[name].string_value
    return config


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    if target.exists():
        place.symlink_to(target)
