"""Fine-tuning data for tests: files, and the section of a configuration that names them."""

from __future__ import annotations

import json
from pathlib import Path

from oarlock.config.finetune import FinetuneDataSection


def write(path: Path, records, as_list=False) -> Path:
    """Write a file of records: JSON lines, or one list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records, indent=1) if as_list else "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def section(tmp_path: Path, name, **more) -> FinetuneDataSection:
    return FinetuneDataSection(dataset_name_or_path=str(name), data_cache_dir=str(tmp_path / "cache"), **more)
