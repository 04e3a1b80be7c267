"""Tokenising a stream of records into examples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.examples.labels import Encoded, EvalPrompt, encode_chat, encode_prompt
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.examples.text_parts import cut_texts
from oarlock.data.records.conversations import (
    READ_FIELDS,
    Conversation,
    PlainText,
    detect_form,
    find_other_forms,
    parse_record,
)
from oarlock.data.records.counts import Counts
from oarlock.data.records.messages import MessageError
from oarlock.data.records.record_stream import RecordSource
from oarlock.data.records.training_marks import find_unread_fields
from oarlock.data.templates.chat_template import ChatTemplate, adds_bos
from oarlock.data.templates.special_token_text import compile_spellings
from oarlock.data.templates.trained_spans import ChatText, render_chat_text
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.errors import DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

# Part of every cache key. Increase it when the same records give different examples than before.
ENCODING_VERSION = 2
_MAX_UNREAD = 20  # unused fields that are reported


@dataclass(frozen=True)
class EncodingSettings:
    """The settings that determine the examples of a record.

    Attributes:
        form: form of the records; auto detects it from the first record of each file.
        skip_bad: skip wrong records and count them.
        prompts: also make the prompts for evaluation.
    """

    tokenizer: PretrainedTokenizerBase
    template: ChatTemplate
    src_length: int
    tgt_length: int
    form: str = "auto"
    skip_bad: bool = False
    prompts: bool = False


@dataclass(frozen=True)
class Row:
    """An example, the line of its record, and its prompt if the settings ask for prompts."""

    encoded: Encoded
    line: int
    prompt: EvalPrompt | None = None


def detect_first_form(sources: list[RecordSource], form: str) -> str:
    """Return the form of the first record whose form is known, or auto if there is none."""
    if form != "auto":
        return form
    for source in sources:
        for batch in source.batches():
            for _, item in batch.items:
                if isinstance(item, PlainText):
                    return "text"
                try:
                    return detect_form(item)
                except ValueError:
                    continue
            break
    return "auto"


def encode_source(source: RecordSource, settings: EncodingSettings, counts: Counts) -> Iterator[tuple[list[Row], int]]:
    """Yield the examples of a source in order, with the amount of the source that was consumed. Updates `counts`.

    Raises:
        DataError: for a wrong record (file:line, the field, what was expected), unless skip_bad.
    """
    form, texts, reported = settings.form, _TextSplitter(settings), set[str]()

    def tokenize_texts(parts: Sequence[str]) -> list[list[int]]:
        return [
            row.ids for row in tokenize(settings.tokenizer, [_mark_text(part, settings.template) for part in parts])
        ]

    for batch in cut_texts(source, tokenize_texts):
        jobs: list[_Job] = []
        for line, item in batch.items:
            where = f"{source.name}:{line}"
            try:
                if isinstance(item, ValueError):
                    raise item
                if isinstance(item, PlainText):
                    record: Conversation | PlainText = item
                else:
                    form = detect_form(item) if form == "auto" else form
                    record = parse_record(item, form, where)
                if isinstance(record, PlainText):
                    jobs.append(_Job(record, _mark_text(record.text, settings.template), None, line))
                else:
                    chat = render_chat_text(record, settings.template)
                    jobs.append(_Job(record, chat.text, chat, line))
            except (ValueError, DataError) as error:
                named = isinstance(error, DataError) and not isinstance(error, MessageError)
                message = str(error) if named else f"{where}: {error}"
                if not settings.skip_bad:
                    raise DataError(message) from error
                counts.note_bad(message)
            for name in (*find_unread_fields(item, READ_FIELDS), *find_other_forms(item, form)):
                if name not in reported and len(counts.unread) < _MAX_UNREAD:
                    counts.unread.append(f"{where}: field {name!r}")
                reported.add(name)
        yield _encode(jobs, texts, settings, counts, source.name), batch.consumed


@dataclass(frozen=True)
class _Job:
    """A record, its text to tokenise, and for a conversation the ranges to train on."""

    record: Conversation | PlainText
    text: MarkedText
    chat: ChatText | None
    line: int


def _mark_text(text: str, template: ChatTemplate) -> MarkedText:
    """Mark a plain text, in which the spellings of special tokens are text unless parse_special_tokens is set."""
    if template.parse_special_tokens or not template.spellings:
        return MarkedText(text)
    return MarkedText.mark_all(text)


def _encode(jobs: list[_Job], texts: _TextSplitter, settings: EncodingSettings, counts: Counts, name: str) -> list[Row]:
    """Tokenise the texts of all jobs in one call, and make their examples."""
    rows: list[Row] = []
    template = settings.template
    cuts = [job.chat.cuts if job.chat else () for job in jobs]
    for job, tokens in zip(jobs, tokenize(settings.tokenizer, [job.text for job in jobs], cuts), strict=True):
        if isinstance(job.record, PlainText):
            counts.spelled += bool(job.text.literal and compile_spellings(template.spellings).search(job.text.text))
            rows += texts.add(tokens.ids, job.line, job.record.ends)
            counts.records += job.record.ends
            continue
        assert job.chat is not None
        counts.spelled += bool(job.text.literal)
        encoded = encode_chat(job.chat, tokens, settings.src_length, settings.tgt_length)
        counts.records += 1
        counts.truncated += encoded.truncated
        counts.unanswered += job.record.unanswered
        counts.joined += encoded.joined
        counts.forgotten += job.chat.forgotten
        if encoded.trains:
            prompt = None
            if settings.prompts:
                prompt = encode_prompt(job.record, settings.tokenizer, template, settings.src_length)
            rows.append(Row(encoded, job.line, prompt))
        else:
            counts.note_untrained(f"{name}:{job.line}")
    return rows


class _TextSplitter:
    """Splits plain texts into examples of src_length + tgt_length tokens.

    Each example starts with the last token of the previous one, as input only. So every token is trained on once.
    """

    def __init__(self, settings: EncodingSettings) -> None:
        tokenizer = settings.tokenizer
        self._size = settings.src_length + settings.tgt_length
        self._begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._ids: list[int] = []
        self._line = 0

    def add(self, ids: list[int], line: int, ends: bool) -> Iterator[Row]:
        """Add a part of a text, and yield the examples that are now complete."""
        if not self._ids:
            self._ids, self._line = list(self._begin), line
        self._ids += ids
        if ends and len(self._ids) > len(self._begin):
            self._ids += self._end
        start, last = 0, len(self._ids)
        while last - start > self._size or (ends and last - start > 1):
            part = self._ids[start : start + self._size]
            yield Row(Encoded(part, [0, len(part)], 0, len(part), False), self._line)
            start, self._line = start + len(part) - 1, line
        self._ids = [] if ends else self._ids[start:]
