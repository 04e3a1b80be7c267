"""Tokenised examples on disk: written as a stream, mapped by every rank, in memory that does not grow with them.

A folder holds tokens.bin (ids), runs.bin (lengths of stretches read only and trained on, in turn), rows.bin (one row
an example), prompts.jsonl (for evaluation) and about.json. It is written under another name and renamed when it is
complete; its name is the hash of everything its content depends on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from annotated_types import Ge
from typing_extensions import TypedDict

from oarlock.data.corpus.lazy_sequence import StoredSequence
from oarlock.data.examples.encode import Counts, Row
from oarlock.data.examples.labels import Encoded, Example, Prompt
from oarlock.data.tokenizers.token_ids import check_range
from oarlock.errors import DataError
from oarlock.files import sync_file, write_text_atomically
from oarlock.formats.files import open_regular
from oarlock.formats.json_file import parse_json
from oarlock.formats.sealed import read_sealed, sealed_text

_ROW = np.dtype(
    [
        ("tokens", "<i8"),  # where its ids end in tokens.bin, in tokens
        ("runs", "<i8"),  # where its runs end in runs.bin
        ("prompt", "<i8"),  # where its prompt ends in prompts.jsonl, in bytes
        ("line", "<i8"),
        ("context", "<i4"),  # tokens before anything was cut
        ("answer", "<i4"),
        ("truncated", "?"),
    ]
)
_FILES = ("tokens.bin", "runs.bin", "rows.bin", "prompts.jsonl")
_ABOUT = "about.json"
_RUNS = np.dtype("<i4")
_LONGEST_PROMPT = 1 << 26  # bytes


class _About(TypedDict):
    """about.json."""

    dtype: Literal["<u2", "<i4"]
    num_examples: Annotated[int, Ge(0)]
    first_of_each_source: list[Annotated[int, Ge(0)]]
    counts: Counts
    bytes: dict[str, Annotated[int, Ge(0)]]
    largest_id: Annotated[int, Ge(-1)]
    sha256: str


class ExampleWriter:
    """Write a folder of examples; it is there, whole, when `finish` returns, and nothing of it otherwise."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {}
        for name in _FILES:
            self._files[name] = open(self._partial / name, "wb")  # noqa: SIM115 - closed by __exit__
        self._ends = [0, 0, 0]
        self._sources: list[int] = []
        self.num_examples, self._largest_id = 0, -1

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def begin_source(self) -> None:
        """What follows comes from the next source."""
        self._sources.append(self.num_examples)

    def add(self, rows: Sequence[Row]) -> None:
        """Append examples."""
        if not rows:
            return
        prompts = [_prompt_line(row.prompt) for row in rows]
        table = np.zeros(len(rows), _ROW)
        columns = (
            [len(row.encoded.ids) for row in rows],
            [len(row.encoded.runs) for row in rows],
            [len(prompt) for prompt in prompts],
        )
        for i, (name, lengths) in enumerate(zip(("tokens", "runs", "prompt"), columns, strict=True)):
            table[name] = self._ends[i] + np.cumsum(lengths)
            self._ends[i] = int(table[name][-1])
        table["line"] = [row.line for row in rows]
        for name in ("context", "answer", "truncated"):
            table[name] = [getattr(row.encoded, name) for row in rows]
        ids = np.concatenate([row.encoded.ids for row in rows])
        self._largest_id = max(self._largest_id, int(ids.max(initial=-1)))
        self._files["tokens.bin"].write(ids.astype(self._dtype).tobytes())
        self._files["runs.bin"].write(np.concatenate([row.encoded.runs for row in rows]).astype(_RUNS).tobytes())
        self._files["rows.bin"].write(table.tobytes())
        self._files["prompts.jsonl"].writelines(prompts)
        self.num_examples += len(rows)

    def finish(self, counts: Counts) -> None:
        """Give the folder its name."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            sizes[name] = file.tell()
            file.close()
            sync_file(self._partial / name)
        about = {
            "dtype": self._dtype.str,
            "num_examples": self.num_examples,
            "first_of_each_source": self._sources,
            "counts": dataclasses.asdict(counts),
            "bytes": sizes,
            "largest_id": self._largest_id,
        }
        write_text_atomically(self._partial / _ABOUT, sealed_text(about))
        shutil.rmtree(self.folder, ignore_errors=True)  # a damaged one
        os.replace(self._partial, self.folder)
        sync_file(self.folder.parent)


def _prompt_line(prompt: Prompt | None) -> bytes:
    return (json.dumps(dataclasses.asdict(prompt), ensure_ascii=False) + "\n").encode() if prompt is not None else b""


def is_whole(folder: Path) -> bool:
    """Whether a folder of examples is there with all its bytes, which are places and ids that can be."""
    if not (folder / _ABOUT).exists():
        return False
    try:
        StoredExamples(folder).check()
    except DataError:
        return False
    return True


class StoredExamples(StoredSequence[Example]):
    """The examples of a folder; each is read when it is asked for.

    Args:
        names: of the sources they came from, for `where`.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] = ()) -> None:
        self.folder, self.names = Path(folder), tuple(names)
        self.about = read_sealed(self.folder / _ABOUT, _About, what="note of examples", error=DataError)
        self.counts = self.about["counts"]
        self._tokens = self._mapped("tokens.bin", np.dtype(self.about["dtype"]))
        self._runs = self._mapped("runs.bin", _RUNS)
        self.rows = self._mapped("rows.bin", _ROW)
        self._mapped("prompts.jsonl", np.dtype("u1"))
        if len(self.rows) != self.about["num_examples"]:
            raise self._damaged()

    def check(self) -> None:
        """Compare rows and ids with each other (a process that reads takes them as they are).

        Raises:
            DataError: when places are out of order or range, or ids are not those that were written.
        """
        most = {
            "tokens": len(self._tokens),
            "runs": len(self._runs),
            "prompt": self.about["bytes"]["prompts.jsonl"],
        }
        for name in most:
            ends = np.asarray(self.rows[name])
            if len(ends) and (int(ends[-1]) != most[name] or int(np.diff(ends, prepend=0).min()) < 0):
                raise self._damaged()
        firsts = self.about["first_of_each_source"]
        if firsts != sorted(firsts) or (firsts and firsts[-1] > len(self)):
            raise self._damaged()
        check_range(self._tokens, self.about["largest_id"] + 1, str(self.folder / "tokens.bin"))

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        path, size = self.folder / name, self.about["bytes"].get(name)
        with open_regular(path, error=DataError) as file:
            if os.fstat(file.fileno()).st_size != size or size % dtype.itemsize:
                raise self._damaged()
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)

    def _damaged(self) -> DataError:
        return DataError(f"{self.folder}: damaged or incomplete examples; delete this folder, and they are made again")

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredExamples, (self.folder, self.names)  # to another process goes the place, not the content

    def __len__(self) -> int:
        return len(self.rows)

    def element(self, index: int) -> Example:
        """See StoredSequence."""
        return self.encoded(index).to_example()

    def encoded(self, index: int) -> Encoded:
        """An example as it is kept."""
        row = self.rows[index]
        ids, runs = self._part("tokens", self._tokens, index), self._part("runs", self._runs, index)
        return Encoded(ids.tolist(), runs.tolist(), int(row["context"]), int(row["answer"]), bool(row["truncated"]))

    def _part(self, name: str, values: np.ndarray, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return values[self.rows[name][index - 1] if index else 0 : self.rows[name][index]]

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of each example, int64 [examples]."""
        return np.diff(self.rows["tokens"], prepend=0) - 1

    def where(self, index: int) -> str:
        """file:line of the record behind an example."""
        source = int(np.searchsorted(self.about["first_of_each_source"], index, side="right")) - 1
        return f"{self.names[source]}:{self.rows['line'][index]}"

    def content_hashes(self) -> Iterator[bytes]:
        """A short hash of the tokens and what is trained of each example, in order."""
        import hashlib

        for i in range(len(self)):
            digest = hashlib.blake2b(self._part("tokens", self._tokens, i).tobytes(), digest_size=8)
            digest.update(b"|" + self._part("runs", self._runs, i).tobytes())
            yield digest.digest()


class StoredPrompts(StoredSequence[Prompt]):
    """The prompts of a folder of examples, read when they are asked for.

    Args:
        indices: of the examples whose prompts are wanted; None for all.
    """

    def __init__(self, examples: StoredExamples, indices: np.ndarray | None = None) -> None:
        self._path = examples.folder / "prompts.jsonl"
        ends = np.asarray(examples.rows["prompt"])
        starts = np.concatenate(([0], ends[:-1]))
        wanted = np.arange(len(ends)) if indices is None else indices
        self._starts = starts[wanted][starts[wanted] < ends[wanted]]  # plain text has no prompt

    def __len__(self) -> int:
        return len(self._starts)

    def element(self, index: int) -> Prompt:
        """See StoredSequence."""
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline(_LONGEST_PROMPT)
            return parse_json(line, str(self._path), Prompt, error=DataError, limit=_LONGEST_PROMPT)


class JoinedPrompts(StoredSequence[Prompt]):
    """The prompts of several folders, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Prompt]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def element(self, index: int) -> Prompt:
        """See StoredSequence."""
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
