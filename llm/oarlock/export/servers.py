"""What each server can read and how it is started, as data; pure Python.

vLLM's models are those of its documentation (0.6), FastDeploy's those of its 2.x releases; neither was run here, as
both need a GPU. transformers is run by the tests of oarlock.export.convert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES


@dataclass(frozen=True)
class Server:
    """A program that reads exported directories in Hugging Face's layout.

    Attributes:
        title: its name in sentences.
        only_torch_dtype: `dtype` in config.json means another layout to it.
        unknown: what happens to a weight that it does not expect.
        missing: what happens to a missing weight.
    """

    title: str
    only_torch_dtype: bool = False
    unknown: str = "it stops with an error"
    missing: str = "it stops with an error"


SERVERS = {
    "hf": Server(
        "transformers",
        unknown="it is ignored with a warning",
        missing="it gets random values with a warning",
    ),
    "vllm": Server("vLLM"),
    "fastdeploy": Server(
        "FastDeploy 2.x",
        only_torch_dtype=True,
        unknown="it is skipped in silence",
        missing="it keeps random values, in silence",
    ),
}

TRITON = "triton"
TARGETS = (*SERVERS, TRITON, "paddle-inference", "peft")
SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a model or an adapter: it becomes part of addresses


def list_architectures(server: str) -> tuple[str, ...]:
    """List the architectures of Oarlock's families that a server can run."""
    return tuple(family.architecture for family in FAMILIES.values() if server in family.servers)


def find_server_note(server: str, architecture: str) -> str:
    """Find the note for users of an architecture on a server; "" if there is none."""
    return next((f.server_notes.get(server, "") for f in FAMILIES.values() if f.architecture == architecture), "")


def check_architecture(server: str, architecture: str) -> None:
    """Refuse a model that a server can't run.

    Raises:
        ModelError: naming those it can.
    """
    if architecture not in list_architectures(server):
        model = architecture or "a model without an architecture"
        raise ModelError(
            f"--target {server}: {SERVERS[server].title} does not run {model} (of Oarlock's families it "
            f"runs {', '.join(list_architectures(server))})"
        )
