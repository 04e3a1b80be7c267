"""An adapter folder: what a method trained, in one layout under every plan, and which base it belongs to.

    adapter.json                        method, its settings, the base's name and fingerprint
    peft_model.safetensors(.index.json) whole tensors under their names in the model on one card
    lora_config.json                    LoRA only: PaddleNLP's LoRAModel.from_pretrained reads the folder with it

PaddleNLP itself saves one file per tensor-parallel rank, which no other plan can load.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.errors import ModelError
from oarlock.files import ADAPTER_FILE, complete_files, write_json
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.versions import read_package_versions
from oarlock.weights.buffers import all_finite
from oarlock.weights.safetensors_file import SafetensorsFile, TensorSource, find_main_dtype, write_safetensors
from oarlock.weights.save import save_tokenizer
from oarlock.weights.weight_folder import WeightFolder, has_safetensors

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.peft.method import Method

WEIGHTS_FILE = "peft_model.safetensors"
LORA_FILE = "lora_config.json"
FORMAT = 1
UNKNOWN_BASE = "unknown"  # replaces the fingerprint: PEFT's adapters have none
_SAMPLE = 1024  # elements at the beginning and the end of a tensor that the base's fingerprint covers


@dataclass(frozen=True)
class Base:
    """The model an adapter was trained on.

    Attributes:
        name: as the user gave it.
        fingerprint: of its weight files; "" for a base without them (random weights).
    """

    name: str
    fingerprint: str

    @classmethod
    def from_folder(cls, name: str, folder: Path) -> Base:
        """Fingerprint the base in a folder.

        The fingerprint covers names, types, shapes and the first and last bytes of every tensor. That distinguishes two
        trainings of one architecture without reading 100 GB.
        """
        if not has_safetensors(folder):  # pickles, or random weights
            return cls(name, "")
        digest = hashlib.sha256()
        paths = sorted(set(WeightFolder.open(folder).files.values()))
        try:
            for path in paths:
                with SafetensorsFile(path) as file:
                    for tensor in sorted(file.tensors):
                        digest.update(_read_ends(file, tensor))
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: the weights can't be read: {error}") from error
        return cls(name, digest.hexdigest())


def _read_ends(file: SafetensorsFile, name: str) -> bytes:
    """Description, first and last values of a tensor."""
    about = file.tensors[name]
    size = math.prod(about.shape)
    count = min(_SAMPLE, size)
    values = np.empty([count], about.dtype)
    parts = [f"{name} {about.dtype} {list(about.shape)}".encode()]
    for start in (0, size - count) if count else ():
        file.read(name, start, values)
        parts.append(values.tobytes())
    return b"".join(parts)


def read_base_once(name: str, folder: Path) -> Base:
    """Fingerprint the base on the first rank, for all ranks."""
    found: list[Base] = []
    run_on_all_ranks(lambda: found.append(Base.from_folder(name, folder)), first_rank_only=True)
    return all_gather_objects(found[0] if found else None)[0]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        method: "lora", "prefix" or "p_tuning".
        settings: of the method, as its describe() returned them.
        names: of its tensors.
    """

    folder: Path
    method: str
    settings: dict[str, Any]
    base: Base
    names: tuple[str, ...]

    def map_to_model(self, model_class: Any, config: Any) -> AdapterFolder:
        """Map the adapter to our names of the base's layers. Those of PEFT's adapters depend on the base."""
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors.

        Raises:
            ModelError: when they can't be read.
        """
        path = self.folder / WEIGHTS_FILE
        try:
            with SafetensorsFile(path) as file:
                return {name: tensor.shape for name, tensor in file.tensors.items()}
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: can't be read: {error}") from error

    def value(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read a whole tensor.

        Raises:
            ModelError: when it is missing, damaged or of another shape.
        """
        if name not in self.names:
            raise ModelError(f"{self.folder}: the adapter has no {name}: it was trained on another model or layers")
        try:
            with SafetensorsFile(self.folder / WEIGHTS_FILE) as file:
                about = file.tensors[name]
                if about.shape != tuple(shape):
                    raise ModelError(f"{self.folder}: {name} is {list(about.shape)}, the model needs {list(shape)}")
                array = np.empty(about.shape, about.dtype)
                file.read(name, 0, array)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder / WEIGHTS_FILE}: {name} can't be read: {error}") from error
        if not all_finite(array):
            raise ModelError(f"{self.folder / WEIGHTS_FILE}: {name} holds values that are not finite numbers")
        return array


