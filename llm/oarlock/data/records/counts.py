"""What became of the records of fine-tuning data, in numbers and for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_NAMED = 5  # bad records are counted, so many of them named


@dataclass
class Counts:
    """What became of the records.

    Attributes:
        records: that could be used (a plain text is one, however many examples it gives).
        bad: left out because they are wrong; first_bad names some.
        untrained: left out because nothing of them is trained on; first_untrained names some.
        truncated: cut by src_length or tgt_length.
        unanswered: a question at the end without an answer was left out.
        spelled: hold text that spells a special token.
        joined: a token joins the prompt to the answer.
        forgotten: the template leaves the reasoning of an earlier answer out.
        unread: fields that look as if they told the trainer something, each once a file, with the place.
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
        """Count a wrong record."""
        self.bad += 1
        self.first_bad += [what] if len(self.first_bad) < _NAMED else []

    def note_untrained(self, where: str) -> None:
        """Count a record with nothing to train on."""
        self.untrained += 1
        self.first_untrained += [where] if len(self.first_untrained) < _NAMED else []

    def notes(self, side: str) -> Iterator[str]:
        """What whoever starts a run has to know, a line each."""
        if self.bad:
            shown = "".join(f"\n  {line}" for line in self.first_bad)
            yield f"{self.bad:,} bad {side} records left out (--skip_bad):{shown}"
        if self.truncated:
            yield f"{side}: {self.truncated:,} of {self.records:,} records were cut by --src_length or --tgt_length"
        if self.untrained:
            shown = ", ".join(self.first_untrained)
            yield f"{side}: {self.untrained:,} records left out, nothing of them is trained on ({shown})"
        if self.unanswered:
            yield f"{side}: {self.unanswered:,} conversations end with a question; it was left out"
        if self.spelled:
            yield f"{side}: {self.spelled:,} records spell a special token; it is text there (--parse_special_tokens)"
        if self.joined:
            yield (
                f"{side}: in {self.joined:,} records one token spans the end of the prompt and the answer, and counts "
                "as the answer's; let the chat template end a prompt with a special token or a new line"
            )
        if self.forgotten:
            yield f"{side}: in {self.forgotten:,} records the chat template leaves out the reasoning of earlier answers"
        for field_ in self.unread:
            yield f"{side}: {field_} is not read"
