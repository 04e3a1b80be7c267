"""The sampling parameters, each declared once, in one line of `SamplingParams`.

Made from this declaration: the fields of OpenAI requests (serve/front/openai/schema.py), the input tensors and
config.pbtxt of the Triton models (triton_repository/inputs.py), the fields of FastDeploy's JSON, the flags of
`oarlock chat`, the checks of generation_config.json, and the table in docs/serving.md (`python -m
oarlock.sampling.markdown`). The models in an exported Triton repository carry a copy of this package, which therefore
imports only the standard library and oarlock.errors.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any

from oarlock.errors import RequestRefused
from oarlock.sampling.ranges import Range

# A stop text is searched for at every token.
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 16, 256, 256
_MAX_SHOWN = 200  # characters of a wrong value in a message


@dataclass(frozen=True)
class SamplingOption:
    """One declared sampling parameter.

    Attributes:
        kind: int, float, bool or str; of the elements if `is_list`.
        range: allowed numbers; None for other kinds.
        openai: allowed numbers in OpenAI requests, where those are narrower.
        fastdeploy: name in FastDeploy's JSON; "" if it has no such field.
        bits: size of a whole number in Triton's tensor.
        in_generation_config: whether generation_config.json gives the default of requests that do not set it.
        in_chat: whether `oarlock chat` has a flag for it.
    """

    name: str
    kind: type
    is_list: bool
    default: Any
    range: Range | None
    openai: Range | None
    fastdeploy: str
    bits: int
    in_generation_config: bool
    in_chat: bool

    @property
    def datatype(self) -> str:
        """The type of its tensor, as in Triton's config.pbtxt without "TYPE_"."""
        return "INT64" if self.bits == 64 else {str: "STRING", int: "INT32", float: "FP32", bool: "BOOL"}[self.kind]

    @property
    def openai_range(self) -> Range:
        """`openai`, cut to what Triton's tensor holds."""
        allowed = self.openai
        assert allowed is not None
        if not allowed.is_whole:
            return allowed
        limit = 1 << (self.bits - 1)
        least = -limit if allowed.least is None else max(-limit, allowed.least)
        return Range(least, limit - 1 if allowed.most is None else min(limit - 1, allowed.most), is_whole=True)


def sampled(
    default: Any,
    range: Range | None = None,
    *,
    openai: Range | None = None,
    fastdeploy: str | None = None,
    bits: int = 32,
    in_generation_config: bool = False,
    in_chat: bool = False,
) -> Any:
    """Declare a sampling parameter; the arguments are attributes of SamplingOption.

    The metadata are those of `option` in config/options.py, so that flags are made from it too.

    Args:
        openai: by default the same as `range`.
        fastdeploy: by default the parameter's own name.
    """
    about = {
        "range": range,
        "openai": openai or range,
        "fastdeploy": fastdeploy,
        "bits": bits,
        "in_generation_config": in_generation_config,
        "in_chat": in_chat,
    }
    return field(default=default, metadata=_option_metadata(range) | {"sampled": about})


def _option_metadata(check: Range | None = None) -> dict[str, Any]:
    checks = (check,) if check else ()
    return {"checks": checks, "unit": "", "aliases": (), "choices": (), "may_change": False, "from_yaml": None}


def _whole(least: int, most: int | None = None, words: str = "") -> Range:
    return Range(least, most, words, is_whole=True)


