"""Data sections of a configuration for tests."""

from __future__ import annotations

import json
from pathlib import Path

from oarlock.config.finetune import FinetuneDataSection


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def section(tmp_path: Path, name, **more) -> FinetuneDataSection:
    return FinetuneDataSection(dataset_name_or_path=str(name), data_cache_dir=str(tmp_path / "cache"), **more)
