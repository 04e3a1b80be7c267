"""The folder deploy/, and stand-ins for the programs that its files call."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def make_program(folder: Path, name: str) -> Path:
    """Write a program that prints its arguments, one per line."""
    path = folder / name
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return path
