"""Schemas of the files that describe an adapter: Oarlock's adapter.json and PEFT's adapter_config.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from typing_extensions import NotRequired, TypedDict

_Name = Annotated[str, MaxLen(200)]
_Path = Annotated[str, MaxLen(4096)]
_Rank = Annotated[int, Ge(1), Le(2**16)]
_Count = Annotated[int, Ge(1), Le(2**20)]
_Positive = Annotated[int | float, Gt(0), Le(1e9)]
_Share = Annotated[int | float, Ge(0), Lt(1)]


class BaseRecord(TypedDict):
    """The base in adapter.json (oarlock.peft.adapter_folder.Base)."""

    name: _Path
    fingerprint: Annotated[str, MaxLen(64)]


class AdapterFields(TypedDict):
    """adapter.json. Its settings have the schema of its method."""

    format: int
    method: Literal["lora", "prefix", "p_tuning"]
    settings: dict[str, Any]
    base: BaseRecord


class QuantizationFields(TypedDict, total=False):
    """Settings of oarlock.peft.quantization.Quantization."""

    algorithm: Literal["nf4", "fp4"]
    block_size: _Count
    double: bool
    double_block_size: _Count


class LoraFields(TypedDict):
    """Settings of oarlock.peft.lora.LoRA."""

    r: _Rank
    alpha: _Positive
    targets: Annotated[list[_Name], MaxLen(200)]
    dropout: NotRequired[_Share]
    rslora: NotRequired[bool]
    plus_scale: NotRequired[_Positive]
    scaling: NotRequired[_Positive]
    quantization: NotRequired[QuantizationFields | None]


class PrefixFields(TypedDict):
    """Settings of oarlock.peft.prefix_tuning.Prefix."""

    num_tokens: _Count


class PTuningFields(TypedDict):
    """Settings of oarlock.peft.p_tuning.PTuning."""

    num_tokens: _Count
    encoder: NotRequired[Literal["lstm", "mlp"]]
    hidden_size: NotRequired[_Count | None]


SETTINGS: dict[str, Any] = {"lora": LoraFields, "prefix": PrefixFields, "p_tuning": PTuningFields}

_Names = Annotated[list[_Path], MaxLen(100_000)]


class PeftFields(TypedDict, total=False):
    """The fields of adapter_config.json that matter. PEFT writes null for unset ones."""

    peft_type: _Name | None
    task_type: _Name | None
    base_model_name_or_path: _Path | None
    r: _Rank | None
    lora_alpha: _Positive | None
    lora_dropout: _Share | None
    use_rslora: bool | None
    bias: _Name | None
    init_lora_weights: bool | _Name | None
    target_modules: _Names | _Path | None
    layers_to_transform: Annotated[list[int], MaxLen(100_000)] | int | None
    rank_pattern: dict[_Name, _Rank] | None
    alpha_pattern: dict[_Name, _Positive] | None
