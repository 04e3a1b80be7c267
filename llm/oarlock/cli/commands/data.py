"""`oarlock data`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from oarlock.api.data import train_tokenizer
from oarlock.cli.flags import Command, CommandGroup, config_flag, flag, positional
from oarlock.config.finetune import FinetuneDataSection
from oarlock.config.options import at_least
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import count_available_cores
from oarlock.environment.paddle_import import import_paddle

logger = get_logger(__name__)


# pretrain


@dataclass(frozen=True, kw_only=True)
class PretrainDataOptions:
    """Options of `oarlock data pretrain`."""

    input: tuple[str, ...] = flag(metavar="PATH", several=True)
    """txt, jsonl, json, csv, tsv or parquet files (also .gz, .zst), or folders of them."""
    tokenizer: str = flag(metavar="DIR")
    """Tokenizer folder or hub name."""
    output_prefix: str = flag(metavar="P")
    """Writes P.bin, P.idx and P.json."""
    workers: int = flag(count_available_cores())
    """Processes. By default one for each core."""
    text_key: str = flag("text", metavar="KEY")
    """JSON field or column with the text."""
    txt_document: str = flag("file", choices=("file", "line"))
    """What counts as one document of a .txt file."""
    skip_bad: bool = flag(False)
    """Count malformed lines and continue instead of stopping at the first."""
    overwrite: bool = flag(False)
    """Replace an existing corpus."""
    parse_special_tokens: bool = flag(False)
    """Special tokens that are spelled out in a text become special tokens. By default they are plain text."""


def _pretrain(options: PretrainDataOptions) -> int:
    from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus

    build = BuildOptions(
        inputs=options.input,
        tokenizer=options.tokenizer,
        output_prefix=options.output_prefix,
        workers=max(1, options.workers),
        text_key=options.text_key,
        txt_document=options.txt_document,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
        parse_special_tokens=options.parse_special_tokens,
    )
    for line in build_corpus(build).describe(options.output_prefix):
        logger.info(line)
    return 0


# tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerDataOptions:
    """Options of `oarlock data tokenizer`."""

    input: tuple[str, ...] = flag(metavar="PATH", several=True)
    """txt, jsonl, json, csv, tsv or parquet files (also .gz, .zst), or folders of them."""
    vocab_size: int = flag(metavar="N")
    """Tokens of the tokenizer, the 256 bytes and the special tokens included."""
    output: Path = flag(metavar="DIR")
    """Folder to write. It must not exist yet."""
    special_tokens: tuple[str, ...] = flag(("<|endoftext|>",), metavar="TOKEN", several=True)
    """Special tokens. The first one ends texts. Default: <|endoftext|>"""
    chat: bool = flag(True)
    """Leave out <|im_start|>, <|im_end|> and the chat template (ChatML)."""
    digits: str = flag("one", choices=("one", "three", "any"))
    """Digits that a token may hold: one (as Qwen), up to three (as Llama 3), or any number."""
    min_frequency: int = flag(2, at_least(1))
    """Pairs of tokens that occur less often are not merged."""
    max_megabytes: float = flag(500.0, at_least(0.001), metavar="MB")
    """Text to train on. Of more text, evenly spaced pieces are taken."""
    max_memory: float = flag(8.0, at_least(0.001), metavar="GB")
    """Memory that training may take. Text with too many different words for it is refused."""
    text_key: str = flag("text", metavar="KEY")
    """JSON field or column with the text."""
    txt_document: str = flag("file", choices=("file", "line"))
    """What counts as one document of a .txt file."""
    skip_bad: bool = flag(False)
    """Count malformed lines and continue instead of stopping at the first."""


def _tokenizer(options: TokenizerDataOptions) -> int:
    report = train_tokenizer(
        options.input,
        options.vocab_size,
        options.output,
        special_tokens=options.special_tokens,
        chat=options.chat,
        digits=cast(Any, options.digits),
        min_frequency=options.min_frequency,
        max_megabytes=options.max_megabytes,
        max_memory=options.max_memory,
        text_key=options.text_key,
        txt_document=cast(Any, options.txt_document),
        skip_bad=options.skip_bad,
    )
    for line in report.describe(options.output):
        logger.info(line)
    return 0


# show and check


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Options of the configuration that say how fine-tuning data is read."""

    src_length: int = config_flag(FinetuneDataSection, "src_length")
    tgt_length: int = config_flag(FinetuneDataSection, "tgt_length")
    chat_template: str = config_flag(FinetuneDataSection, "chat_template", "NAME")
    chat_template_name: str | None = config_flag(FinetuneDataSection, "chat_template_name", "NAME")
    parse_special_tokens: bool = config_flag(FinetuneDataSection, "parse_special_tokens")
    data_format: str = config_flag(FinetuneDataSection, "data_format")
    columns: str | None = config_flag(FinetuneDataSection, "columns", "F=C,...")
    instruction_generation: bool = config_flag(FinetuneDataSection, "instruction_generation")

    def to_section(self, path: str | None, **more: Any) -> FinetuneDataSection:
        """These options as a section of the configuration."""
        values = {item.name: getattr(self, item.name) for item in fields(RecordOptions)}
        return FinetuneDataSection(dataset_name_or_path=path, skip_bad=True, **values, **more)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(RecordOptions):
    """Options of `oarlock data show`."""

    path: str | None = positional(None)
    """Corpus prefix or folder, or fine-tuning file or folder. Default: the embedded instructions."""
    tokenizer: str = flag(metavar="DIR")
    """Tokenizer folder or hub name."""
    num: int = flag(3, at_least(1))
    """Number of examples."""
    max_seq_length: int = flag(128, at_least(1))
    """Tokens of a pretraining sample."""
    color: str = flag("auto", choices=("auto", "always", "never"))
    """When to use colors. auto: on a terminal."""


