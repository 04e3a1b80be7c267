"""Options of finetune_generation.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from oarlock.config.method import MethodSection
from oarlock.config.options import at_least, more_than, option
from oarlock.config.run_config import RunConfig
from oarlock.config.shared import DataSection, EvaluationSection
from oarlock.config.yaml_forms import format_blend, format_columns
from oarlock.files import holds_adapter


def _share_or_count(value: float) -> str | None:
    return None if value < 1 or value == int(value) else "must be a share below 1, or a whole number of examples"


@dataclass(frozen=True)
class FinetuneDataSection(DataSection):
    """Fine-tuning data"""

    LENGTH_OPTIONS: ClassVar[tuple[str, ...]] = ("src_length", "tgt_length")

    dataset_name_or_path: str | None = option(None, from_yaml=format_blend)
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .txt, also .gz or .zst), a folder with train and dev files, a
    dataset saved to disk, a hub name, or several of them as "w1 name1 w2 name2". Quote names that contain spaces; in
    YAML this may also be a list or a mapping. Default: the embedded instructions."""

    columns: str | None = option(None, from_yaml=format_columns)
    """Which columns to read as what, for example prompt=question,response=answer. Other columns are ignored."""

    validation_split: float | None = option(None, more_than(0), _share_or_count)
    """Hold out this fraction (below 1) or number of examples of each data set without a dev file. They are chosen by
    content and --seed, and never trained on."""

    data_format: str = option(
        "auto", choices=("auto", "src_tgt", "alpaca", "question_answer", "sharegpt", "messages", "text")
    )
    """Format of the records. auto detects it from the first record of each file."""

    data_cache_dir: str | None = option(None, may_change=True)
    """Cache folder for tokenised data. Default: ~/.cache/oarlock/finetune (or below $XDG_CACHE_HOME)."""

    src_length: int = option(128, at_least(1), unit="tokens")
    """Maximum length of the context (prompt). Longer ones are truncated at the start."""

    tgt_length: int = option(160, at_least(1), unit="tokens")
    """Maximum length of the generated text (answer). Longer ones are truncated at the end."""

    chat_template: str = option("auto")
    """auto (the tokenizer's own, otherwise alpaca for instruction records and plain for others), tokenizer, plain,
    alpaca, llama2, chatml, openassistant, or a Jinja file."""

    chat_template_name: str | None = option(None)
    """Which of the tokenizer's chat templates to use, if it has several. Default: "default", and "tool_use" for
    conversations with tools."""

    parse_special_tokens: bool = option(False)
    """Encode the names of special tokens in records as special tokens. Otherwise they are ordinary text."""

    instruction_generation: bool = option(False)
    """Instruction tuning: format records with the Alpaca prompt."""

    skip_bad: bool = option(False)
    """Skip malformed records and count them. Otherwise the first one stops the run."""

    packing: bool = option(False, aliases=("zero_padding",))
    """Pack several examples into each row instead of padding. The attention mask and the positions keep them apart. A
    sample then is a pack."""

    packing_length: int | None = option(None, at_least(1), unit="tokens")
    """Tokens per pack. Longer examples get a row of their own. Default: the length of the longest example."""

    @property
    def row_length(self) -> int:
        return max(self.sample_length, (self.packing_length or 0) if self.packing else 0)

    @property
    def is_packed(self) -> bool:
        return self.packing


@dataclass(frozen=True)
class FinetuneEvaluationSection(EvaluationSection):
    """Tasks and evaluation"""

    do_generation: bool = option(False, aliases=("eval_with_do_generation",), may_change=True)
    """Generate answers in evaluation and report exact match, BLEU and ROUGE."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything that `finetune_generation.py` can be asked for."""

    kind: ClassVar[Literal["pretrain", "finetune"]] = "finetune"
    varies_in_length: ClassVar[bool] = True

    data: FinetuneDataSection
    evaluation: FinetuneEvaluationSection
    method: MethodSection = field(metadata={"after": "data"})

    @property
    def method_section(self) -> MethodSection:
        return self.method

    @property
    def generates_answers(self) -> bool:
        return self.evaluation.do_generation

    @property
    def sequence_length(self) -> int:
        return self.data.row_length + (self.method.num_virtual_tokens if self.method.p_tuning else 0)

    def find_own_problems(self) -> Iterator[str]:
        method = self.method
        if self.data.packing_length is not None and not self.data.packing:
            yield f"--packing_length {self.data.packing_length} needs --packing"
        for name in ("prefix_tuning", "p_tuning"):
            if self.data.packing and getattr(method, name):
                what = "prefix" if name == "prefix_tuning" else "virtual tokens"
                yield (
                    f"--packing can't be combined with --{name}: all examples in a row would share the {what}. Drop "
                    "one of the two"
                )
        if len(method.chosen) > 1:
            yield f"{' and '.join(f'--{name}' for name in method.chosen)} can't be combined: choose one method"
        why = {
            "prefix_tuning": "pipeline stages don't accept keys and values from outside",
            "p_tuning": "only the first stage would have anything to train",
        }
        for name, reason in why.items():
            if getattr(method, name) and self.parallel.pipeline_parallel_degree > 1:
                yield (
                    f"--{name} can't be combined with --pipeline_parallel_degree: {reason}. Use --lora, or another "
                    "kind of parallelism"
                )
        if not method.merge_weights:
            return
        # A named adapter brings its own method (oarlock.train.start_from_adapter).
        names_adapter = method.adapter_name_or_path or holds_adapter(self.model.model_name_or_path)
        if not (method.lora or method.qlora or (not method.chosen and names_adapter)):
            yield "--merge_weights needs --lora or --qlora: only LoRA matrices can be merged into the base model"
        if not self.evaluation.do_train:
            yield "--merge_weights merges after training: add --do_train, or merge an adapter with `oarlock merge`"
