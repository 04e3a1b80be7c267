"""Output layers that a folder stores besides the embedding that its configuration ties them to.

PaddleNLP's OPT always has an output layer of its own (3.0.0b4), so models it trained have two matrices. The rule is
that
of transformers 5: if the two differ, the model has both, whatever the configuration says.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.weights.safetensors_file import SafetensorsFile
from oarlock.weights.weight_folder import WeightFolder, has_safetensors

_CHUNK = 4 << 20  # elements compared at a time


def has_untied_head(folder: Path, family: str) -> bool:
    """Check whether a folder stores an output layer that differs from its embedding, as safetensors.

    Also False for files that can't be read: loading them reports that.
    """
    names = FAMILIES[family].untied_heads if family in FAMILIES else ()
    if not names or not has_safetensors(folder):
        return False
    try:
        files = WeightFolder.open(folder).files
        pair = next((pair for pair in names if set(pair) <= files.keys()), None)
        if pair is None:
            return False
        with ExitStack() as stack:
            opened = {files[name]: stack.enter_context(SafetensorsFile(files[name])) for name in pair}
            return not _are_equal([(opened[files[name]], name) for name in pair])
    except (ModelError, OSError, ValueError, KeyError):
        return False


def _are_equal(pair: list[tuple[SafetensorsFile, str]]) -> bool:
    first, second = (file.tensors[name] for file, name in pair)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    size = math.prod(first.shape)
    buffers = [np.empty(min(_CHUNK, size), about.dtype) for about in (first, second)]
    for start in range(0, size, _CHUNK):
        one, other = (buffer[: size - start] for buffer in buffers)
        for (file, name), part in zip(pair, (one, other), strict=True):
            file.read(name, start, part)
        if not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            return False
    return True
