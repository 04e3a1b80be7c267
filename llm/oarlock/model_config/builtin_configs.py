"""Configurations of models by name, without a download where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oarlock.families.registry import FAMILIES
from oarlock.formats.json_file import read_json
from oarlock.model_config.family_detection import detect_family
from oarlock.model_config.model_folder import find_model_folder
from oarlock.model_config.schema import ConfigFields

_KNOWN = Path(__file__).parent / "config_files"


def read_config_by_name(name_or_path: str) -> dict[str, Any]:
    """Read the content of a model's config.json: from a folder, by a name that Oarlock or PaddleNLP knows, or from the
    hub.

    Raises:
        ModelError: when it can't be found, or is of a family that is not supported.
    """
    known = _KNOWN / f"{name_or_path.replace('/', '--')}.json"
    if Path(name_or_path).expanduser().exists():
        path = find_model_folder(name_or_path, with_weights=False) / "config.json"
    elif known.is_file():
        path = known
    elif (built_in := _read_from_paddlenlp(name_or_path)) is not None:
        path, content = Path(name_or_path), built_in
        return content | {"model_type": detect_family(content, str(path))}
    else:
        path = find_model_folder(name_or_path, with_weights=False) / "config.json"
    content = dict(read_json(path, ConfigFields, extra="allow"))
    return content | {"model_type": detect_family(content, str(path))}


def _read_from_paddlenlp(name: str) -> dict[str, Any] | None:
    """Look a name up among the configurations that PaddleNLP carries in its code."""
    import paddlenlp.transformers

    for family in FAMILIES.values():
        config_class = (
            getattr(paddlenlp.transformers, f"{family.class_prefix}Config") if family.builtin_configs else None
        )
        if config_class is not None and name in config_class.pretrained_init_configuration:
            content = config_class.from_pretrained(name).to_dict()
            return content | {"architectures": [family.architecture]}
    return None
