"""Making new models from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.api.models import Dtype
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.files import require_empty

if TYPE_CHECKING:
    from oarlock.model_config.choose_sizes import ChosenSizes


def new_model(
    family: str,
    parameters: int,
    output: str | Path | None,
    *,
    tokenizer: str | Path | None = None,
    max_length: int = 4096,
    vocab_size: int | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    experts: int | None = None,
    experts_per_token: int | None = None,
    tied: bool | None = None,
    seed: int = 42,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 5_000_000_000,
    weights: bool = True,
) -> ChosenSizes:
    """Write a model with random weights, as near as possible to a number of parameters, in its family's proportions.

    Args:
        family: model_type of the family.
        parameters: their number, embeddings included.
        output: folder to write. It must not exist yet. None: only choose the sizes.
        tokenizer: folder or hub name; it sets the vocabulary and is saved with the model.
        max_length: longest sequence, in tokens.
        vocab_size: rows of the embedding.
        layers: number of layers. This size and the next ones are chosen where they are None.
        hidden: hidden size.
        intermediate: width of the feed-forward; of one expert in a mixture of experts.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: size of a head.
        experts: of a layer.
        experts_per_token: experts that a token is sent to.
        tied: the output layer has the embedding's weights.
        seed: of the weights.
        dtype: type of the weights.
        max_shard_bytes: size of the largest weight file.
        weights: False writes no weights, only what pretraining needs to draw them.

    Returns:
        The configuration, the exact number of parameters, and the published model whose proportions it has.

    Raises:
        ConfigError: no model of the family has about this number of parameters.
        ModelError: sizes do not fit together, or something can't be read or written.

    Example:
        >>> new_model("qwen3", 100_000_000, None, vocab_size=32000).parameters
        100074816
    """
    if output is not None:
        require_empty(Path(output))
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.model_config.choose_sizes import SizeRequest
    from oarlock.models.new_model import choose_new_model, write_new_model

    request = SizeRequest(
        family, parameters, vocab_size, layers, hidden, intermediate, heads, kv_heads, head_dim, experts,
        experts_per_token, tied, max_length,
    )  # fmt: skip
    name = None if tokenizer is None else str(tokenizer)
    chosen = choose_new_model(request, name)
    if output is not None:
        write_new_model(chosen.config, Path(output), name, seed, dtype, max_shard_bytes, weights)
    return chosen
