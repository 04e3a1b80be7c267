"""Every option of the two entrypoints, in typed sections: those of one of them here, those of both in sections.py.

Names are the published ones (PaddleNLP's TrainingArguments and scripts), so that commands in people's shell history
keep their meaning. Each option stands with its check; rules that span options are in rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.config.options import at_least, between, more_than, option
from oarlock.config.sections import (
    BatchSection,
    CheckpointSection,
    EvaluationSection,
    KernelSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    RuntimeSection,
    ScheduleSection,
)
from oarlock.config.yaml_forms import blend_text, columns_text


def _share_or_count(value: float) -> str | None:
    return None if value < 1 or value == int(value) else "must be a share below 1, or a whole number of examples"


@dataclass(frozen=True)
class PretrainModelSection(ModelSection):
    """The model"""

    continue_training: bool = option(False)
    """Start from the released weights; otherwise from random ones with the model's configuration."""

    hidden_size: int | None = option(None, at_least(1))
    """From scratch only: width of the model, in place of the configuration's."""

    intermediate_size: int | None = option(None, at_least(1))
    """From scratch only: width of the feed-forward layers."""

    num_hidden_layers: int | None = option(None, at_least(1))
    """From scratch only: number of transformer layers."""

    num_attention_heads: int | None = option(None, at_least(1))
    """From scratch only: number of query heads."""

    num_key_value_heads: int | None = option(None, at_least(1))
    """From scratch only: number of key/value heads (grouped-query attention)."""

    vocab_size: int | None = option(None, at_least(1), unit="tokens")
    """From scratch only: rows of the embedding."""


@dataclass(frozen=True)
class PretrainDataSection:
    """Pretraining data"""

    input_dir: str | None = option(None, from_yaml=blend_text)
    """Folder of .bin/.idx files (see `oarlock data pretrain`), one prefix, or "w1 prefix1 w2 prefix2" to blend (names
    with spaces in quotes; in YAML a list or a mapping too). Not given: the embedded text, the Python standard
    library."""

    allow_other_tokenizer: bool = option(False, may_change=True)
    """Go on with a corpus that was made with another tokenizer, where its ids are known to be this one's."""

    split: str = option("949,50,1")
    """Shares of the documents for training, evaluation and test, for example 949,50,1."""

    max_seq_length: int = option(1024, at_least(2), unit="tokens")
    """Length of a training sequence."""


