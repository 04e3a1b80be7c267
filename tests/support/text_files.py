"""Text files for tests."""

from __future__ import annotations

from pathlib import Path

from oarlock.data.corpus.text_chunks import TextSplitter
from oarlock.data.files.byte_streams import Source
from oarlock.data.files.find_files import LeftOut, find_sources
from oarlock.data.files.text_readers import BadLine, parse_batch, read_batches


def letters(texts):
    return [list(map(ord, text)) for text in texts]


def read(source: Source, text_key: str = "text", txt_document: str = "file") -> tuple[list[str], list[str]]:
    """Read documents and bad lines."""
    documents, bad, parts = [], [], []
    for batch in read_batches(source, TextSplitter(letters), text_key, txt_document):
        for item in parse_batch(batch, text_key, txt_document):
            if isinstance(item, BadLine):
                bad.append(str(item))
                continue
            assert item.begins_document == (not parts)
            parts.append(item.text)
            if item.ends_document:
                documents.append("".join(parts))
                parts = []
    assert not parts
    return documents, bad


def source(path: Path) -> Source:
    (found,) = find_sources([str(path)], LeftOut())
    return found
