"""Read weight files tensor by tensor: Paddle's and Hugging Face's safetensors, single or sharded.

Nothing is written into the source folder (PaddleNLP's own conversion does) and no torch is needed. Pickle formats are
refused unless the user allows them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError

from oarlock.errors import ModelError
from oarlock.models.weight_files import INDEX_NAME, find_weights, has_safetensors, opened

__all__ = ["INDEX_NAME", "WeightFolder", "has_safetensors"]


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
            ModelError: for missing or damaged files, two sets of weights (see
                oarlock.models.weight_files), or pickles alone.
        """
        folder = Path(folder)
        return cls(folder, *find_weights(folder))

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
            self._open[path] = self._stack.enter_context(opened(path))
        return self._open[path]
