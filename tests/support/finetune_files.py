"""Fine-tuning data for tests."""

from __future__ import annotations

import json
from pathlib import Path


def write(path: Path, records, as_list=False) -> Path:
    text = json.dumps(records, indent=1) if as_list else "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text(text, encoding="utf-8")
    return path
