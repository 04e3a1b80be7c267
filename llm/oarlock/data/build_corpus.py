"""`oarlock data pretrain`: text files -> .bin/.idx, in parallel, in memory that does not grow with the input."""

from __future__ import annotations

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

from oarlock.data.corpus_format import CorpusWriter
from oarlock.data.readers import BadLine, Batch, Piece, Source, find_sources, parse_batch, read_batches
from oarlock.data.tokenizers import Encoder, load_encoder
from oarlock.environment import deferred_sigterm, die_with_parent, progress_bar, stop_if_terminated
from oarlock.errors import DataError, OarlockError

_SHOWN_BAD_LINES = 5


@dataclass(frozen=True)
class BuildOptions:
    """What `oarlock data pretrain` was asked for.

    Attributes:
        inputs: files and folders.
        tokenizer: folder or hub name.
        output_prefix: the corpus is output_prefix.bin, .idx and .json.
        workers: processes that encode.
        text_key: JSON field or parquet column with the text.
        txt_document: what a document of a .txt file is, "file" or "line".
        skip_bad: leave bad lines out and count them, in place of stopping at the first.
        parse_special_tokens: a special token that a text spells becomes that token; else it is text.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    workers: int = 1
    text_key: str = "text"
    txt_document: str = "file"
    skip_bad: bool = False
    parse_special_tokens: bool = False


@dataclass
class BuildReport:
    """What came of it. `bytes` counts the input files as they lie on disk, `spelled` documents with special tokens."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bad_lines: int = 0
    empty: int = 0
    spelled: int = 0
    first_bad: list[BadLine] = field(default_factory=list)


@dataclass
class _Encoded:
    ids: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    bad: list[BadLine]
    num_bad: int
    empty: int
    consumed: int
    spelled: int


def build_corpus(options: BuildOptions) -> BuildReport:
    """Tokenise the inputs and write the corpus.

    Raises:
        DataError: for a bad line (file:line), unless skip_bad; nothing of the output remains then.
        ModelError: when the tokenizer can't be loaded.
    """
    return build_from_sources(find_sources(options.inputs), options)


def build_from_sources(sources: list[Source], options: BuildOptions) -> BuildReport:
    """build_corpus for files already chosen (the embedded text is .py files)."""
    started = time.monotonic()
    sources = [source for source in sources if source.size]
    encoder = load_encoder(options.tokenizer, options.parse_special_tokens)
    report = BuildReport(bytes=sum(source.size for source in sources))
    batches = (batch for source in sources for batch in read_batches(source))
    with (
        deferred_sigterm(),
        CorpusWriter(options.output_prefix, encoder.vocab_size) as writer,
        progress_bar(report.bytes, "tokenise", "B", unit_scale=True) as bar,
    ):
        for encoded in _encode_all(batches, encoder, options):
            stop_if_terminated()
            report.bad_lines += encoded.num_bad
            report.empty += encoded.empty
            report.spelled += encoded.spelled
            report.first_bad += encoded.bad[: _SHOWN_BAD_LINES - len(report.first_bad)]
            if encoded.num_bad and not options.skip_bad:
                raise DataError(f"{encoded.bad[0]}\nNothing was written. With --skip-bad such lines are left out.")
            writer.add(encoded.ids, encoded.sizes, encoded.ends)
            bar.update(encoded.consumed)
        writer.finish(
            {
                "tokenizer": options.tokenizer,
                "tokenizer_fingerprint": encoder.fingerprint,
                "vocab_size": encoder.vocab_size,
                "bad_lines_skipped": report.bad_lines,
                "documents_that_spell_special_tokens": report.spelled,
                "parse_special_tokens": options.parse_special_tokens,
            }
        )
        report.documents, report.tokens = writer.num_documents, writer.num_tokens
    report.seconds = time.monotonic() - started
    return report


def _encode_all(batches: Iterable[Batch], encoder: Encoder, options: BuildOptions) -> Iterator[_Encoded]:
    """Encode in order; at most two batches a worker are under way, so that memory stays flat."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core's worth, here and in the children
    if options.workers <= 1:
        for batch in batches:
            yield _encode(batch, encoder, options)
        return
    # The parent's encoder reaches the workers by fork; where there is no fork they load their own.
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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        die_with_parent()
        cls.options = options
        cls.encoder = cls.encoder or load_encoder(options.tokenizer, options.parse_special_tokens)

    @classmethod
    def encode(cls, batch: Batch) -> _Encoded:
        assert cls.encoder is not None
        return _encode(batch, cls.encoder, cls.options)


def _encode(batch: Batch, encoder: Encoder, options: BuildOptions) -> _Encoded:
    pieces: list[Piece] = []
    bad: list[BadLine] = []
    num_bad = empty = 0
    for item in parse_batch(batch, options.text_key, options.txt_document):
        if isinstance(item, BadLine):
            num_bad += 1
            if len(bad) < _SHOWN_BAD_LINES:
                bad.append(item)
        elif not item.text and not _is_whole_file(batch, options):
            empty += 1
        else:
            pieces.append(item)
    try:
        rows, spelled = encoder.encode_and_tell([piece.text for piece in pieces]) if pieces else ([], [])
    except OarlockError:
        raise
    except Exception as error:  # tokenizers raise bare Exception; say where in the data it was
        place = f"{batch.source.path}: lines from {batch.first_line}"
        raise DataError(f"{place}: the tokenizer failed: {type(error).__name__}: {error}") from error
    eos = np.asarray([encoder.eos_id], dtype=np.int32)
    parts: list[np.ndarray] = []
    sizes, ends = [], []
    for row, piece in zip(rows, pieces, strict=True):
        ids = np.concatenate((row, eos)) if piece.ends_document else row
        if len(ids):
            parts.append(ids)
            sizes.append(len(ids))
            ends.append(piece.ends_document)
    return _Encoded(
        np.concatenate(parts) if parts else np.zeros(0, np.int32),
        np.asarray(sizes, np.int32),
        np.asarray(ends, bool),
        bad,
        num_bad,
        empty,
        batch.consumed,
        _count_documents(pieces, spelled),
    )


def _count_documents(pieces: list[Piece], found: list[bool]) -> int:
    """Documents of which a piece was found (one that goes on in the next batch may be counted there too)."""
    count, of_this = 0, False
    for piece, hit in zip(pieces, found, strict=True):
        of_this |= hit
        if piece.ends_document:
            count, of_this = count + of_this, False
    return count + of_this


def _is_whole_file(batch: Batch, options: BuildOptions) -> bool:
    """Whether the batch is part of a document that is a file; its last piece may be empty and still ends it."""
    return batch.source.format == "txt" and options.txt_document == "file"
