"""Counting the records of fine-tuning data: used, skipped, cut, ..."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_MAX_NAMED = 5  # records that are named; the others are counted


@dataclass
class Counts:
    """Numbers of records.

    Attributes:
        records: usable records (a plain text is one, however many examples it gives).
        bad: invalid records that were skipped; first_bad describes the first ones.
        untrained: records that were skipped because no part is trained on; first_untrained names the first ones.
        truncated: records cut by src_length or tgt_length.
        unanswered: records whose last question had no answer and was dropped.
        spelled: records whose text spells a special token.
        joined: records with a token that spans the prompt and the answer.
        forgotten: records whose template drops the reasoning of an earlier answer.
        unread: ignored fields that look relevant to training, once per file, with file:line.
    """

    records: int = 0
    bad: int = 0
    untrained: int = 0
    truncated: int = 0
    unanswered: int = 0
    spelled: int = 0
    joined: int = 0
    forgotten: int = 0
    first_bad: list[str] = field(default_factory=list)
    first_untrained: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def note_bad(self, what: str) -> None:
        """Count an invalid record."""
        self.bad += 1
        self.first_bad += [what] if len(self.first_bad) < _MAX_NAMED else []

    def note_untrained(self, where: str) -> None:
        """Count a record with nothing to train on."""
        self.untrained += 1
        self.first_untrained += [where] if len(self.first_untrained) < _MAX_NAMED else []

    def describe(self, side: str) -> Iterator[str]:
        """Yield a line for each count that users should know about."""
        if self.bad:
            shown = "".join(f"\n  {line}" for line in self.first_bad)
            yield f"{self.bad:,} bad {side} records skipped (--skip_bad):{shown}"
        if self.truncated:
            yield f"{side}: {self.truncated:,} of {self.records:,} records were cut by --src_length or --tgt_length"
        if self.untrained:
            shown = ", ".join(self.first_untrained)
            yield f"{side}: {self.untrained:,} records skipped, because no part of them is trained on ({shown})"
        if self.unanswered:
            yield f"{side}: {self.unanswered:,} conversations end with a question, which was dropped"
        if self.spelled:
            yield f"{side}: {self.spelled:,} records spell a special token; it is plain text (--parse_special_tokens)"
        if self.joined:
            yield (
                f"{side}: in {self.joined:,} records a token spans the end of the prompt and the start of the answer. "
                "It counts as part of the answer. To avoid this, let the chat template end prompts with a special "
                "token or a newline"
            )
        if self.forgotten:
            yield f"{side}: in {self.forgotten:,} records the chat template drops the reasoning of earlier answers"
        for field_ in self.unread:
            yield f"{side}: {field_} is ignored"
