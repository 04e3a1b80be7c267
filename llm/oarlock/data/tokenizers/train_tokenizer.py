"""`oarlock data tokenizer`: train a tokenizer on text files, and measure it on text that it was not trained on."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.files.byte_streams import Source
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.files.text_readers import BadLine, parse_batch, read_batches
from oarlock.data.templates.builtin import BUILT_IN
from oarlock.data.templates.template_files import DEFAULT, save_templates
from oarlock.data.tokenizers.byte_level_bpe import NUM_BYTES, train_byte_level_bpe, write_tokenizer_folder
from oarlock.data.tokenizers.library_errors import convert_errors
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.data.tokenizers.vocabulary_files import QWEN2_WORDS, make_word_splitter
from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.errors import ConfigError, DataError
from oarlock.files import create_folder, require_empty

logger = get_logger(__name__)

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# Runs of digits in one word: Qwen2 has one, Llama 3 up to three.
DIGITS = {"one": r"\p{N}", "three": r"\p{N}{1,3}", "any": r"\p{N}+"}
_EVERY = 50  # one piece of so many is held out
_HELD_OUT, _COMPARED = 7, 8  # which of them, and the trained one that is measured too
_PIECES = 200  # into which a small text is split at least
_PIECE_LENGTH = (64, 1 << 14)  # characters
_MEASURED_BYTES = 8_000_000
_PACKED = 4  # estimate of text bytes per byte of a compressed or parquet file
_WORD = re.compile(r"[^\W\d_]+|[^\w\s]+")  # about the words of the splitter; those of digits are few or short
_WORD_SAMPLE = 64  # of the different words, one of so many is looked at
_BYTES_PER_BYTE = 150  # memory of the library per byte of different words; measured 140 to 200
_BATCH = 256  # pieces that are passed to the trainer at once


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of `oarlock data tokenizer`.

    Attributes:
        inputs: files and folders.
        output: folder to write.
        vocab_size: tokens, special ones included.
        special_tokens: the first one ends texts.
        chat: add the tokens and the template of ChatML.
        digits: a key of DIGITS.
        min_frequency: pairs of tokens that occur less often are not merged.
        max_bytes: text to train on. Of more text, evenly spaced pieces are taken.
        max_memory: bytes that training may take, which depends on how many different words there are.
        text_key, txt_document, skip_bad: as in BuildOptions.
    """

    inputs: tuple[str, ...]
    output: Path
    vocab_size: int
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    chat: bool = True
    digits: str = "one"
    min_frequency: int = 2
    max_bytes: int = 500_000_000
    max_memory: int = 8_000_000_000
    text_key: str = "text"
    txt_document: str = "file"
    skip_bad: bool = False


@dataclass
class MeasuredText:
    """Pieces of an input that are encoded to measure the tokenizer.

    Attributes:
        trained, held_out: pieces.
        trained_rate, held_out_rate: their bytes per token; 0 without a piece.
    """

    trained: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    trained_rate: float = 0.0
    held_out_rate: float = 0.0


@dataclass
class TokenizerReport:
    """The result of training a tokenizer.

    Attributes:
        tokens: in the vocabulary.
        bytes: of text that it was trained on.
        share: of the text that was read for training.
        inputs: input -> its measured pieces.
        bad_lines: that were skipped; first_bad is the first.
        left_out: files of the folders that were skipped.
    """

    tokens: int = 0
    bytes: int = 0
    share: float = 1.0
    seconds: float = 0.0
    inputs: dict[str, MeasuredText] = field(default_factory=dict)
    bad_lines: int = 0
    first_bad: BadLine | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    def describe(self, output: Path) -> Iterator[str]:
        """Yield lines for the console."""
        part = f" (about {self.share:.0%} of it)" if self.share < 1 else ""
        yield (
            f"{self.tokens:,} tokens, trained on {self.bytes / 1e6:,.1f} MB of text{part} in {self.seconds:.1f} s: "
            f"{output}"
        )
        width = max(map(len, self.inputs))
        yield f"{'bytes per token'.ljust(width)}  trained on  held out"
        for name, own in self.inputs.items():
            rates = (f"{rate:.2f}" if rate else "-" for rate in (own.trained_rate, own.held_out_rate))
            yield f"{name.ljust(width)}  {next(rates):>10}  {next(rates):>8}"
        yield "decoding gave back every held-out text"
        if self.bad_lines:
            yield f"{self.bad_lines:,} bad line(s) skipped; the first: {self.first_bad}"
        if self.left_out.count:
            yield self.left_out.text()


def train_tokenizer(options: TokenizerOptions) -> TokenizerReport:
    """Train a tokenizer and write its folder. The same text and options give the same files.

    Raises:
        ConfigError: for a vocabulary too small for the bytes and the special tokens, or wrong special tokens.
        DataError: for a bad line (file:line) unless skip_bad is set, text that is too small for the vocabulary,
            that would need too much memory, or that decoding does not give back. Nothing is left then.
    """
    special = (*options.special_tokens, *(CHAT_TOKENS if options.chat else ()))
    if not options.special_tokens or not all(special) or len(set(special)) < len(special):
        raise ConfigError(f"--special-tokens: {', '.join(map(repr, special))}: each has to be a different text")
    if options.vocab_size <= NUM_BYTES + len(special):
        raise ConfigError(
            f"--vocab-size {options.vocab_size:,}: it always has {NUM_BYTES} bytes and {len(special)} special "
            f"tokens, so it needs more than {NUM_BYTES + len(special)}"
        )
    require_empty(options.output)
    started = time.monotonic()
    report = TokenizerReport()
    splitter = make_word_splitter(QWEN2_WORDS.replace(r"|\p{N}|", f"|{DIGITS[options.digits]}|"))
    with convert_errors("the tokenizer could not be trained"):
        trained = train_byte_level_bpe(
            _read_for_training(options, report), options.vocab_size, special, splitter, options.min_frequency
        )
    report.tokens = trained.get_vocab_size()
    if report.tokens < options.vocab_size:
        raise DataError(
            f"--vocab-size {options.vocab_size:,}: {report.bytes / 1e6:,.2f} MB of text give only {report.tokens:,} "
            f"tokens of pairs that occur {options.min_frequency} times. Give more text, or --vocab-size "
            f"{report.tokens}, or a smaller --min-frequency"
        )
    with create_folder(options.output.resolve()) as folder:
        write_tokenizer_folder(folder, trained.to_str(pretty=False), special[0], None, special[1:])
        if options.chat:
            save_templates(folder, {DEFAULT: BUILT_IN["chatml"]})
        _measure(folder, report)
    report.seconds = time.monotonic() - started
    return report


