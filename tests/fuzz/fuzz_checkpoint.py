"""The files that a run reads of its own: manifest, tensors.json, trainer state, weights, lock, log rows, notes of data.

An input is a line that names the file and its content. The checksums are recomputed, so that the readers
behind them get it too; only "raw" is a manifest taken verbatim.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
from harness import Harness

from helpers import write_checkpoint
from oarlock.data.corpus.index_format import CorpusWriter, check_corpus, token_ids
from oarlock.data.corpus.notes import read_corpus_summary
from oarlock.data.examples.encode import Row
from oarlock.data.examples.example_cache import ExampleWriter, StoredExamples
from oarlock.data.examples.labels import Encoded, EvalPrompt
from oarlock.data.records.counts import Counts
from oarlock.errors import OarlockError
from oarlock.formats.sealed import SEAL, seal_text
from oarlock.train.checkpoint.manifest import MANIFEST, TRAINER_STATE, verify
from oarlock.train.output.lock_holder import Holder
from oarlock.train.reporters.row_file import read_rows
from oarlock.weights.shard_index import INDEX, shard_file_name
from oarlock.weights.sharded_store import ShardedStore

_NAMES = {b"index": INDEX, b"state": TRAINER_STATE, b"weights": shard_file_name(0)}


def _folders(folder: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, the prefix of a corpus and a folder of examples; made once."""
    checkpoint, corpus, examples = folder / "checkpoint-4", folder / "corpus", folder / "examples"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, 4)
        with CorpusWriter(corpus, 100) as writer:
            writer.add(np.arange(15), np.asarray([5, 10]), np.asarray([True, True]))
            writer.finish({"tokenizer": "x", "tokenizer_fingerprint": "ids-0"})
        with ExampleWriter(examples, 100) as writer:
            writer.begin_source()
            rows = [Row(Encoded([1, 2, 3], [1, 2], 1, 2, False), 1, EvalPrompt([1], "a", "b")) for _ in range(3)]
            writer.add(rows)
            writer.finish(Counts(records=3))
    return checkpoint, corpus, examples


def _sealed(body: bytes) -> bytes:
    core = body.rstrip().removesuffix(b"}").rstrip()
    return core + f',\n "{SEAL}": "{hashlib.sha256(core).hexdigest()}"\n}}\n'.encode()


@contextlib.contextmanager
def _replaced(*changes: tuple[Path, bytes]):
    before = [(path, path.read_bytes()) for path, _ in changes]
    try:
        for path, content in changes:
            path.write_bytes(content)
        yield
    finally:
        for path, content in before:
            path.write_bytes(content)


def target(data: bytes, folder: Path) -> None:
    kind, _, body = data.partition(b"\n")
    checkpoint, corpus, examples = _folders(folder)
    manifest = checkpoint / MANIFEST
    if kind == b"raw":
        same = body == manifest.read_bytes()
        with _replaced((manifest, body)):
            assert verify(checkpoint) and same
    elif kind == b"manifest":
        with _replaced((manifest, _sealed(body))):
            assert verify(checkpoint).step == 4
    elif kind in _NAMES:
        content = json.loads(manifest.read_text())
        content["files"][_NAMES[kind]] = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        del content[SEAL]
        with _replaced((checkpoint / _NAMES[kind], body), (manifest, seal_text(content).encode())):
            verify(checkpoint)
            with ShardedStore.open(checkpoint) as pieces:
                for name in pieces.names():
                    assert pieces.read(name).shape == pieces.shape("model", name)
    elif kind == b"lock":
        holder = Holder.parse(body)
        assert holder is None or (Holder.parse(holder.to_bytes()) == holder and holder.in_words and holder.last_beat)
    elif kind == b"rows":
        (folder / "metrics.jsonl").write_bytes(body)
        assert all(type(row["step"]) is int for row in read_rows(folder / "metrics.jsonl"))
    elif kind in (b"notes", b"plain notes"):
        with _replaced((corpus.with_suffix(".json"), _sealed(body) if kind == b"notes" else body)):
            assert isinstance(read_corpus_summary(corpus), dict)
    elif kind == b"idx":
        with _replaced((corpus.with_suffix(".idx"), body)):
            check_corpus(corpus)
            assert len(token_ids(corpus)) == 15 or token_ids(corpus).nbytes == corpus.with_suffix(".bin").stat().st_size
    elif kind == b"about":
        with _replaced((examples / "about.json", _sealed(body))):
            StoredExamples(examples).check()
    elif kind == b"table":
        with _replaced((examples / "rows.bin", body)):
            stored = StoredExamples(examples)
            stored.check()
            assert all(len(stored.read_encoded(i).ids) <= 9 for i in range(len(stored)))
    else:
        raise OarlockError("no such file")


def seeds() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        checkpoint, corpus, examples = _folders(Path(place))

        def unsealed(path: Path) -> bytes:
            content = {name: value for name, value in json.loads(path.read_text()).items() if name != SEAL}
            return (json.dumps(content, indent=1) + "\n").encode()

        manifest = json.loads(unsealed(checkpoint / MANIFEST))
        more = {
            "loss_scaler": {
                "scale": [1024.0], "incr_ratio": 2.0, "decr_ratio": 0.5, "incr_every_n_steps": 10,
                "decr_every_n_nan_or_inf": 1, "incr_count": 0, "decr_count": 0, "use_dynamic_loss_scaling": True,
            },
            "best": {"metric": "eval_loss", "value": 1.5, "step": 2, "name": "checkpoint-2", "evaluations_since": 1},
            "base": {"name": "x", "fingerprint": "y"},
            "config": {"learning_rate": 1e-3, "max_steps": 5, "bf16": False, "max_grad_norm": 1.0},
        }  # fmt: skip
        row = {"step": 3, "loss": 1.5, "time": 1e9}
        index = json.loads((checkpoint / INDEX).read_text())
        cut = {"shape": [20, 25], "axis": 0, "runs": [[0, 10], [10, 10]], "flat": [0, 500]}
        split = {file: dict.fromkeys(entries, cut) for file, entries in index.items()}
        return [
            b"raw\n" + (checkpoint / MANIFEST).read_bytes(),
            b"manifest\n" + unsealed(checkpoint / MANIFEST),
            b"manifest\n" + json.dumps(manifest | more, indent=1).encode(),
            *(kind + b"\n" + (checkpoint / name).read_bytes() for kind, name in _NAMES.items()),
            b"index\n" + json.dumps(split).encode(),
            b"lock\n" + Holder.this_process(1.7e9).to_bytes(),
            b"rows\n" + (json.dumps(row) + "\n" + json.dumps({"step": 4, "answer": "\u00e4"}) + '\n{"st').encode(),
            b"notes\n" + unsealed(corpus.with_suffix(".json")),
            b"plain notes\n" + corpus.with_suffix(".json").read_bytes(),
            b"idx\n" + corpus.with_suffix(".idx").read_bytes(),
            b"about\n" + unsealed(examples / "about.json"),
            b"table\n" + (examples / "rows.bin").read_bytes(),
        ]


HARNESS = Harness(
    target,
    seeds,
    tokens=[b"raw\n", b"manifest\n", b"index\n", b"state\n", b"weights\n", b"idx\n", b"table\n", b'"../x"', b'"/etc/x"',
            b"checkpoint-", b"1000000000000", b"-1", b"null", b"true", b'"step":', b'"files":', b'"shape":', b'"runs":',
            b'"axis":', b'"flat":', b"\xff\xff\xff\x7f", b"\x00" * 8],
)  # fmt: skip
