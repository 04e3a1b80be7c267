"""Build a model from a configuration: find its folder, check it, construct it, load its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddlenlp.transformers import PretrainedConfig, PretrainedModel

from oarlock.environment.console import log_once
from oarlock.errors import ConfigError, ModelError
from oarlock.model_config.generation_config import read_generation_config
from oarlock.model_config.load import find_model_class, read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.construct import construct, without_values
from oarlock.models.forward import adapt_inputs
from oarlock.models.init_weights import RandomWeights
from oarlock.models.memory_check import check_before, check_parameters
from oarlock.models.open_weights import open_weights
from oarlock.ops import library
from oarlock.ops.self_check import check_norms
from oarlock.parallel.nodes import run_once_per_node
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.parallel.plan import ParallelPlan
from oarlock.peft.adapter_folder import check_adapter
from oarlock.peft.method import Method, fill_trained, initial_values
from oarlock.peft.open_adapter import open_adapter
from oarlock.weights.load import load_distributed
from oarlock.weights.sources import WeightSource
from oarlock.weights.weight_folder import has_safetensors

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig


@dataclass(frozen=True)
class ModelSource:
    """A model to build.

    Attributes:
        folder: with config.json, and with weights if they are loaded.
        config: PaddleNLP's configuration with the run's kernel options applied.
        from_weights: load the weights instead of drawing random ones.
    """

    folder: Path
    config: PretrainedConfig
    from_weights: bool

    def generation(self) -> dict[str, Any]:
        """Read the content of generation_config.json; {} if there is none.

        Raises:
            ModelError: when it can't be read.
        """
        return read_generation_config(self.folder)


def find_model(config: RunConfig, from_weights: bool) -> ModelSource:
    """Find the model's folder, read its configuration and check it.

    Raises:
        ModelError: when the model can't be found or is not of the family in --model_type.
        ConfigError: when sizes do not fit together.
    """
    folder = find_model_folder(config.model.model_name_or_path, from_weights, config.model.allow_pickle_weights)
    model_config = read_config(folder)
    family = model_config.model_type
    if config.model.model_type and family != config.model.model_type:
        raise ModelError(f"--model_type {config.model.model_type}, but {folder / 'config.json'} is of type {family}")
    if not from_weights:
        sizes = config.model.sizes
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
    _apply_kernels(config, model_config)
    return ModelSource(folder, model_config, from_weights)


def set_parallel_fields(config: PretrainedConfig, plan: ParallelPlan, rank: int) -> None:
    """Set the fields from which model classes build a rank's part of the model.

    tensor_parallel_output leaves the logits split over the vocabulary, as ParallelCrossEntropy takes them.
    """
    config.tensor_parallel_degree = plan.tensor
    config.tensor_parallel_rank = plan.coordinates(rank).tensor
    config.expert_parallel_degree = plan.expert
    config.expert_parallel_rank = plan.find_expert_rank(rank)
    config.tensor_parallel_output = plan.tensor > 1
    config.sequence_parallel = plan.sequence_parallel
    config.virtual_pp_degree = plan.virtual_pipeline


def _apply_kernels(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Set the kernel options in the configuration, where models read them. Unavailable ones are replaced."""
    kernels, on_gpu = config.kernels, paddle.device.get_device().startswith("gpu")
    flash = kernels.use_flash_attention
    if flash and not on_gpu:
        log_once("no flash attention on a CPU: using the plain attention (same result)")
        flash = False
    fused_norm = kernels.use_fused_rms_norm and library.usable(on_gpu)
    if fused_norm:
        check_norms()
    model_config.use_flash_attention = flash
    model_config.use_fused_rms_norm = fused_norm
    model_config.use_fast_layer_norm = False  # Llama reads it if use_fused_rms_norm is set, and fails without it
    model_config.recompute = kernels.recompute
    model_config.recompute_granularity = kernels.recompute_granularity
    model_config.use_cache = False
    model_config.seq_length = config.sequence_length


def find_position_limit(config: PretrainedConfig) -> tuple[str, int]:
    """The field that limits a model's tokens, and the limit; ("", 0) without one."""
    names = ("max_position_embeddings", "max_sequence_length")
    return next(((name, int(value)) for name in names if (value := getattr(config, name, None))), ("", 0))


