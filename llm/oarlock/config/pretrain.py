"""Options of run_pretrain.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from oarlock.config.options import at_least, option
from oarlock.config.run_config import RunConfig
from oarlock.config.shared import DataSection, ModelSection
from oarlock.config.yaml_forms import format_blend

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)


@dataclass(frozen=True)
class PretrainModelSection(ModelSection):
    """The model"""

    continue_training: bool = option(False)
    """Start from the model's weights. Otherwise weights are initialised at random, with the model's configuration."""

    hidden_size: int | None = option(None, at_least(1))
    """From scratch only: hidden size. Default: the configuration's, as for the sizes below."""

    intermediate_size: int | None = option(None, at_least(1))
    """From scratch only: hidden size of the feed-forward layers."""

    num_hidden_layers: int | None = option(None, at_least(1))
    """From scratch only: number of transformer layers."""

    num_attention_heads: int | None = option(None, at_least(1))
    """From scratch only: number of query heads."""

    num_key_value_heads: int | None = option(None, at_least(1))
    """From scratch only: number of key/value heads (grouped-query attention)."""

    vocab_size: int | None = option(None, at_least(1), unit="tokens")
    """From scratch only: vocabulary size."""

    @property
    def sizes(self) -> dict[str, int]:
        return {name: value for name in _SIZES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class PretrainDataSection(DataSection):
    """Pretraining data"""

    LENGTH_OPTIONS: ClassVar[tuple[str, ...]] = ("max_seq_length",)

    input_dir: str | None = option(None, from_yaml=format_blend)
    """Folder of .bin/.idx files (see `oarlock data pretrain`), one file prefix, or "w1 prefix1 w2 prefix2" to blend
    several. Quote names that contain spaces; in YAML this may also be a list or a mapping. Default: the embedded
    corpus, the source code of the Python standard library."""

    allow_other_tokenizer: bool = option(False, may_change=True)
    """Accept a corpus that was tokenised by another tokenizer. Use this only if both have the same ids."""

    split: str = option("949,50,1")
    """Shares of the documents for training, evaluation and test, for example 949,50,1."""

    max_seq_length: int = option(1024, at_least(2), unit="tokens")
    """Length of a training sequence."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that `run_pretrain.py` can be asked for."""

    kind: ClassVar[Literal["pretrain", "finetune"]] = "pretrain"
    varies_in_length: ClassVar[bool] = False

    model: PretrainModelSection
    data: PretrainDataSection

    def find_own_problems(self) -> Iterator[str]:
        split = self.data.split
        try:
            train, evaluation, _ = parse_split(split)
        except ValueError as error:
            yield f"--split {split} {error}"
        else:
            if self.evaluation.do_train and train == 0:
                yield f"--split {split} leaves no documents for training, which --do_train asks for"
            if self.evaluation.do_eval and evaluation == 0:
                yield f"--split {split} leaves no documents for evaluation, which --do_eval asks for"
        if self.model.continue_training:
            for name in self.model.sizes:
                yield f"--{name} can't be combined with --continue_training: it would not fit the loaded weights"


def parse_split(text: str) -> tuple[float, float, float]:
    """Parse shares such as "949,50,1" or "949/50/1" to (train, evaluation, test), normalised to a sum of 1.

    Raises:
        ValueError: the text is malformed; the message continues a sentence that begins with the text.
    """
    words = text.replace("/", ",").split(",")
    if len(words) > 3:
        raise ValueError("has more than three parts (train, evaluation, test)")
    try:
        parts = [float(word) for word in words] + [0.0] * (3 - len(words))
    except ValueError:
        raise ValueError("must be numbers separated by commas, for example 949,50,1") from None
    if min(parts) < 0 or not 0 < sum(parts) < float("inf"):
        raise ValueError("must be shares >= 0 with a sum above 0")
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total
