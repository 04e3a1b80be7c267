"""Records for tests."""

from __future__ import annotations

from pathlib import Path

from oarlock.data.examples.encode import Counts, EncodingSettings, encode_source
from oarlock.data.examples.preview import mark_trained
from oarlock.data.records.conversations import detect_form, parse_record
from oarlock.data.records.record_stream import RowRecords
from oarlock.data.templates.chat_template import choose_template

QWEN = str(Path(__file__).parents[1] / "chat_templates" / "qwen3.jinja")


def read(records: list, tokenizer, template: str = QWEN, **more):
    """The displayed text of each record, and the counts."""
    counts = Counts()
    chosen = choose_template(template, tokenizer, "messages")
    settings = EncodingSettings(tokenizer, chosen, 900, 900, **more)
    rows = [row for part, _ in encode_source(RowRecords("data", records), settings, counts) for row in part]
    return [mark_trained(row.encoded, tokenizer, color=False) for row in rows], counts


def read_messages(record: dict) -> list[tuple[str, str]]:
    talk = parse_record(record, detect_form(record), "here:1")
    return [(message["role"], message.get("content")) for message in talk.messages]
