"""`oarlock data pretrain`: tokenize text files to .bin/.idx, in parallel and in constant memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from oarlock.data.corpus.index_format import CorpusWriter, list_existing_files
from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.files.byte_streams import Source
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.files.text_readers import BadLine, Batch, TextChunk, parse_batch, read_batches
from oarlock.data.tokenizers.load import Encoder, load_encoder
from oarlock.environment.console import make_progress_bar
from oarlock.environment.signals import defer_sigterm, die_with_parent, stop_if_terminated
from oarlock.errors import DataError, OarlockError

_MAX_SHOWN_BAD_LINES = 5


@dataclass(frozen=True)
class BuildOptions:
    """Options of `oarlock data pretrain`.

    Attributes:
        inputs: files and folders.
        tokenizer: folder or hub name.
        output_prefix: the corpus is output_prefix.bin, .idx and .json.
        workers: number of processes that encode.
        text_key: JSON field, or column of a table or parquet file, with the text.
        txt_document: the unit of a document in a .txt file, "file" or "line".
        skip_bad: skip and count bad lines. By default the first one stops the build.
        overwrite: replace an existing corpus at output_prefix.
        parse_special_tokens: whether special tokens that a text spells become those tokens; if not, they are text.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    workers: int = 1
    text_key: str = "text"
    txt_document: str = "file"
    skip_bad: bool = False
    overwrite: bool = False
    parse_special_tokens: bool = False


@dataclass
class BuildReport:
    """The result of a build.

    Attributes:
        documents, tokens: in the corpus. The tokens include one EOS per document.
        files, bytes: of the input (bytes on disk).
        bad_lines: invalid lines that were skipped (skip_bad); first_bad are the first ones.
        empty: number of texts and files without a character (or without a token).
        unsure_cuts: splits of long texts where ids may differ from those of the unsplit text
            (oarlock.data.corpus.text_chunks).
        spelled: documents that spell special tokens. With `parsed` they became those tokens, else they are text.
        left_out: files of the folders that were skipped.
    """

    documents: int = 0
    tokens: int = 0
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bad_lines: int = 0
    empty: int = 0
    unsure_cuts: int = 0
    spelled: int = 0
    parsed: bool = False
    first_bad: list[BadLine] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def describe(self, prefix: str) -> Iterator[str]:
        """Yield lines for the console."""
        rate = self.bytes / 1e6 / max(1e-9, self.seconds)
        yield (
            f"{self.documents:,} documents, {self.tokens:,} tokens from {self.files:,} file(s), "
            f"{self.bytes / 1e6:,.1f} MB, in {self.seconds:.1f} s ({rate:.2f} MB/s): {prefix}.bin"
        )
        if self.bad_lines:
            shown = "".join(f"\n  {line}" for line in self.first_bad)
            yield f"{self.bad_lines:,} bad line(s) skipped:{shown}"
        if self.empty:
            yield f"{self.empty:,} empty text(s) skipped"
        if self.spelled:
            spell = "1 document spells" if self.spelled == 1 else f"{self.spelled:,} documents spell"
            became = "they became those tokens" if self.parsed else "they are text"
            yield f"{spell} special tokens; {became} (--parse-special-tokens)"
        if self.unsure_cuts:
            yield (
                f"long texts without word boundaries were split at {self.unsure_cuts:,} place(s), where the ids may "
                "differ from those of the unsplit text"
            )
        if self.left_out.count:
            yield self.left_out.text()

    def to_json(self) -> dict[str, object]:
        """Return the counts for the .json file of the corpus, besides those of its writer."""
        return {
            "files": self.files,
            "input_bytes": self.bytes,
            "bad_lines_skipped": self.bad_lines,
            "empty_texts": self.empty,
            "unsure_cuts": self.unsure_cuts,
            "documents_that_spell_special_tokens": self.spelled,
            "special_tokens_parsed": self.parsed,
            "files_left_out": dict(self.left_out.reasons),
        }


@dataclass
class _Encoded:
    ids: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    spelled: list[bool]
    bad: list[BadLine]
    num_bad: int
    empty: int
    unsure_cuts: int
    where: str
    consumed: int


def build_corpus(options: BuildOptions) -> BuildReport:
    """Tokenize the inputs and write the corpus.

    Raises:
        DataError: for a bad line (file:line) unless skip_bad is set, or an existing corpus unless overwrite is.
            No output is left then, and existing files are unchanged.
        ModelError: if the tokenizer can't be loaded.
    """
    there = list_existing_files(options.output_prefix)
    if there and not options.overwrite:
        raise DataError(
            f"{', '.join(map(str, there))}: already there; choose another --output-prefix, or replace "
            "the corpus with --overwrite"
        )
    left_out = LeftOut()
    return build_from_sources(find_sources(options.inputs, left_out), options, left_out)