def _show(options: ShowOptions) -> int:
    import_paddle()
    from oarlock.data.examples.preview import show_data

    show_data(
        options.to_section(options.path),
        options.tokenizer,
        num=options.num,
        max_seq_length=options.max_seq_length,
        color=options.color == "always" or (options.color == "auto" and sys.stdout.isatty()),
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions(RecordOptions):
    """Options of `oarlock data check`."""

    path: str | None = positional(None)
    """Fine-tuning file, folder or hub name. Default: the embedded instructions."""
    tokenizer: str = flag(metavar="DIR")
    """Tokenizer folder or hub name."""
    histogram: str | None = flag(None, metavar="FILE")
    """Draw the lengths into this file (.svg, .png or .pdf)."""
    data_cache_dir: str | None = config_flag(FinetuneDataSection, "data_cache_dir", "DIR")


def _check(options: CheckOptions) -> int:
    import_paddle()
    from oarlock.data.examples.inspect import check_data

    section = options.to_section(options.path, data_cache_dir=options.data_cache_dir)
    return check_data(section, options.tokenizer, options.histogram)


# embedded


@dataclass(frozen=True, kw_only=True)
class EmbeddedOptions:
    """Options of `oarlock data embedded`."""

    output: str = flag(metavar="DIR")
    """Folder to write."""
    vocab_size: int = flag(4096, at_least(1))
    """Tokens of the tokenizer."""


def _embedded(options: EmbeddedOptions) -> int:
    from oarlock.data.embedded.prepare import prepare_embedded

    prepare_embedded(options.output, options.vocab_size)
    return 0


COMMAND = CommandGroup(
    "data",
    "Make and inspect training data.",
    (
        Command("pretrain", "Tokenize text into a .bin/.idx corpus for pretraining.", PretrainDataOptions, _pretrain),
        Command("tokenizer", "Train a tokenizer on your own text.", TokenizerDataOptions, _tokenizer),
        Command("show", "Decode examples and show which tokens are trained on.", ShowOptions, _show),
        Command(
            "check",
            "Report on fine-tuning data: lengths, truncation, duplicates, malformed records.",
            CheckOptions,
            _check,
        ),
        Command(
            "embedded",
            "Write the embedded tokenizer, corpus and instructions (no download).",
            EmbeddedOptions,
            _embedded,
        ),
    ),
)
