"""The weight files of a folder: Paddle's and Hugging Face's safetensors, single or sharded.

Nothing is written into the source folder (PaddleNLP's own conversion does) and no torch is needed. Pickle formats are
refused unless the user allows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarlock.weights.weight_files import INDEX_NAME, find_weights, has_safetensors, header_of

__all__ = ["INDEX_NAME", "WeightFolder", "has_safetensors"]


@dataclass(frozen=True)
class WeightFolder:
    """The safetensors weights of one folder, by their headers.

    Attributes:
        files: tensor name -> file that holds it.
        layout: "pt" (Hugging Face: [out, in] matrices, model.* names) or "np" (Paddle: [in, out]).
    """

    folder: Path
    files: dict[str, Path]
    layout: str

    @classmethod
    def open(cls, folder: str | Path) -> WeightFolder:
        """Find the tensors.

        Raises:
            ModelError: for missing or damaged files, two sets of weights (see
                oarlock.weights.weight_files), or pickles alone.
        """
        folder = Path(folder)
        return cls(folder, *find_weights(folder))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, as they are stored.

        Raises:
            ModelError: for damaged files.
        """
        return {name: header_of(path).tensors[name].shape for name, path in self.files.items()}
