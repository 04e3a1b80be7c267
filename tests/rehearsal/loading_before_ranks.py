"""Models and data that are read before process groups exist: do_hub(folder, case), do_data(folder, case)."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from loading_checks import expect_failure, two_nodes

BEFORE_CONNECTING = [
    *("hub/one", "hub/fails", "hub/two_nodes", "hub/gone_folder"),
    *("data/one", "data/two_nodes", "data/wrong", "data/gone"),
]


def do_hub(folder: Path, case: str) -> None:
    """Resolve names and folders of models before there are groups."""
    import time
    from unittest import mock

    from oarlock.environment.ranks import rank
    from oarlock.errors import ModelError
    from oarlock.hub import downloads
    from oarlock.model_config.model_folder import find_model_folder

    calls = folder / f"calls-{case}"
    cache = folder / f"cache-{case}-{rank() // 2 if case == 'two_nodes' else 0}"

    def fake(name, files):
        if (cache / files[0]).is_file():  # where the other ranks look after the reader
            return cache / files[0]
        with open(calls, "a") as file:
            file.write(f"{rank()} {files[0]}\n")
        time.sleep(0.2)
        if case == "fails":
            raise ModelError("no network here")
        cache.mkdir(exist_ok=True)
        (cache / files[0]).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
        return cache / files[0]

    nodes = two_nodes() if case == "two_nodes" else contextlib.nullcontext()
    with nodes, mock.patch.object(downloads, "fetch", fake), mock.patch.object(downloads, "fetch_all", fake):
        if case == "fails":
            expect_failure(lambda: find_model_folder("some/model", True), "could not be downloaded (no network here)")
        elif case == "gone_folder":
            expect_failure(lambda: find_model_folder("./gone", True), "no such folder")
        else:
            assert find_model_folder("some/model", True) == cache
    if rank() == 0 and case in ("one", "two_nodes"):
        readers = [int(line.split()[0]) for line in calls.read_text().splitlines()]
        assert sorted(readers) == ([0] * 4 if case == "one" else [0] * 4 + [2] * 4)


def do_data(folder: Path, case: str) -> None:
    """The first rank of each node tokenizes fine-tuning data; a wrong record stops all ranks and is reported by one."""
    from unittest import mock

    from helpers import make_tiny_tokenizer
    from oarlock.config.finetune import FinetuneDataSection
    from oarlock.data.examples import dataset
    from oarlock.data.tokenizers.load import load_tokenizer
    from oarlock.environment.ranks import rank

    place = folder / f"data-{case}"
    records = [{"src": f"q{i}", "tgt": f"a{i}"} for i in range(5)] + [{"src": "q"}] * (case == "wrong")
    text = "\n".join(map(json.dumps, records))
    (place / f"of-{rank()}").mkdir(parents=True)
    (place / f"of-{rank()}" / "train.jsonl").write_text(text)  # the content counts, not the path
    tokenizer = load_tokenizer(str(make_tiny_tokenizer(place / f"of-{rank()}")))
    cache = place / (f"cache-{rank() // 2}" if case == "two_nodes" else "cache")
    section = FinetuneDataSection(dataset_name_or_path=str(place / f"of-{rank()}"), data_cache_dir=str(cache))
    really = dataset._write_examples

    def counted(*arguments):
        (place / f"made-by-{rank()}").touch()
        really(*arguments)

    with (
        two_nodes() if case == "two_nodes" else contextlib.nullcontext(),
        mock.patch.object(dataset, "_write_examples", counted),
    ):
        if case == "gone":
            shutil.rmtree(place / f"of-{rank()}")
            expect_failure(lambda: dataset.load_finetune_data(section, tokenizer), "of-0: not a file or folder")
        elif case == "wrong":
            expect_failure(lambda: dataset.load_finetune_data(section, tokenizer), "of-0/train.jsonl:6: field 'tgt'")
        else:
            train = dataset.load_finetune_data(section, tokenizer).train
            assert len(train) == 5 and train.examples.folder.parent == cache
            assert train.examples.locate(4) == f"{place}/of-{rank()}/train.jsonl:5"
    if rank() == 0:
        makers = sorted(path.name for path in place.glob("made-by-*"))
        assert makers == {"two_nodes": ["made-by-0", "made-by-2"], "gone": []}.get(case, ["made-by-0"])
