"""Weight folders in every supported format, with values derived from the names."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np


def list_full_shapes(config) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of the model on one device."""
    from oarlock.model_config.load import find_model_class
    from oarlock.models.construct import unsplit_config, without_values
    from oarlock.weights.layout import parameter_shards

    with without_values():
        model = find_model_class(config)(unsplit_config(config))
    return {parameter.name: parameter.slice.shape for parameter in parameter_shards(model)}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def write(folder: Path, config, form: str = "paddle", leave_out: str = "", **other_shapes) -> None:
    """Write a weight folder on rank 0."""
    from paddle.distributed import barrier

    from oarlock.environment.ranks import is_first_rank

    if is_first_rank():
        shapes = {name: shape for name, shape in list_full_shapes(config).items() if name != leave_out}
        arrays = {name: values(name, shape) for name, shape in shapes.items()}
        write_arrays(folder, arrays | {n: values(n, s) for n, s in other_shapes.items()}, form)
    barrier()


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], form: str) -> None:
    import ml_dtypes
    import paddle
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    if form in ("hugging_face", "shards", "bfloat16", "torch_pickle", "torch_pickle_shards"):
        turned = {n: np.ascontiguousarray(a.T) if "proj" in n or "lm_head" in n else a for n, a in arrays.items()}
        arrays = {name.replace("llama.", "model."): array for name, array in turned.items()}
    if form == "bfloat16":
        arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    parts = 3 if "shards" in form else 1
    suffix = "bin" if "torch" in form else "safetensors"
    stem = "pytorch_model" if "torch" in form else "model"
    names, weight_map = sorted(arrays), {}
    for i in range(parts):
        part = {name: arrays[name] for name in names[i::parts]}
        file = f"{stem}.{suffix}" if parts == 1 else f"{stem}-{i + 1:05d}-of-{parts:05d}.{suffix}"
        if form == "pickle":
            paddle.save({n: paddle.to_tensor(a) for n, a in part.items()}, str(folder / "model_state.pdparams"))
        elif "torch" in form:
            save_torch(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "np" if form == "paddle" else "pt"})
        weight_map |= dict.fromkeys(part, file)
    if parts > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_torch(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the file that torch.save makes of a float32 state dict, without torch."""
    import io
    import pickle
    import types
    import zipfile

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage: ...

    def _rebuild_tensor_v2(*args): ...

    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2

    class Storage:
        def __init__(self, key, size):
            self.key, self.size = key, size

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(s // self.array.itemsize for s in self.array.strides)
            return _rebuild_tensor_v2, (Storage(self.key, self.array.size), 0, self.array.shape, strides, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", FloatStorage, value.key, "cpu", value.size) if isinstance(value, Storage) else None

    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        text = io.BytesIO()
        Pickler(text, 2).dump({name: Tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())})
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", text.getvalue())
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"{path.stem}/data/{i}", array.tobytes())