@dataclass(frozen=True)
class SamplingParams:
    """The settings that choose the next token and end an answer.

    Parameters are applied in the order of the samplers of Hugging Face and vLLM: repetition, frequency and presence
    penalties, temperature, top_k, top_p.

    Attributes:
        default_tokens: longest answer if max_tokens is None, as far as the context and the limits allow.
        given: names of the parameters that the caller set. The model's generation_config.json applies to the others.
            None if all of them count as set.
    """

    max_tokens: int | None = sampled(None, _whole(1), fastdeploy="max_dec_len", in_chat=True)
    """Longest answer, in tokens (default: what the model's context leaves)."""
    min_tokens: int = sampled(0, _whole(0), fastdeploy="min_dec_len")
    """Shortest answer, in tokens; nothing ends it earlier."""
    temperature: float = sampled(0.0, Range(0, 100), openai=Range(0, 2), in_generation_config=True, in_chat=True)
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = sampled(
        1.0, Range(0, 1, excludes_least=True), fastdeploy="topp", in_generation_config=True, in_chat=True
    )
    """Sample from the most likely tokens with this total probability."""
    top_k: int = sampled(
        0,
        _whole(0),
        openai=_whole(-1, words="at least -1 (-1 or 0: all)"),
        fastdeploy="topk",
        in_generation_config=True,
        in_chat=True,
    )
    """Sample from this many of the most likely tokens; 0 for all."""
    seed: int | None = sampled(None, _whole(-(2**63), 2**64 - 1, "a number of 64 bits"), bits=64, in_chat=True)
    """Random seed for sampling; the same seed gives the same answer."""
    repetition_penalty: float = sampled(
        1.0,
        Range(0, 100, excludes_least=True),
        fastdeploy="penalty_score",
        in_generation_config=True,
        in_chat=True,
    )
    """Penalise tokens of the prompt and the answer (> 1); 1 disables."""
    frequency_penalty: float = sampled(0.0, Range(-100, 100), openai=Range(-2, 2), fastdeploy="frequency_score")
    """Subtracted from a token's logit for each time it is in the answer."""
    presence_penalty: float = sampled(0.0, Range(-100, 100), openai=Range(-2, 2), fastdeploy="presence_score")
    """Subtracted once from the logit of each token in the answer."""
    stop: tuple[str, ...] = sampled((), in_chat=True)
    """Text that ends the answer and is left out of it."""
    stop_token_ids: tuple[int, ...] = sampled((), fastdeploy="eos_token_ids")
    """Tokens that end the answer, besides the model's own."""
    ignore_eos: bool = sampled(False, fastdeploy="")
    """Do not stop at the model's own end tokens."""
    default_tokens: int | None = field(default=None, metadata=_option_metadata())
    given: frozenset[str] | None = field(default=None, metadata=_option_metadata())

    def with_defaults(self, defaults: Mapping[str, float | int]) -> SamplingParams:
        """These parameters, with a model's defaults for those that the caller did not set."""
        if self.given is None:
            return self
        own: dict[str, Any] = {name: value for name, value in defaults.items() if name not in self.given}
        return replace(self, **own)

    def check(self) -> None:
        """Refuse values outside of their ranges.

        Raises:
            RequestRefused: naming the parameter and what it may be.
        """
        for option in OPTIONS.values():
            if option.range is not None:
                _check_number(option.name, getattr(self, option.name), option.range, option.default is None)
        _check_number("default_tokens", self.default_tokens, _whole(1), may_be_none=True)
        if not (is_list_of(self.stop, str) and all(self.stop)):
            raise RequestRefused(f"stop must be a list of texts that are not empty; got {shown(self.stop)}")
        if not is_list_of(self.stop_token_ids, int):
            raise RequestRefused(f"stop_token_ids must be a list of token ids; got {shown(self.stop_token_ids)}")
        if len(self.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in self.stop):
            raise RequestRefused(f"stop: at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestRefused(f"stop_token_ids: at most {MAX_STOP_TOKENS}")


def _check_number(name: str, value: Any, allowed: Range, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if not allowed.is_number(value):
        kind = "whole" if allowed.is_whole else "finite"
        raise RequestRefused(f"{name} must be a {kind} number; got {shown(value)}")
    if not allowed.holds(value):
        raise RequestRefused(f"{name} must be {allowed.words}; got {shown(value)}")


def shown(value: Any) -> str:
    """A client's value for a message, cut if it is long."""
    if isinstance(value, int) and abs(value) >= 1 << 256:
        return "a number of more than 256 bits"  # Python takes long to write it
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def is_list_of(values: Any, kind: type) -> bool:
    """Whether a value is a list or tuple with elements of one type. A bool is not an int here."""
    return isinstance(values, (list, tuple)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _option(item: dataclasses.Field[Any], annotation: Any) -> SamplingOption:
    about = dict(item.metadata["sampled"])
    is_list = typing.get_origin(annotation) is tuple
    if is_list or isinstance(annotation, UnionType):  # tuple[int, ...] or int | None
        annotation = typing.get_args(annotation)[0]
    about["fastdeploy"] = item.name if about["fastdeploy"] is None else about["fastdeploy"]
    return SamplingOption(item.name, annotation, is_list, item.default, **about)


_HINTS = typing.get_type_hints(SamplingParams)
OPTIONS: Mapping[str, SamplingOption] = {
    item.name: _option(item, _HINTS[item.name])
    for item in dataclasses.fields(SamplingParams)
    if "sampled" in item.metadata
}
RANGES: Mapping[str, Range] = {name: option.range for name, option in OPTIONS.items() if option.range is not None}
