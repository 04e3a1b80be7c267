"""Configuration classes of the families that PaddleNLP does not have."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

from paddlenlp.transformers import PretrainedConfig

from oarlock.families.family import Family
from oarlock.families.registry import FAMILIES, find_hf_config
from oarlock.model_config.hf_config import to_hugging_face
from oarlock.model_config.hf_fields import ROPE, TOKEN_IDS


class DecoderConfig(PretrainedConfig):
    """The fields of transformers' configuration of a family, with its names and defaults.

    make_config_class() makes a subclass for each family.
    """

    record: ClassVar[Family]

    def __init__(self, **values: Any) -> None:
        """Set fields to the given values or their defaults; others are those of PretrainedConfig."""
        words = find_hf_config(self.record.name)
        defaults = {"use_cache": True, "rope_scaling": None, **copy.deepcopy(dict(words.fields))}
        defaults |= {name: getattr(words, name) for name in ("rope_theta", "partial_rotary_factor")}
        own = {name: values.pop(name, default) for name, default in defaults.items()}
        super().__init__(**values)
        for name, value in own.items():
            setattr(self, name, value)

    def to_diff_dict(self, saving_file: bool = False) -> dict[str, Any]:
        """Make the content of config.json: transformers' own form, which PaddleNLP's marks would only spoil.

        Args:
            saving_file: of PaddleNLP's method; without effect.
        """
        found = to_hugging_face(self, str(self.dtype), "this model")
        found["dtype"] = found.pop("torch_dtype")
        return found


@cache
def make_config_class(family: str) -> Any:
    """Make the configuration class of a family: `Qwen3Config`."""
    record = FAMILIES[family]
    return type(f"{record.class_prefix}Config", (DecoderConfig,), {"model_type": family, "record": record})


def list_fields(family: str) -> frozenset[str]:
    """The names of all fields of such a class that a config.json may set."""
    return frozenset((*find_hf_config(family).fields, *ROPE, *TOKEN_IDS))