@dataclass(frozen=True)
class FinetuneDataSection:
    """Fine-tuning data"""

    dataset_name_or_path: str | None = option(None, from_yaml=blend_text)
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .txt, also .gz or .zst), a folder with train and dev files, a
    dataset saved to disk, a hub name, or several of them as "w1 name1 w2 name2" (names with spaces in quotes; in YAML a
    list or a mapping too). Not given: the embedded instructions."""

    columns: str | None = option(None, from_yaml=columns_text)
    """Which field or column holds what, for example prompt=question,response=answer; others are not read then."""

    validation_split: float | None = option(None, more_than(0), _share_or_count)
    """Hold out a share (below 1) or so many examples of each data set that has no dev file; chosen by content and
    --seed, never trained on."""

    data_format: str = option(
        "auto", choices=("auto", "src_tgt", "alpaca", "question_answer", "sharegpt", "messages", "text")
    )
    """Form of the records; auto looks at the first one of each file."""

    data_cache_dir: str | None = option(None, may_change=True)
    """Where tokenised data is kept between runs. Not given: ~/.cache/oarlock/finetune (or below $XDG_CACHE_HOME)."""

    src_length: int = option(128, at_least(1), unit="tokens")
    """Longest context (prompt); longer ones lose their beginning."""

    tgt_length: int = option(160, at_least(1), unit="tokens")
    """Longest generated text (answer); longer ones lose their end."""

    chat_template: str = option("auto")
    """auto (the tokenizer's own, else alpaca for instruction records, else plain), tokenizer, plain, alpaca, llama2,
    chatml, openassistant, or a Jinja file."""

    chat_template_name: str | None = option(None)
    """Which of the tokenizer's chat templates, where it has several. Not given: default, and tool_use for conversations
    with tools."""

    parse_special_tokens: bool = option(False)
    """Special tokens that stand in records as words are special; otherwise they are text."""

    instruction_generation: bool = option(False)
    """Instruction tuning: records are put into the Alpaca prompt."""

    skip_bad: bool = option(False)
    """Leave malformed records out and count them; otherwise the first one stops the run."""

    packing: bool = option(False, aliases=("zero_padding",))
    """Several examples in a row in place of padding, kept apart by mask and positions. Samples then are packs."""

    packing_length: int | None = option(None, at_least(1), unit="tokens")
    """Tokens of a pack; longer examples go alone. Default: the length of the longest example."""


@dataclass(frozen=True)
class FinetuneEvaluationSection(EvaluationSection):
    """What to do, and evaluation"""

    do_generation: bool = option(False, aliases=("eval_with_do_generation",), may_change=True)
    """Call model.generate in evaluation and report exact match, BLEU and ROUGE."""


@dataclass(frozen=True)
class MethodSection:
    """Fine-tuning method"""

    lora: bool = option(False)
    """Train low-rank matrices beside the weights (LoRA)."""

    r: int = option(8, at_least(1), aliases=("lora_rank",))
    """LoRA rank."""

    lora_alpha: float | None = option(None, more_than(0))
    """LoRA scaling times its rank (or the root of it, with rslora); default: 2 r, and 4 with rslora."""

    lora_dropout: float = option(0.0, between(0, 1))
    """Dropout before the low-rank matrices."""

    lora_target_modules: str | None = option(None)
    """Linear layers that get LoRA, by the last part of their names, separated by commas; default: all in the
    transformer layers."""

    rslora: bool = option(False)
    """Scale LoRA by alpha / sqrt(r) instead of alpha / r (rsLoRA)."""

    lora_plus_scale: float = option(1.0, more_than(0))
    """Learning rate of LoRA's B over that of A (LoRA+)."""

    qlora: bool = option(False)
    """LoRA on a base whose linear layers are kept in 4 bits (QLoRA)."""

    weight_quantize_algo: str = option("nf4", choices=("nf4", "fp4"))
    """Type of QLoRA's 4 bits: NormalFloat, or floating point."""

    qlora_weight_blocksize: int = option(64, at_least(2))
    """Weights that share a scale under QLoRA."""

    qlora_weight_double_quant: bool = option(True)
    """Keep QLoRA's scales in 8 bits (double quantisation)."""

    prefix_tuning: bool = option(False)
    """Train a prefix of keys and values in every layer."""

    num_prefix_tokens: int = option(64, at_least(1), unit="tokens")
    """Length of the prefix."""

    p_tuning: bool = option(False)
    """Train virtual tokens before the text, made by a small encoder (p-tuning)."""

    num_virtual_tokens: int = option(32, at_least(1), unit="tokens")
    """Virtual tokens of p-tuning."""

    p_tuning_encoder: str = option("lstm", choices=("lstm", "mlp"))
    """What makes the virtual tokens: a bidirectional LSTM with an MLP, or an MLP alone."""

    p_tuning_hidden_size: int | None = option(None, at_least(1))
    """Width of that encoder; default: the model's."""

    adapter_name_or_path: str | None = option(None)
    """Folder of an adapter that an earlier run saved: train it further, or only evaluate it. Method and settings are
    taken from it where they are not given. --model_name_or_path may name the adapter too, without its base."""

    merge_weights: bool = option(False)
    """Merge the base model and the LoRA weights at the end, into output_dir/merged."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything `run_pretrain.py` was asked for."""

    model: PretrainModelSection
    data: PretrainDataSection
    batch: BatchSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    precision: PrecisionSection
    kernels: KernelSection
    parallel: ParallelSection
    runtime: RuntimeSection


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything `finetune_generation.py` was asked for."""

    model: ModelSection
    data: FinetuneDataSection
    method: MethodSection
    batch: BatchSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    evaluation: FinetuneEvaluationSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    precision: PrecisionSection
    kernels: KernelSection
    parallel: ParallelSection
    runtime: RuntimeSection


Config = PretrainConfig | FinetuneConfig
