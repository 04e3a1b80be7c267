"""Model folders for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")