def build_from_sources(sources: list[Source], options: BuildOptions, left_out: LeftOut | None = None) -> BuildReport:
    """Build a corpus from chosen sources (the embedded text consists of .py files)."""
    started = time.monotonic()
    encoder = load_encoder(options.tokenizer, options.parse_special_tokens)
    size = sum(source.size for source in sources)
    report = BuildReport(files=len(sources), bytes=size, left_out=left_out or LeftOut())
    report.parsed = options.parse_special_tokens
    report.empty = sum(not source.size for source in sources)
    splitter = TextSplitter(encoder.encode)
    batches = (
        batch
        for source in sources
        if source.size
        for batch in read_batches(source, splitter, options.text_key, options.txt_document)
    )
    with (
        defer_sigterm(),
        CorpusWriter(options.output_prefix, encoder.vocab_size) as writer,
        make_progress_bar(report.bytes, "tokenise", "B", unit_scale=True) as bar,
    ):
        of_this = False  # whether the current document spells a special token
        for encoded in _encode_all(batches, encoder, options):
            stop_if_terminated()
            report.bad_lines += encoded.num_bad
            report.empty += encoded.empty
            report.unsure_cuts += encoded.unsure_cuts
            for spelled, end in zip(encoded.spelled, encoded.ends, strict=True):
                of_this |= spelled
                report.spelled += of_this and bool(end)
                of_this &= not end
            report.first_bad += encoded.bad[: _MAX_SHOWN_BAD_LINES - len(report.first_bad)]
            if encoded.num_bad and not options.skip_bad:
                raise DataError(f"{encoded.bad[0]}\nNothing was written. Use --skip-bad to skip such lines.")
            try:
                writer.add(encoded.ids, encoded.sizes, encoded.ends)
            except DataError as error:
                raise DataError(f"{encoded.where}: {error}") from error
            bar.update(encoded.consumed)
        report.unsure_cuts += splitter.unsure
        about = {
            "tokenizer": options.tokenizer,
            "tokenizer_fingerprint": encoder.fingerprint,
            "vocab_size": encoder.vocab_size,
        }
        writer.finish(about | report.to_json())
        report.documents, report.tokens = writer.num_documents, writer.num_tokens
    report.seconds = time.monotonic() - started
    return report


def _encode_all(batches: Iterable[Batch], encoder: Encoder, options: BuildOptions) -> Iterator[_Encoded]:
    """Encode batches in order, with at most two in flight per worker, so that memory stays constant."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    if options.workers <= 1:
        for batch in batches:
            yield _encode(batch, encoder, options)
        return
    # Workers inherit the encoder by fork. Without fork, each loads its own.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux" else "spawn"
    _Worker.encoder = encoder if method == "fork" else None
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(options.workers, context, initializer=_Worker.start, initargs=(options,))
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_Worker.encode, batch))
            if len(waiting) > 2 * options.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenizer process died (killed, or out of memory); nothing was written") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """State of one worker process."""

    encoder: Encoder | None = None
    options: BuildOptions

    @classmethod
    def start(cls, options: BuildOptions) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        die_with_parent()
        cls.options = options
        cls.encoder = cls.encoder or load_encoder(options.tokenizer, options.parse_special_tokens)

    @classmethod
    def encode(cls, batch: Batch) -> _Encoded:
        assert cls.encoder is not None
        return _encode(batch, cls.encoder, cls.options)


def _encode(batch: Batch, encoder: Encoder, options: BuildOptions) -> _Encoded:
    found: list[TextChunk] = []
    bad: list[BadLine] = []
    num_bad = empty = 0
    for item in parse_batch(batch, options.text_key, options.txt_document):
        if isinstance(item, BadLine):
            num_bad += 1
            if len(bad) < _MAX_SHOWN_BAD_LINES:
                bad.append(item)
        elif item.text:
            found.append(item)
        else:
            empty += 1
    splitter = TextSplitter(encoder.encode)
    parts = [splitter.split_text(item.text) for item in found]
    where = f"{batch.source.path}: text from line {batch.first_line} on"
    try:
        all_rows, all_spelled = encoder.encode_and_flag([text for texts in parts for text in texts])
        rows, spells_special = iter(all_rows), iter(all_spelled)
    except OarlockError:
        raise
    except Exception as error:  # tokenizers raise plain Exception
        raise DataError(f"{where}: the tokenizer failed: {type(error).__name__}: {error}") from error
    eos = np.asarray([encoder.eos_id], dtype=np.int32)
    ids: list[np.ndarray] = []
    sizes, ends, spelled = [], [], []
    for item, texts in zip(found, parts, strict=True):
        row = np.concatenate(list(itertools.islice(rows, len(texts))))
        spells = any(list(itertools.islice(spells_special, len(texts))))
        if not len(row) and item.begins_document and item.ends_document:
            empty += 1
            continue
        row = np.concatenate((row, eos)) if item.ends_document else row
        if len(row):
            ids.append(row)
            sizes.append(len(row))
            ends.append(item.ends_document)
            spelled.append(spells)
    return _Encoded(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.asarray(sizes, np.int32),
        np.asarray(ends, bool),
        spelled,
        bad,
        num_bad,
        empty,
        splitter.unsure,
        where,
        batch.consumed,
    )
