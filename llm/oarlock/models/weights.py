"""Read weight files tensor by tensor: Paddle's and Hugging Face's safetensors, single or sharded.

Nothing is written into the source folder (PaddleNLP's own conversion does) and no torch is needed. Pickle formats are
refused unless the user allows them.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from oarlock.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
PICKLES = (
    "model_state.pdparams",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_state.pdparams.index.json",
)


@dataclass
class WeightFolder:
    """The safetensors weights of one folder, opened memory-mapped.

    Attributes:
        files: tensor name -> file that holds it.
        layout: "pt" (Hugging Face: [out, in] matrices, model.* names) or "np" (Paddle: [in, out]).
    """

    folder: Path
    files: dict[str, Path]
    layout: str
    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, folder: str | Path) -> WeightFolder:
        """Find the tensors.

        Raises:
            ModelError: for missing or damaged files, or when there are only pickles.
        """
        folder = Path(folder)
        index = folder / INDEX_NAME
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from error
            files = {name: folder / file for name, file in weight_map.items()}
            missing = sorted({path.name for path in files.values() if not path.is_file()})
            if missing:
                raise ModelError(f"{folder}: {INDEX_NAME} names {', '.join(missing)}, which is not there")
        else:
            shards = sorted(folder.glob("model*.safetensors"))
            if not shards:
                raise ModelError(_nothing_to_read(folder))
            files = {}
            for shard in shards:
                with _opened(shard) as tensors:
                    files |= dict.fromkeys(tensors.keys(), shard)
        found = cls(folder, files, "np")
        found.layout = (found._file(next(iter(files.values()))).metadata() or {}).get("format", "pt")
        return found

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def read(self, name: str) -> np.ndarray:
        """One tensor, bfloat16 as ml_dtypes.bfloat16.

        Raises:
            ModelError: when the file is damaged.
        """
        try:
            return self._file(self.files[name]).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.files[name]}: {name} can't be read: {error}") from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(_opened(path))
        return self._open[path]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def _nothing_to_read(folder: Path) -> str:
    pickles = [name for name in PICKLES if (folder / name).exists()]
    if pickles:
        return (
            f"{folder}: weights only as {', '.join(pickles)}, a pickle format that can run code when opened. If you "
            "trust where it comes from, add --allow_pickle_weights"
        )
    if not folder.is_dir():
        return f"{folder}: no such folder"
    return f"{folder}: no model.safetensors (or index of shards) in this folder"


def has_safetensors(folder: str | Path) -> bool:
    """Whether a folder holds weights as safetensors."""
    return (Path(folder) / INDEX_NAME).is_file() or any(Path(folder).glob("model*.safetensors"))
