"""paddlenlp without the parts that training does not use; they are imported on access."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.compat import lazy_imports

LLM = Path(__file__).resolve().parents[3] / "llm"
HEAVY = (
    "sklearn",
    "pandas",
    "pyarrow",
    "fastapi",
    "scipy.stats",
    "paddlenlp.taskflow.taskflow",
    "paddlenlp.metrics.chunk",
)
SAY = """
import json, sys
packages = (paddlenlp, paddlenlp.transformers, paddlenlp.trainer, paddlenlp.peft, paddlenlp.data, paddlenlp.generation)
names = sorted(f"{package.__name__}.{name}" for package in packages for name in dir(package) if not name.startswith("_"))
library = sorted(m.__name__ for m in sys.modules.values() if type(vars(m).get("datasets")).__name__ == "_Library")
print(json.dumps({"modules": sorted(sys.modules), "names": names, "library": library}))
"""


def run(code: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(LLM)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain() -> dict:
    return run("import paddlenlp" + SAY)


@pytest.fixture(scope="module")
def light() -> dict:
    return run("from oarlock.environment.paddle_import import import_paddle\nimport_paddle()\nimport paddlenlp" + SAY)


def test_paddlenlp_still_imports_everything(plain):
    missing = [name for name in HEAVY if name not in plain["modules"]]
    assert not missing, f"paddlenlp no longer imports {missing}: oarlock.compat.lazy_imports may leave less out"


def test_unused_parts_are_not_imported(light):
    assert not set(HEAVY) & set(light["modules"])
    assert not {part_of(name) for name in light["modules"]} & lazy_imports._PARTS
    assert "datasets" not in light["modules"]
    assert light["library"] == ["paddlenlp.trainer.trainer"]


def test_nothing_else_is_left_out(plain, light):
    lost = {name.removeprefix("paddlenlp.") for name in set(plain["names"]) - set(light["names"])}
    # The last one is a submodule that exists once trl has imported it.
    assert lost == {*lazy_imports._PARTS, *lazy_imports._CLASSES, "transformers.kto_criterion"}


def part_of(module: str) -> str | None:
    """ "trainer" of paddlenlp.trainer.trainer_utils."""
    names = module.split(".")
    return names[1] if names[0] == "paddlenlp" and len(names) > 1 else None


def test_every_part_is_imported_on_access():
    code = """
from oarlock.environment.paddle_import import import_paddle
import_paddle()
import paddlenlp, json, inspect
from paddlenlp import trl
from paddlenlp.metrics import ChunkEvaluator
from paddlenlp.trainer import trainer, trainer_compress
before = isinstance([], trainer.datasets.Dataset)
import datasets
rows = datasets.Dataset.from_list([{"a": 1}])
found = {
    "library": not before and isinstance(rows, trainer.datasets.Dataset),
    "taskflow": inspect.isclass(paddlenlp.Taskflow) and inspect.isclass(paddlenlp.SimpleServer),
    "trl": "sft_trainer" in dir(trl) and trl is paddlenlp.trl,
    "metrics": inspect.isclass(ChunkEvaluator),
    "datasets": paddlenlp.datasets.MapDataset([1, 2])[1] == 2,
    "captured": type(trainer_compress.ChunkEvaluator(["O", "B-X"])) is ChunkEvaluator,
    "rest": all(inspect.ismodule(getattr(paddlenlp, part)) for part in ("dataaug", "prompt", "experimental", "mergekit", "seq2vec", "embeddings")),
}
try:
    paddlenlp.nothing
    found["unknown"] = False
except AttributeError:
    found["unknown"] = True
print(json.dumps(found))
"""
    found = run(code)
    assert all(found.values()), found
