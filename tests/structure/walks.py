"""The three walks: from an entrypoint to where a behaviour happens."""

from __future__ import annotations

from structure.hops import Step

WALKS: dict[str, tuple[str, int, list[Step]]] = {}
