"""Splitting plain texts of fine-tuning data without changing their token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oarlock.data.corpus.text_chunks import Encode, TextSplitter
from oarlock.data.files import byte_streams
from oarlock.data.records.conversations import PlainText
from oarlock.data.records.record_stream import ItemBatch, RecordSource
from oarlock.environment.console import get_logger

logger = get_logger(__name__)


def cut_texts(source: RecordSource, encode: Encode) -> Iterator[ItemBatch]:
    """Yield the batches of a source, with its plain texts split anew by oarlock.data.corpus.text_chunks.

    Args:
        encode: tokenizes a list of texts.
    """
    splitter = TextSplitter(encode)
    text, first_line = "", 0
    for batch in source.batches():
        items: list[tuple[int, Any]] = []
        for line, item in batch.items:
            if not isinstance(item, PlainText):
                items.append((line, item))
                continue
            if not text:
                first_line = line
            text += item.text
            done, rest = "", text
            if item.ends:
                done, rest = text, ""
            elif len(text) > byte_streams.BLOCK_BYTES:
                done, rest = splitter.split_start(text, byte_streams.BLOCK_BYTES)
            for chunk in splitter.split_text(done) if done or item.ends else ():
                items.append((first_line, PlainText(chunk, item.where, ends=False)))
                first_line += chunk.count("\n")
            if item.ends:
                items[-1] = (items[-1][0], PlainText(items[-1][1].text, item.where, ends=True))
            text = rest
        yield ItemBatch(items, batch.consumed)
    if splitter.unsure:
        logger.info(
            f"{source.name}: long texts without word boundaries were split at {splitter.unsure:,} place(s), where the "
            "ids may differ from those of the unsplit text"
        )
