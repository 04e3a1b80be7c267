"""From a configuration to a model: its config, its class, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddlenlp.transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PretrainedModel

from oarlock.config.schema import PretrainDataSection
from oarlock.environment import say, say_once
from oarlock.errors import ConfigError, ModelError
from oarlock.models.hub import local_folder
from oarlock.models.weights import WeightFolder, has_safetensors

if TYPE_CHECKING:
    from oarlock.config.schema import Config

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        folder: with config.json, and with weights where they are loaded.
        config: PaddleNLP's configuration with the run's kernel options applied.
        from_weights: load the weights, or start from random ones.
    """

    folder: Path
    config: PretrainedConfig
    from_weights: bool


def find_model(config: Config, from_weights: bool) -> ModelSource:
    """Resolve the name, read and check the model's configuration.

    Raises:
        ModelError: when the model can't be had or is of another family than --model_type.
        ConfigError: when sizes do not fit together.
    """
    folder = local_folder(config.model.model_name_or_path, from_weights, config.model.allow_pickle_weights)
    try:
        model_config = AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # PaddleNLP raises KeyError, AttributeError, OSError, ... for a file it can't place
        raise ModelError(f"{folder / 'config.json'}: not a model configuration PaddleNLP knows: {error!r}") from error
    if not model_config.architectures:
        raise ModelError(
            f'{folder / "config.json"} names no "architectures" (for example ["LlamaForCausalLM"]): add the line'
        )
    family = model_config.model_type
    if config.model.model_type and family != config.model.model_type:
        raise ModelError(f"--model_type {config.model.model_type}, but {folder / 'config.json'} is of type {family}")
    if not from_weights:
        _apply_sizes(config, model_config)
    _apply_kernels(config, model_config)
    return ModelSource(folder, model_config, from_weights)


def _apply_sizes(config: Config, model_config: PretrainedConfig) -> None:
    sizes = {name: value for name in _SIZES if (value := getattr(config.model, name, None)) is not None}
    for name, value in sizes.items():
        setattr(model_config, name, value)
    if "num_attention_heads" in sizes and "num_key_value_heads" not in sizes:
        model_config.num_key_value_heads = sizes["num_attention_heads"]
    hidden, heads = model_config.hidden_size, model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    if hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")


def _apply_kernels(config: Config, model_config: PretrainedConfig) -> None:
    """PaddleNLP reads these from the model's configuration; what this device lacks is replaced, and said once."""
    kernels, on_gpu = config.kernels, paddle.device.get_device().startswith("gpu")
    flash = kernels.use_flash_attention
    if flash and not on_gpu:
        say_once("no flash attention on a CPU: the plain attention is used (same result)")
        flash = False
    fused_norm = kernels.use_fused_rms_norm
    if fused_norm and not _fused_norm_available():
        say_once(
            "--use_fused_rms_norm: the custom op `fused_ln` is not installed (python setup.py install builds it); the "
            "plain RMSNorm is used (same result)"
        )
        fused_norm = False
    model_config.use_flash_attention = flash
    model_config.use_fused_rms_norm = fused_norm
    model_config.use_fast_layer_norm = False  # Llama reads it beside use_fused_rms_norm and fails when it is unset
    model_config.recompute = kernels.recompute
    model_config.recompute_granularity = kernels.recompute_granularity
    model_config.use_cache = False
    data = config.data
    model_config.seq_length = (
        data.max_seq_length if isinstance(data, PretrainDataSection) else data.src_length + data.tgt_length
    )


def _fused_norm_available() -> bool:
    from importlib.util import find_spec

    return find_spec("fused_ln") is not None


def check_lengths(source: ModelSource, longest: int, flag: str) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        ConfigError: naming the flag and the largest legal value.
    """
    positions = getattr(source.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ConfigError(
            f"{flag} asks for sequences of {longest:,} tokens, but the model was made for {positions:,} "
            f"(max_position_embeddings in {source.folder / 'config.json'}); give at most that"
        )


def check_vocabulary(source: ModelSource, needed: int, what: str) -> None:
    """Refuse a model whose embedding has fewer rows than `what` needs.

    Raises:
        ConfigError: with both numbers.
    """
    if needed > source.config.vocab_size:
        raise ConfigError(
            f"{what} needs a vocabulary of {needed:,}, but the model's has {source.config.vocab_size:,} rows "
            "(vocab_size): tokenizer and model do not belong together"
        )


def build_model(source: ModelSource, dtype: str = "float32", allow_pickle: bool = False) -> PretrainedModel:
    """Make the model, with its weights or random ones.

    Raises:
        ModelError: when weights are missing, of another shape, or only there as a pickle.
    """
    if not source.from_weights:
        return AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    if not has_safetensors(source.folder) and allow_pickle:
        say(f"{source.folder}: reading pickled weights, as you allowed")
        return AutoModelForCausalLM.from_pretrained(str(source.folder), config=source.config, dtype=dtype)
    with WeightFolder.open(source.folder) as weights:
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
        load_weights(model, weights)
    return model


def load_weights(model: PretrainedModel, weights: WeightFolder) -> None:
    """Put every tensor of a folder into its parameter, one at a time.

    Raises:
        ModelError: naming the parameters without a tensor, or the first of another shape.
    """
    readers = _tensor_readers(model, weights)
    state = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    missing = [name for name in state if name not in readers and name not in tied]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ModelError(f"{weights.folder}: no weights for {len(missing)} of {len(state)} parameters ({shown})")
    for name, parameter in state.items():
        if name not in readers:
            continue
        array = readers[name]()
        if list(array.shape) != list(parameter.shape):
            shapes = f"is {list(array.shape)}, the model expects {list(parameter.shape)}"
            raise ModelError(f"{weights.folder}: {name} {shapes}")
        set_parameter(parameter, array)


def _tensor_readers(model: PretrainedModel, weights: WeightFolder) -> dict[str, Callable[[], np.ndarray]]:
    """Parameter name -> how to get its array from the folder."""
    if weights.layout != "pt":
        return {name: partial(weights.read, name) for name in weights.files}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for mapping in type(model)._get_name_mappings(model.config):
        if mapping.source_name in weights.files:
            readers[mapping.target_name] = partial(_converted, mapping, weights)
    return readers


def _converted(mapping: Any, weights: WeightFolder) -> np.ndarray:
    """A Hugging Face tensor in Paddle's layout (PaddleNLP's StateDictNameMapping says how)."""
    return mapping.run({mapping.source_name: weights.read(mapping.source_name)}, mapping.source_name)


def set_parameter(parameter: paddle.Tensor, array: np.ndarray) -> None:
    """Copy an array of any float type into a parameter, in the parameter's type."""
    target = str(parameter.dtype).rsplit(".", 1)[-1]
    if target == "bfloat16":
        import ml_dtypes

        array = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)).view(np.uint16)
    else:
        array = np.ascontiguousarray(array.astype(target))
    parameter.set_value(array)


def num_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters of a model; tied ones once."""
    unique = {id(p): p for p in model.parameters()}.values()
    sizes = [(int(np.prod(p.shape)), not p.stop_gradient) for p in unique]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)
