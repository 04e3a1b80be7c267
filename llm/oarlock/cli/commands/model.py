"""`oarlock model` and `oarlock families`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from oarlock.api.new_model import new_model
from oarlock.cli.flags import Command, CommandGroup, NoOptions, flag
from oarlock.cli.weight_flags import ShardSize
from oarlock.config.options import at_least, between
from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError

if TYPE_CHECKING:
    from oarlock.model_config.choose_sizes import ChosenSizes

logger = get_logger(__name__)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMBT]?)", re.IGNORECASE)
_SIZES = "sizes (by default in the proportions of the family's published models)"


@dataclass(frozen=True, kw_only=True)
class NewModelOptions(ShardSize):
    """Options of `oarlock model new`."""

    family: str = flag(metavar="NAME")
    """Model family: llama, qwen3, gemma2, qwen3_moe, ..."""
    parameters: str = flag(metavar="N")
    """Number of parameters, embeddings included: 350000, 100M, 1.5B."""
    output: Path | None = flag(None, metavar="DIR")
    """Folder to write. It must not exist yet."""
    tokenizer: str | None = flag(None, metavar="DIR")
    """Tokenizer folder or hub name. It sets the vocabulary and the special tokens, and is saved with the model."""
    seed: int = flag(42, between(0, (1 << 32) - 1))
    """Random seed of the weights."""
    dtype: str = flag("float32", choices=("float32", "float16", "bfloat16"))
    """Type of the weights."""
    weights: bool = flag(True)
    """Write no weights, only what `oarlock pretrain` needs to draw them."""
    dry_run: bool = flag(False)
    """Print the sizes and write nothing."""
    max_length: int = flag(4096, at_least(1), unit="tokens", group=_SIZES)
    """Longest sequence."""
    vocab_size: int | None = flag(None, at_least(1), group=_SIZES)
    """Rows of the embedding. Default: the tokens of the tokenizer, rounded up to a multiple of 64."""
    layers: int | None = flag(None, at_least(1), group=_SIZES)
    """Layers."""
    hidden: int | None = flag(None, at_least(1), group=_SIZES)
    """Hidden size."""
    intermediate: int | None = flag(None, at_least(1), group=_SIZES)
    """Width of the feed-forward; of one expert in a mixture of experts."""
    heads: int | None = flag(None, at_least(1), group=_SIZES)
    """Attention heads."""
    kv_heads: int | None = flag(None, at_least(1), group=_SIZES)
    """Heads of keys and values."""
    head_dim: int | None = flag(None, at_least(2), group=_SIZES)
    """Size of a head."""
    experts: int | None = flag(None, at_least(1), group=_SIZES)
    """Experts of a layer."""
    experts_per_token: int | None = flag(None, at_least(1), group=_SIZES)
    """Experts that a token is sent to."""
    tie_embeddings: str | None = flag(None, choices=("yes", "no"), group=_SIZES)
    """Whether the output layer has the weights of the embedding."""


def read_count(text: str) -> int:
    """Read a number of parameters: 350000, 100M, 1.5B.

    Raises:
        ConfigError: for anything else.
    """
    found = _COUNT.fullmatch(text.replace(",", "").replace("_", "").strip())
    count = round(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not 0 < count <= 10**14:
        raise ConfigError(f"--parameters {text}: expected a number of parameters, such as 350000, 100M or 1.5B")
    return count


def _new(options: NewModelOptions) -> int:
    if options.output is None and not options.dry_run:
        raise ConfigError("--output is missing: name the folder to write, or add --dry-run")
    chosen = new_model(
        options.family,
        read_count(options.parameters),
        None if options.dry_run else options.output,
        tokenizer=options.tokenizer,
        max_length=options.max_length,
        vocab_size=options.vocab_size,
        layers=options.layers,
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        experts=options.experts,
        experts_per_token=options.experts_per_token,
        tied=None if options.tie_embeddings is None else options.tie_embeddings == "yes",
        seed=options.seed,
        dtype=cast(Any, options.dtype),
        max_shard_bytes=options.shard_bytes,
        weights=options.weights,
    )
    for line in _describe(chosen):
        print(line)
    logger.info("nothing was written (--dry-run)" if options.dry_run else f"written: {options.output}")
    return 0


def _describe(chosen: ChosenSizes) -> Iterator[str]:
    from oarlock.families.decoder_weights import count_used_parameters
    from oarlock.families.model_sizes import ModelSizes
    from oarlock.families.registry import FAMILIES
    from oarlock.train.throughput import compute_token_flops

    config, sizes = chosen.config, ModelSizes.from_config(chosen.config)
    decoder = FAMILIES[config.model_type].decoder
    assert decoder is not None
    embeddings = sizes.vocab * sizes.hidden * (1 if sizes.tied else 2)
    length = config.max_position_embeddings
    rows = [
        ("family", f"{sizes.family}, in the proportions of {chosen.like}"),
        ("layers", f"{sizes.num_layers}"),
        ("hidden size", f"{sizes.hidden:,}"),
        ("feed-forward", f"{sizes.intermediate:,}"),
        ("heads", f"{sizes.heads} of {sizes.head_size}, {sizes.kv_heads} of keys and values"),
        ("vocabulary", f"{sizes.vocab:,}{', one matrix for input and output' if sizes.tied else ''}"),
        ("longest sequence", f"{length:,} tokens"),
        ("parameters", f"{chosen.parameters:,}"),
        ("  without embeddings", f"{chosen.parameters - embeddings:,}"),
        ("memory of the weights", f"{chosen.parameters * 4 / 1e9:,.3f} GB in float32, "
                                  f"{chosen.parameters * 2 / 1e9:,.3f} GB in bfloat16"),
        ("training FLOPs", f"{compute_token_flops(config, length).training:.3g} per token, in sequences of {length:,}"),
    ]  # fmt: skip
    if sizes.experts:
        per_token = f"{sizes.experts} of width {sizes.expert_intermediate:,}, {config.num_experts_per_tok} per token"
        rows.insert(4, ("experts", per_token))
        used = count_used_parameters(decoder(config))
        rows.insert(-2, ("  multiplied per token", f"{used:,}"))
    width = max(len(name) for name, _ in rows)
    yield from (f"{name.ljust(width)}  {value}" for name, value in rows)


def _families(_: NoOptions) -> int:
    from oarlock.families.registry import make_families_table

    print(make_families_table())
    return 0


FAMILIES = Command("families", "Print what each model family supports, as a Markdown table.", NoOptions, _families)
COMMAND = CommandGroup(
    "model",
    "Make new models.",
    (
        Command(
            "new",
            "Write a model with random weights, of a family and a number of parameters, to pretrain it.",
            NewModelOptions,
            _new,
        ),
    ),
)