def check_adapter(found: AdapterFolder, method: Method) -> AdapterFolder:
    """Check that an adapter can be continued with a method.

    Args:
        found: under our names (AdapterFolder.map_to_model).

    Raises:
        ModelError: when it was trained with other settings that determine shapes or scaling.
    """
    folder, mine = found.folder, method.describe()
    if found.method != method.name:
        raise ModelError(f"{folder} was trained with {found.method}, not with {method.name}")
    shaping = ("r", "num_tokens", "encoder", "hidden_size", "targets", "scaling")
    other = [key for key in shaping if key in mine and _sort_lists(found.settings.get(key)) != _sort_lists(mine[key])]
    if other:
        differing = ", ".join(f"{key} {found.settings.get(key)} there, {mine[key]} here" for key in other)
        raise ModelError(f"{folder}: the adapter was trained with other settings ({differing}): give the same flags")
    return found


def _sort_lists(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple)) else value


def describe_adapter(method: Method, base: Base, dtype: str) -> dict[str, Any]:
    """Make the content of adapter.json.

    Args:
        dtype: of the adapter's weights, which may differ from the base's.
    """
    return {
        "format": FORMAT,
        "method": method.name,
        "settings": method.describe(),
        "base": vars(base),
        "dtype": dtype,
        "versions": read_package_versions(),
    }


def write_adapter_weights(
    tensors: Sequence[TensorSource],
    content: Mapping[str, Any],
    folder: Path,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write the weights, their index, and for LoRA the configuration that PaddleNLP reads.

    Args:
        content: of adapter.json.
        progress: called with the bytes of each tensor once it is written.
    """
    write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "np"}, progress)
    total = sum(tensor.num_bytes for tensor in tensors)
    weight_map = {tensor.name: WEIGHTS_FILE for tensor in tensors}
    write_json(folder / f"{WEIGHTS_FILE}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    if content["method"] == "lora":
        settings = content["settings"]
        targets = sorted({name.split(".")[-2] for name in weight_map})
        lora_config = {
            "r": settings["r"],
            "lora_alpha": settings["alpha"],
            "lora_dropout": settings["dropout"],
            "rslora": settings["rslora"],
            "lora_plus_scale": settings["plus_scale"],
            "scaling": settings["scaling"],
            "target_modules": [rf"(.*\.)?{target}" for target in targets],
            "base_model_name_or_path": content["base"]["name"],
            "dtype": find_main_dtype(tensors),
            "tensor_parallel_degree": -1,
        }
        write_json(folder / LORA_FILE, lora_config)


def save_adapter(
    tensors: Sequence[TensorSource],
    method: Method,
    base: Base,
    tokenizer: PretrainedTokenizerBase | None,
    template: ChatTemplate | None,
    folder: str | Path,
) -> None:
    """Write an adapter folder. Each file is complete before it gets its name; other files in the folder stay.

    Args:
        tensors: all that was trained, as whole tensors. Each is read once, in the order of sort_for_file().

    Raises:
        ModelError: when it can't be written.
    """
    folder = Path(folder)
    try:
        with complete_files(folder, last=ADAPTER_FILE) as partial:
            content = describe_adapter(method, base, find_main_dtype(tensors))
            write_adapter_weights(tensors, content, partial)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial, template)
            write_json(partial / ADAPTER_FILE, content)
        if method.name != "lora":
            (folder / LORA_FILE).unlink(missing_ok=True)  # left over from an adapter of another kind
    except Exception as error:
        raise ModelError(f"{folder}: the adapter could not be written: {error}") from error
