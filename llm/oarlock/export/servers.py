"""What each server can read and how it is started, as data; pure Python.

vLLM's models are those of its documentation (0.6), FastDeploy's those of its 2.x releases; neither was run here, as
both need a GPU. transformers is run by the tests of oarlock.export.convert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from oarlock.errors import ModelError
from oarlock.model_config.hf_fields import WORDS
from oarlock.parallel.family_rules import FAMILIES

_TRANSFORMERS = tuple(FAMILIES[family].model for family in WORDS)  # vLLM has all of them too


@dataclass(frozen=True)
class Server:
    """A program that reads exported directories in Hugging Face's layout.

    Attributes:
        title: its name in sentences.
        architectures: that it runs.
        notes: architecture -> what to know about it there.
        only_torch_dtype: `dtype` in config.json means another layout to it.
        reader: what happens to a weight that it does not expect, or misses.
    """

    title: str
    architectures: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    only_torch_dtype: bool = False
    unknown: str = "it stops with an error"
    missing: str = "it stops with an error"


SERVERS = {
    "hf": Server(
        "transformers",
        _TRANSFORMERS,
        unknown="it is ignored with a warning",
        missing="it gets random values with a warning",
    ),
    "vllm": Server("vLLM", _TRANSFORMERS),
    "fastdeploy": Server(
        "FastDeploy 2.x",
        ("Qwen2ForCausalLM", "LlamaForCausalLM"),
        notes={"LlamaForCausalLM": "FastDeploy has no Llama of its own and runs it through PaddleFormers, more slowly"},
        only_torch_dtype=True,
        unknown="it is skipped in silence",
        missing="it keeps random values, in silence",
    ),
}

TRITON = "triton"
TARGETS = (*SERVERS, TRITON, "paddle-inference", "peft")
SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a model or an adapter: it becomes part of addresses


def check_architecture(server: str, architecture: str) -> None:
    """Refuse a model that a server can't run.

    Raises:
        ModelError: naming those it can.
    """
    about = SERVERS[server]
    if architecture not in about.architectures:
        raise ModelError(
            f"--target {server}: {about.title} does not run {architecture or 'a model without an architecture'} (of "
            f"Oarlock's families it runs {', '.join(about.architectures)})"
        )
