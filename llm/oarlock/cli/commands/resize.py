"""`oarlock resize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarlock.cli.flags import Command, flag
from oarlock.cli.weight_flags import ShardSize
from oarlock.config.options import at_least
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.files import require_empty


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(ShardSize):
    """Options of `oarlock resize`."""

    input: str = flag(metavar="DIR")
    """Model folder in either layout, or a hub name."""
    tokenizer: str = flag(metavar="DIR")
    """Tokenizer folder or hub name."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""
    multiple_of: int = flag(64, at_least(1))
    """Round the number of rows up to a multiple of this."""
    allow_pickle_weights: bool = flag(False)
    """Read pytorch_model.bin or *.pdparams if there are no safetensors files."""


def _run(options: ResizeOptions) -> int:
    output, allow_pickle = options.output, options.allow_pickle_weights
    require_empty(output)
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.model_config.model_folder import find_model_folder
    from oarlock.models.resize import resize_embedding

    model = find_model_folder(options.input, with_weights=True, allow_pickle=allow_pickle)
    resize_embedding(model, options.tokenizer, output, options.multiple_of, options.shard_bytes, allow_pickle)
    return 0


COMMAND = Command("resize", "Grow a model's embedding for a tokenizer with added tokens.", ResizeOptions, _run)
