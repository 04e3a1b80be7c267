"""A stream of records -> a stream of tokenised examples, a batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oarlock.data.labels import Encoded, Prompt, Span, conversation_spans, encode_prompt, join_spans
from oarlock.data.record_files import RecordSource
from oarlock.data.records import Conversation, PlainText, detect_form, parse_record
from oarlock.data.templates import ChatTemplate, adds_bos
from oarlock.data.text_parts import cut_texts
from oarlock.data.tokenizers import batch_encode
from oarlock.errors import DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

# Part of every cache key: raise it when the same records give other examples than before.
ENCODING_VERSION = 2
_NAMED = 5  # bad records are counted, so many of them named


@dataclass(frozen=True)
class Recipe:
    """How records become tokens.

    Attributes:
        form: of the records, or auto: that of each file's first one.
        skip_bad: leave wrong records out and count them.
        prompts: also make what the model is asked in evaluation.
    """

    tokenizer: PretrainedTokenizerBase
    template: ChatTemplate
    src_length: int
    tgt_length: int
    form: str = "auto"
    skip_bad: bool = False
    prompts: bool = False


@dataclass
class Counts:
    """What became of the records.

    Attributes:
        records: that could be used (a plain text is one, however many examples it gives).
        bad: left out because they are wrong; first_bad names some.
        untrained: left out because nothing of them is trained on; first_untrained names some.
        truncated: cut by src_length or tgt_length.
        unanswered: a question at the end without an answer was left out.
    """

    records: int = 0
    bad: int = 0
    untrained: int = 0
    truncated: int = 0
    unanswered: int = 0
    first_bad: list[str] = field(default_factory=list)
    first_untrained: list[str] = field(default_factory=list)

    def note_bad(self, what: str) -> None:
        """Count a wrong record."""
        self.bad += 1
        self.first_bad += [what] if len(self.first_bad) < _NAMED else []

    def note_untrained(self, where: str) -> None:
        """Count a record with nothing to train on."""
        self.untrained += 1
        self.first_untrained += [where] if len(self.first_untrained) < _NAMED else []


@dataclass(frozen=True)
class Row:
    """An example, the line it came from, and its prompt where one was asked for."""

    encoded: Encoded
    line: int
    prompt: Prompt | None = None


def first_form(sources: list[RecordSource], form: str) -> str:
    """The form of the first record that has a known one (auto where there is none)."""
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


def encode_source(source: RecordSource, recipe: Recipe, counts: Counts) -> Iterator[tuple[list[Row], int]]:
    """Examples of a source in order, with what was consumed of it; counts what became of the records.

    Raises:
        DataError: for a wrong record (file:line, the field, what was expected), unless skip_bad.
    """
    form, texts = recipe.form, _Texts(recipe)
    for batch in cut_texts(source, lambda parts: batch_encode(recipe.tokenizer, parts)):
        jobs: list[_Job] = []
        for line, item in batch.items:
            where = f"{source.name}:{line}"
            try:
                form = detect_form(item) if form == "auto" and not isinstance(item, (ValueError, PlainText)) else form
                jobs.append(_job(item, form, where, line, recipe.template))
            except (ValueError, DataError) as error:
                message = str(error) if isinstance(error, DataError) else f"{where}: {error}"
                if not recipe.skip_bad:
                    raise DataError(message) from error
                counts.note_bad(message)
        yield _encode(jobs, texts, recipe, counts, source.name), batch.consumed


@dataclass(frozen=True)
class _Job:
    """A record and the texts of it that are tokenised."""

    record: Conversation | PlainText
    spans: list[Span]
    line: int


def _job(item: Any, form: str, where: str, line: int, template: ChatTemplate) -> _Job:
    if isinstance(item, ValueError):
        raise item
    record = item if isinstance(item, PlainText) else parse_record(item, form, where)
    if isinstance(record, PlainText):
        return _Job(record, [Span(record.text, answer=True, trained=True)], line)
    return _Job(record, conversation_spans(record, template), line)


def _encode(jobs: list[_Job], texts: _Texts, recipe: Recipe, counts: Counts, name: str) -> list[Row]:
    """Tokenise the texts of all jobs at once, and put the ids together again."""
    ids = iter(batch_encode(recipe.tokenizer, [span.text for job in jobs for span in job.spans]))
    rows: list[Row] = []
    for job in jobs:
        parts = list(itertools.islice(ids, len(job.spans)))
        if isinstance(job.record, PlainText):
            rows += texts.add(parts[0], job.line, job.record.ends)
            counts.records += job.record.ends
            continue
        encoded = join_spans(job.spans, parts, recipe.src_length, recipe.tgt_length)
        counts.records += 1
        counts.truncated += encoded.truncated
        counts.unanswered += job.record.unanswered
        if encoded.trains:
            rows.append(Row(encoded, job.line, _prompt(job.record, recipe) if recipe.prompts else None))
        else:
            counts.note_untrained(f"{name}:{job.line}")
    return rows


def _prompt(conversation: Conversation, recipe: Recipe) -> Prompt:
    return encode_prompt(conversation, recipe.tokenizer, recipe.template, recipe.src_length)


class _Texts:
    """Plain text cut into examples of src_length + tgt_length tokens.

    Each begins with the last token of the one before, which it only reads, so that every token is trained on once.
    """

    def __init__(self, recipe: Recipe) -> None:
        tokenizer = recipe.tokenizer
        self._size = recipe.src_length + recipe.tgt_length
        self._begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._ids: list[int] = []
        self._line = 0

    def add(self, ids: list[int], line: int, ends: bool) -> Iterator[Row]:
        """The examples that are complete with this piece of a text."""
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
