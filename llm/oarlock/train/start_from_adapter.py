"""Runs that start from an adapter, whose folder names its base model, method and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.config.load import is_default
from oarlock.config.method import METHODS
from oarlock.config.options import list_option_specs
from oarlock.config.rules import find_cross_problems
from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.files import holds_adapter
from oarlock.model_config.model_folder import find_model_folder
from oarlock.peft.adapter_base import find_base, map_to_base
from oarlock.peft.adapter_folder import AdapterFolder
from oarlock.peft.hf_peft_folder import is_peft_folder
from oarlock.peft.open_adapter import open_adapter

if TYPE_CHECKING:
    from oarlock.config.finetune import FinetuneConfig

logger = get_logger(__name__)


def start_from_adapter(config: FinetuneConfig, origins: Mapping[str, str]) -> FinetuneConfig:
    """Add the settings of an adapter folder to the configuration, unless the user set them.

    `--model_name_or_path ADAPTER` alone is enough. With `--model_name_or_path BASE --adapter_name_or_path ADAPTER` the
    user chooses the base. All ranks have to call this.

    Args:
        origins: origin of each option (see LoadedConfig).

    Raises:
        ConfigError: if options contradict each other.
        ModelError: if the adapter can't be read, or its base is missing.
    """
    named, given = config.model.model_name_or_path, config.method.adapter_name_or_path
    alone = holds_adapter(named)
    if alone and given and Path(given).resolve() != Path(named).resolve():
        raise ConfigError(
            f"--model_name_or_path {named} is an adapter, and --adapter_name_or_path {given} is another: name the base "
            "model with the first, or drop the second"
        )
    adapter = named if alone else given
    if adapter is None:
        method = config.method
        unused = [f.name for f in fields(method) if f.name not in METHODS and not is_default(config, origins, f.name)]
        if unused and not method.chosen:
            logger.info(
                f"{', '.join(f'--{name}' for name in unused)}: not used, because no method is chosen and all weights "
                "are trained; for LoRA add --lora"
            )
        return config
    found = open_adapter(adapter)
    way_out = f"Name it: --model_name_or_path BASE --adapter_name_or_path {adapter}"
    base = find_base(found, way_out) if alone else None
    if is_peft_folder(found):  # its layers are known from the names in the base
        found = map_to_base(found, base or find_model_folder(named, with_weights=False))
    options = _read_options(config, found)
    changes = {name: value for name, value in options.items() if is_default(config, origins, name)}
    if alone:
        changes |= {"adapter_name_or_path": adapter, "model_name_or_path": str(base)}
        if config.model.tokenizer_name_or_path is None and has_tokenizer(Path(adapter)):
            changes["tokenizer_name_or_path"] = adapter
        logger.info(f"{adapter} is an adapter ({found.method}) of {changes['model_name_or_path']}: starting from both")
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        by_section.setdefault(list_option_specs(type(config))[name].section, {})[name] = value
    sections = {section: replace(getattr(config, section), **values) for section, values in by_section.items()}
    changed = replace(config, **sections)
    if problems := find_cross_problems(changed):
        raise ConfigError(f"with the options of the adapter {adapter}: {'; '.join(problems)}")
    return changed


def _read_options(config: FinetuneConfig, adapter: AdapterFolder) -> dict[str, Any]:
    """Convert the adapter's settings to options; the method only if the user chose none."""
    settings = adapter.settings
    quantization = settings.get("quantization")
    methods = {"lora": "qlora" if quantization else "lora", "prefix": "prefix_tuning"}
    method = methods.get(adapter.method, adapter.method)
    options: dict[str, Any] = {}
    if not config.method.chosen:
        options[method] = True
    if adapter.method == "lora":
        options |= {
            "r": settings.get("r"),
            "lora_alpha": settings.get("alpha"),
            "lora_dropout": settings.get("dropout"),
            "lora_target_modules": ",".join(settings.get("targets") or ()) or None,
            "rslora": settings.get("rslora"),
            "lora_plus_scale": settings.get("plus_scale"),
        }
    elif adapter.method == "prefix":
        options["num_prefix_tokens"] = settings.get("num_tokens")
    elif adapter.method == "p_tuning":
        options |= {
            "num_virtual_tokens": settings.get("num_tokens"),
            "p_tuning_encoder": settings.get("encoder"),
            "p_tuning_hidden_size": settings.get("hidden_size"),
        }
    if quantization:
        options |= {
            "weight_quantize_algo": quantization.get("algorithm"),
            "qlora_weight_blocksize": quantization.get("block_size"),
            "qlora_weight_double_quant": quantization.get("double"),
        }
    optional = {name for name, spec in list_option_specs(type(config)).items() if spec.optional}
    return {name: value for name, value in options.items() if value is not None or name in optional}
