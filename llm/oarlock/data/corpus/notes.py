"""The summary of a corpus, prefix.json, written by `oarlock data pretrain`.

Format 3 ends with a checksum of itself, format 2 has none. Format 1 (without the field) may store a .txt document as
several sequences, with its end token in a sequence of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import NotRequired, TypedDict

from oarlock.data.corpus.index_format import FORMAT
from oarlock.errors import DataError
from oarlock.formats.files import is_missing, open_regular
from oarlock.formats.json_file import CONFIG_BYTES, parse_json
from oarlock.formats.sealed import check_seal, is_sealed

WHOLE_DOCUMENTS = 2  # since this format a document is one sequence


class _Notes(TypedDict):
    """The fields that a run uses."""

    format: NotRequired[int]
    documents: NotRequired[Annotated[int, Ge(0)]]
    tokens: NotRequired[Annotated[int, Ge(0)]]
    largest_id: NotRequired[Annotated[int, Ge(-1)]]
    tokenizer: NotRequired[str | None]
    tokenizer_fingerprint: NotRequired[str | None]


def read_corpus_summary(prefix: str | Path) -> dict[str, Any]:
    """Read the summary of a corpus (largest_id, tokenizer, ...). Returns {} if there is none.

    Raises:
        DataError: if the summary was changed after it was written.
    """
    path = Path(f"{prefix}.json")
    if is_missing(path):
        return {}
    with open_regular(path, error=DataError) as file:
        content = file.read(CONFIG_BYTES + 1)
    if len(content) > CONFIG_BYTES:  # not a summary, but an input file of that name
        return {}
    sealed = is_sealed(content)
    if sealed or content.startswith(f'{{\n "format": {FORMAT},'.encode()):
        check_seal(content, str(path), DataError)
    try:
        found = parse_json(content, str(path), error=DataError)
    except DataError:
        return {}
    if not isinstance(found, dict) or not (type(found.get("format")) is int or "tokenizer_fingerprint" in found):
        return {}
    parse_json(content, str(path), _Notes, error=DataError, extra="allow")
    if not sealed and found.get("format", 1) >= FORMAT:
        check_seal(content, str(path), DataError)
    return found