def check_lengths(source: ModelSource, longest: int, flag: str) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        ConfigError: naming the flag and the largest valid value.
    """
    name, positions = find_position_limit(source.config)
    if positions and longest > positions:
        raise ConfigError(
            f"{flag} asks for sequences of {longest:,} tokens, but the model supports {positions:,} "
            f"({name} in {source.folder / 'config.json'})"
        )


def check_vocabulary(source: ModelSource, needed: int, what: str, tokenizer: str = "") -> None:
    """Refuse a model whose embedding has fewer rows than `what` needs.

    Args:
        tokenizer: name of the tokenizer that needs them, if one does: tokens were added to it, or it is another
            model's.

    Raises:
        ConfigError: with both numbers and a remedy.
    """
    rows = source.config.vocab_size
    if needed <= rows:
        return
    way_out = "tokenizer and model do not match"
    if tokenizer and source.from_weights:
        way_out = (
            f"{way_out}, or {needed - rows:,} token(s) were added to it. Then grow the embedding and train the result: "
            f"`oarlock resize --input {source.folder} --tokenizer {tokenizer} --output NEW`"
        )
    elif tokenizer:
        way_out = f"{way_out}; to train from scratch, set --vocab_size {needed}"
    raise ConfigError(
        f"{what} needs a vocabulary of {needed:,}, but the model's has {rows:,} rows (vocab_size): {way_out}"
    )


def check_weights(source: ModelSource) -> None:
    """Check by their headers that the files are the model's weights. Every rank has to call it.

    Pickles are checked when they are loaded.

    Raises:
        ModelError: as open_weights(). StoppedWithOthers where another rank raises.
    """
    if source.from_weights and has_safetensors(source.folder):
        run_once_per_node(lambda: _open_source(source, False, 0).close())


def build_model(
    source: ModelSource,
    dtype: str = "float32",
    allow_pickle: bool = False,
    seed: int = 0,
    pipeline: bool = False,
    method: Method | None = None,
    adapter: Path | None = None,
    training_bytes: int = 0,
) -> PretrainedModel:
    """Build this rank's part of a model (all of it without a plan), with its weights or random ones.

    Every rank has to call it at the same time.

    Args:
        source: its configuration determines the part (set_parallel_fields).
        dtype: of the parameters.
        seed: of random weights, which are the same under every plan.
        pipeline: build a pipeline stage.
        method: fine-tuning method that adds parameters to the model.
        adapter: folder with values for them; by default the method initializes them.
        training_bytes: minimum of bytes that training holds per trained parameter (its gradient, ...).

    Raises:
        ModelError: when weights are missing, of another shape, or only exist as a pickle, the family has no pipeline,
            or the model does not fit into memory. StoppedWithOthers where another rank raises.
    """
    classes: list[Any] = []
    run_on_all_ranks(lambda: classes.append(find_model_class(source.config, pipeline)))
    model_class = classes[0]
    run_once_per_node(lambda: check_before(source.config, source.folder, source.from_weights, dtype))
    with without_values():
        model = construct(model_class, source.config, dtype)
        adapt_inputs(model)
        if method is not None:
            run_on_all_ranks(lambda: method.attach(model))
    check_parameters(model, source.folder, training_bytes)
    of_base = partial(_open_source, source, allow_pickle, seed)
    if method is None:
        load_distributed(model, of_base)
    else:
        load_distributed(model, of_base, wanted=lambda parameter: parameter.tensor.stop_gradient)
        values = (
            check_adapter(open_adapter(adapter).map_to_model(model_class, source.config), method).value
            if adapter
            else initial_values(method, seed)
        )
        run_on_all_ranks(lambda: fill_trained(model, values))
    return model


def _open_source(source: ModelSource, allow_pickle: bool, seed: int) -> WeightSource:
    """Open the source of the parameters' values."""
    whole = find_model_class(source.config)
    if not source.from_weights:
        return RandomWeights(whole, source.config, seed)
    return open_weights(source.folder, whole, source.config, allow_pickle)


def set_parameter(parameter: paddle.Tensor, array: np.ndarray) -> None:
    """Copy an array of any float type into a parameter, in the parameter's type."""
    target, shape = str(parameter.dtype).rsplit(".", 1)[-1], array.shape
    if target == "bfloat16":
        import ml_dtypes

        array = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)).view(np.uint16)
    else:
        array = np.ascontiguousarray(array.astype(target))
    parameter.set_value(array.reshape(shape))  # ascontiguousarray turns a scalar into an array of one


def count_parameters(model: Any) -> tuple[int, int]:
    """Count (all, trainable) parameters of a model, tied ones once."""
    unique = {id(p): p for p in model.parameters()}.values()
    sizes = [(int(np.prod(p.shape)), not p.stop_gradient) for p in unique]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)