def _read_for_training(options: TokenizerOptions, report: TokenizerReport) -> Iterator[list[str]]:
    """Yield pieces to train on, and put those that are measured into the report."""
    found = ((name, own) for name in options.inputs for own in find_sources([name], report.left_out))
    sources = {own.path.resolve(): (name, own) for name, own in found}
    total = sum(source.size for _, source in sources.values())
    packed = sum(own.size for _, own in sources.values() if own.compression or own.format == "parquet")
    text_bytes = total + (_PACKED - 1) * packed
    report.share = min(1.0, options.max_bytes / max(1, text_bytes))
    least, most = _PIECE_LENGTH
    length = min(max(text_bytes // _PIECES, least), most)
    measured_bytes, number, batch, words = 0, 0, list[str](), _WordSample()
    with make_progress_bar(total, "read and count words", "B", unit_scale=True) as bar:
        for name, source in sources.values():
            own = report.inputs.setdefault(name, MeasuredText())
            for text, consumed in _read_texts(source, options, report):
                bar.update(consumed)
                for piece in split_into_pieces(text, length):
                    number += 1
                    if int(number * report.share) == int((number - 1) * report.share):
                        continue
                    size, turn = len(piece.encode()), int(number * report.share) % _EVERY
                    if turn in (_HELD_OUT, _COMPARED) and measured_bytes < _MEASURED_BYTES:
                        measured_bytes += size
                        (own.held_out if turn == _HELD_OUT else own.trained).append(piece)
                        if turn == _HELD_OUT:
                            continue
                    report.bytes += size
                    words.add(piece)
                    if words.count_memory() > options.max_memory:
                        raise _explain_memory(options, report)
                    batch.append(piece)
                    if len(batch) == _BATCH:
                        yield batch
                        batch = []
    if batch:
        yield batch
    logger.info(f"{report.bytes / 1e6:,.1f} MB of text read; merging pairs of tokens")


class _WordSample:
    """Estimates the memory of training by a sample of the different words. It does not depend on the machine."""

    def __init__(self) -> None:
        self._words: set[bytes] = set()
        self._bytes = 0

    def add(self, text: str) -> None:
        for word in {word.encode() for word in _WORD.findall(text)} - self._words:
            if zlib.crc32(word) % _WORD_SAMPLE == 0:
                self._words.add(word)
                self._bytes += len(word)

    def count_memory(self) -> int:
        return self._bytes * _WORD_SAMPLE * _BYTES_PER_BYTE


def _explain_memory(options: TokenizerOptions, report: TokenizerReport) -> DataError:
    return DataError(
        f"the first {report.bytes / 1e6:,.1f} MB have so many different words that training would take more than "
        f"{options.max_memory / 1e9:g} GB of memory, as in languages that are written without spaces. Train on evenly "
        f"spaced pieces (--max-megabytes {max(1, round(report.bytes * 0.8e-6))}), or raise --max-memory"
    )


def _read_texts(source: Source, options: TokenizerOptions, report: TokenizerReport) -> Iterator[tuple[str, int]]:
    """Yield (text, bytes read since the last text)."""
    # Long texts may be split anywhere: a splitter for which bytes are the tokens finds the first white space.
    splitter = TextSplitter(lambda texts: [list(text.encode()) for text in texts])
    for batch in read_batches(source, splitter, options.text_key, options.txt_document):
        consumed = batch.consumed
        for item in parse_batch(batch, options.text_key, options.txt_document):
            if not isinstance(item, BadLine):
                yield item.text, consumed
                consumed = 0
                continue
            if not options.skip_bad:
                raise DataError(f"{item}\nNothing was written. Use --skip-bad to skip such lines.")
            report.bad_lines += 1
            report.first_bad = report.first_bad or item


def split_into_pieces(text: str, length: int) -> Iterator[str]:
    """Split a text into pieces of about `length` characters, after a line or before a space where there is one."""
    start = 0
    while len(text) - start > length:
        line, space = text.rfind("\n", start, start + length) + 1, text.rfind(" ", start + 1, start + length)
        end = line if line > start else space if space > start else start + length
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _measure(folder: Path, report: TokenizerReport) -> None:
    """Measure the written tokenizer.

    Raises:
        DataError: for a held-out text that decoding does not give back.
    """
    tokenizer = load_tokenizer(str(folder))
    for name, own in report.inputs.items():
        rates = []
        for pieces in (own.trained, own.held_out):
            rows = tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
            for piece, row in zip(pieces, rows, strict=True):
                if tokenizer.decode(row) != piece:
                    raise DataError(f"{name}: the tokenizer does not give back a text that begins {piece[:60]!r}")
            rates.append(sum(len(piece.encode()) for piece in pieces) / max(1, sum(map(len, rows))))
        own.trained_rate, own.held_out_rate = rates
