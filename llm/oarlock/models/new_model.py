"""Write a model folder with random weights."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

from paddlenlp.transformers import PretrainedConfig

from oarlock.data.templates.chat_template import choose_template, find_own_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import make_progress_bar
from oarlock.errors import ConfigError
from oarlock.files import require_empty
from oarlock.model_config.choose_sizes import ChosenSizes, SizeRequest, choose_sizes
from oarlock.model_config.hf_fields import TOKEN_IDS
from oarlock.model_config.load import find_model_class
from oarlock.models.init_weights import RandomWeights
from oarlock.models.resize import MULTIPLE
from oarlock.weights.safetensors_file import TensorSource
from oarlock.weights.save import (
    MAX_SHARD_BYTES,
    check_space,
    create_model_folder,
    save_config,
    save_tokenizer,
    write_weights,
)

_WHAT = "the new model"


def choose_new_model(request: SizeRequest, tokenizer_name: str | None) -> ChosenSizes:
    """Choose the configuration of a new model.

    Args:
        tokenizer_name: folder or hub name. It sets the size of the vocabulary, rounded up to a multiple of 64 if the
            request has none, and the ids of its special tokens.

    Raises:
        ModelError: when the tokenizer can't be read, or sizes do not fit together.
        ConfigError: when no model has about this many parameters, or its vocabulary is smaller than the tokenizer's.
    """
    if tokenizer_name is None:
        return choose_sizes(request)
    tokenizer = load_tokenizer(tokenizer_name)
    needed = len(tokenizer)
    if request.vocab is not None and request.vocab < needed:
        raise ConfigError(f"--vocab-size {request.vocab:,}: the tokenizer {tokenizer_name} has {needed:,} tokens")
    vocab = request.vocab or -(-needed // MULTIPLE) * MULTIPLE
    chosen = choose_sizes(SizeRequest(**{**vars(request), "vocab": vocab}))
    for name in TOKEN_IDS:
        setattr(chosen.config, name, getattr(tokenizer, name))
    return chosen


def write_new_model(
    config: PretrainedConfig,
    output: Path,
    tokenizer_name: str | None = None,
    seed: int = 42,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: bool = True,
) -> None:
    """Write a model folder in Paddle's layout with random weights, drawn on the CPU, one block of layers at a time.

    The weights are those with which `oarlock pretrain --seed` starts from the same configuration.

    Args:
        output: folder to write. It must not exist yet.
        tokenizer_name: folder or hub name of the tokenizer to save with it.
        dtype: float32, float16 or bfloat16.
        weights: False writes the configuration and the tokenizer only.

    Raises:
        ModelError: when something can't be written. Nothing is left then.
    """
    output = output.resolve()
    require_empty(output)
    with create_model_folder(output, _WHAT) as folder:
        if weights:
            with closing(RandomWeights(find_model_class(config), config, seed)) as source:
                tensors = [
                    TensorSource(name, dtype, tuple(shape or ()), partial(source.read, name), cast=True)
                    for name, shape in source.shapes.items()
                ]
                check_space(tensors, folder, _WHAT)
                with make_progress_bar(
                    sum(tensor.num_bytes for tensor in tensors), "write", "B", unit_scale=True
                ) as bar:
                    write_weights(tensors, folder, max_shard_bytes, bar.update)
        save_config(config, folder, dtype)
        if tokenizer_name is not None:
            tokenizer = load_tokenizer(tokenizer_name)
            own = find_own_template(tokenizer) is not None
            save_tokenizer(tokenizer, folder, choose_template("tokenizer", tokenizer, "") if own else None)
