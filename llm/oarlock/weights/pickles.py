"""Pickled weights, for folders that the user trusts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import paddle
from paddlenlp.utils.serialization import load_torch

from oarlock.errors import ModelError
from oarlock.weights.hf_names import MappedTensor, find_unused, map_names
from oarlock.weights.sources import check_stored
from oarlock.weights.weight_index import read_index

_PADDLE_PICKLE, _TORCH_PICKLE = "model_state.pdparams", "pytorch_model.bin"


class PickleSource:
    """Pickled weights (model_state.pdparams, pytorch_model.bin, or shards of them), with one file in memory at a time.

    Unpickling can run code, so this is only for folders that the user trusts.
    """

    read_ahead = False

    def __init__(self, folder: Path, model_class: Any, config: Any) -> None:
        self.place = str(folder)
        forms = {name: (name, f"{name}.index.json") for name in (_PADDLE_PICKLE, _TORCH_PICKLE)}
        kinds = [name for name, files in forms.items() if any((folder / file).is_file() for file in files)]
        kind = kinds[0] if kinds else None
        both = [file for name in kinds for file in forms[name] if (folder / file).is_file()]
        if len(both) > 1:
            raise ModelError(f"{folder}: two sets of weights: {both[0]} and {both[1]}: remove one of them")
        if kind is None:
            raise ModelError(
                f"{folder}: neither {_PADDLE_PICKLE} nor {_TORCH_PICKLE} (or their indices) in this folder"
            )
        self._file: Path | None = None
        self._arrays: dict[str, np.ndarray] = {}
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            self._load(folder / kind)
            files = dict.fromkeys(self._arrays, folder / kind)
        else:
            weight_map = read_index(index, Path(kind).suffix)
            files = {name: folder / file for name, file in weight_map.items()}
        if (folder / kind).is_file():
            check_stored(config, {name: array.shape for name, array in self._arrays.items()}, f"{folder}/config.json")
        found = map_names(model_class, config, files, kind == _TORCH_PICKLE)
        self._files, self.left_over = files, find_unused(files, found)
        found |= {name: MappedTensor(name) for name in self.left_over}
        self._tensors = {name: found[name] for name in sorted(found, key=lambda name: files[found[name].stored])}
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        for name, tensor in self._tensors.items():
            if name not in self.left_over:
                array = self._arrays.get(tensor.stored)
                self.shapes[name] = None if array is None else tensor.convert(array).shape

    def close(self) -> None:
        self._arrays = {}

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        self._load(self._files[tensor.stored])
        if tensor.stored not in self._arrays:
            raise ModelError(f"{self._files[tensor.stored]}: {tensor.stored} should be in this file and is not")
        return tensor.convert(self._arrays[tensor.stored])

    def in_place(self, name: str, into: np.ndarray) -> bool:
        return False

    def _load(self, path: Path) -> None:
        if path == self._file:
            return
        self._arrays, self._file = {}, path
        try:
            if path.suffix == Path(_PADDLE_PICKLE).suffix:
                content = paddle.load(str(path), return_numpy=True)
            else:
                content = load_torch(str(path))
        except Exception as error:  # a pickle can raise anything
            raise ModelError(f"{path}: can't be read: {error!r}") from error
        for name, array in content.items():
            if isinstance(array, np.ndarray):  # both formats give bfloat16 as its bits
                self._arrays[name] = array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
