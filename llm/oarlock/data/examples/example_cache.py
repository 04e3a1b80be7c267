"""The cache of tokenised examples: written as a stream, memory-mapped by all ranks.

A folder contains tokens.bin (ids), runs.bin (alternating lengths of runs only read and runs trained on), rows.bin (one
row per example), prompts.jsonl (for evaluation) and about.json. It is written under a temporary name and renamed when
it is complete. Its name is a hash of everything that the content depends on.
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
from oarlock.data.examples.labels import Encoded, EvalPrompt, Example
from oarlock.data.tokenizers.token_ids import check_range
from oarlock.errors import DataError
from oarlock.files import sync_file, write_text_atomically
from oarlock.formats.files import open_regular
from oarlock.formats.json_file import parse_json
from oarlock.formats.sealed import read_sealed, seal_text

_ROW = np.dtype(
    [
        ("tokens", "<i8"),  # end of its ids in tokens.bin, in tokens
        ("runs", "<i8"),  # end of its runs in runs.bin
        ("prompt", "<i8"),  # end of its prompt in prompts.jsonl, in bytes
        ("line", "<i8"),
        ("context", "<i4"),  # tokens before truncation
        ("answer", "<i4"),
        ("truncated", "?"),
    ]
)
_FILES = ("tokens.bin", "runs.bin", "rows.bin", "prompts.jsonl")
_ABOUT = "about.json"
_RUNS = np.dtype("<i4")
_MAX_PROMPT_BYTES = 1 << 26


class _About(TypedDict):
    """The content of about.json."""

    dtype: Literal["<u2", "<i4"]
    num_examples: Annotated[int, Ge(0)]
    first_of_each_source: list[Annotated[int, Ge(0)]]
    counts: Counts
    bytes: dict[str, Annotated[int, Ge(0)]]
    largest_id: Annotated[int, Ge(-1)]
    sha256: str


class ExampleWriter:
    """Writes a folder of examples. The folder appears, complete, when `finish` is called, and not before."""

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
        """Start the next source. Examples added from now on belong to it."""
        self._sources.append(self.num_examples)

    def add(self, rows: Sequence[Row]) -> None:
        """Append examples."""
        if not rows:
            return
        prompts = [
            (json.dumps(dataclasses.asdict(row.prompt), ensure_ascii=False) + "\n").encode() if row.prompt else b""
            for row in rows
        ]
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
        """Complete the folder and rename it."""
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
        write_text_atomically(self._partial / _ABOUT, seal_text(about))
        shutil.rmtree(self.folder, ignore_errors=True)  # damaged, if it exists
        os.replace(self._partial, self.folder)
        sync_file(self.folder.parent)


def is_complete(folder: Path) -> bool:
    """Whether a folder of examples exists, is complete, and has only valid offsets and ids."""
    if not (folder / _ABOUT).exists():
        return False
    try:
        StoredExamples(folder).check()
    except DataError:
        return False
    return True


class StoredExamples(StoredSequence[Example]):
    """The examples of a folder, each read on access.

    Args:
        names: names of the sources, for `locate`.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] = ()) -> None:
        self.folder, self.names = Path(folder), tuple(names)
        self.about = read_sealed(self.folder / _ABOUT, _About, what="note of examples", error=DataError)
        self.counts = self.about["counts"]
        self._tokens = self._map("tokens.bin", np.dtype(self.about["dtype"]))
        self._runs = self._map("runs.bin", _RUNS)
        self.rows = self._map("rows.bin", _ROW)
        self._map("prompts.jsonl", np.dtype("u1"))
        if len(self.rows) != self.about["num_examples"]:
            raise self._make_error()

    def check(self) -> None:
        """Check the offsets in the rows, and the ids. Reading examples does not check them.

        Raises:
            DataError: if offsets are out of order or range, or ids are larger than those written.
        """
        sizes = {
            "tokens": len(self._tokens),
            "runs": len(self._runs),
            "prompt": self.about["bytes"]["prompts.jsonl"],
        }
        for name in sizes:
            ends = np.asarray(self.rows[name])
            if len(ends) and (int(ends[-1]) != sizes[name] or int(np.diff(ends, prepend=0).min()) < 0):
                raise self._make_error()
        firsts = self.about["first_of_each_source"]
        if firsts != sorted(firsts) or (firsts and firsts[-1] > len(self)):
            raise self._make_error()
        check_range(self._tokens, self.about["largest_id"] + 1, str(self.folder / "tokens.bin"))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        path, size = self.folder / name, self.about["bytes"].get(name)
        with open_regular(path, error=DataError) as file:
            if os.fstat(file.fileno()).st_size != size or size % dtype.itemsize:
                raise self._make_error()
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)

    def _make_error(self) -> DataError:
        return DataError(f"{self.folder}: damaged or incomplete examples; delete this folder to make them again")

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredExamples, (self.folder, self.names)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self.rows)

    def read_element(self, index: int) -> Example:
        return self.read_encoded(index).to_example()

    def read_encoded(self, index: int) -> Encoded:
        """Read an example as it is stored."""
        row = self.rows[index]
        ids, runs = self._slice("tokens", self._tokens, index), self._slice("runs", self._runs, index)
        return Encoded(ids.tolist(), runs.tolist(), int(row["context"]), int(row["answer"]), bool(row["truncated"]))

    def _slice(self, name: str, values: np.ndarray, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return values[self.rows[name][index - 1] if index else 0 : self.rows[name][index]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of input tokens of each example, int64 [examples]."""
        return np.diff(self.rows["tokens"], prepend=0) - 1

    def locate(self, index: int) -> str:
        """Return file:line of an example's record."""
        source = int(np.searchsorted(self.about["first_of_each_source"], index, side="right")) - 1
        return f"{self.names[source]}:{self.rows['line'][index]}"

    def hash_contents(self) -> Iterator[bytes]:
        """Yield a short hash of each example: of its tokens and of which are trained on."""
        import hashlib

        for i in range(len(self)):
            digest = hashlib.blake2b(self._slice("tokens", self._tokens, i).tobytes(), digest_size=8)
            digest.update(b"|" + self._slice("runs", self._runs, i).tobytes())
            yield digest.digest()


class StoredPrompts(StoredSequence[EvalPrompt]):
    """The prompts of a folder of examples, each read on access.

    Args:
        indices: the examples whose prompts are included, None for all.
    """

    def __init__(self, examples: StoredExamples, indices: np.ndarray | None = None) -> None:
        self._path = examples.folder / "prompts.jsonl"
        ends = np.asarray(examples.rows["prompt"])
        starts = np.concatenate(([0], ends[:-1]))
        wanted = np.arange(len(ends)) if indices is None else indices
        self._starts = starts[wanted][starts[wanted] < ends[wanted]]  # plain text has no prompt

    def __len__(self) -> int:
        return len(self._starts)

    def read_element(self, index: int) -> EvalPrompt:
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline(_MAX_PROMPT_BYTES)
            return parse_json(line, str(self._path), EvalPrompt, error=DataError, limit=_MAX_PROMPT_BYTES)


class JoinedPrompts(StoredSequence[EvalPrompt]):
    """The concatenated prompts of several folders."""

    def __init__(self, parts: Sequence[Sequence[EvalPrompt]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def read_element(self, index: int) -> EvalPrompt:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
