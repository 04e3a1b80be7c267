"""The notebook runs from its first cell to its last, and its saved outputs are small and name no machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import LLM, ROOT, read_rows

sys.path.insert(0, str(ROOT / "notebooks"))
from refresh import NOTEBOOK, execute

STEPS, EPOCHS = 4, "0.05"


def text_of(cell: Any) -> str:
    """The output of a code cell."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell: Any) -> list[str]:
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook: Any) -> None:
    """Check for a loss curve, an evaluation and three answers of any content."""
    *_, tuning, curve, asked = code_cells(notebook)
    assert "eval_exact_match" in text_of(tuning)
    assert len(pictures_of(curve)) == 1
    assert len(re.findall(r"^Q: .+\nA: ", text_of(asked), re.M)) == 3, text_of(asked)
    assert "反义词是什么？" in text_of(asked)
    for cell in code_cells(notebook):
        assert not any(output.output_type == "error" for output in cell.outputs)


@pytest.fixture
def kernel_environment(tmp_path, monkeypatch) -> Path:
    """Environment for short runs in a folder of the test; the package of this checkout counts as installed."""
    monkeypatch.setenv("PYTHONPATH", str(LLM))
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("PRETRAIN_STEPS", str(STEPS))
    monkeypatch.setenv("LORA_EPOCHS", EPOCHS)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path / "out"


def test_the_notebook_runs(kernel_environment):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)  # errors of cells are raised
    check_outputs(notebook)
    base, lora = (read_rows(kernel_environment / run / "metrics.jsonl") for run in ("base", "lora"))
    assert max(row["step"] for row in base) == STEPS and any("eval_perplexity" in row for row in base)
    assert any("eval_exact_match" in row for row in lora)
    assert (kernel_environment / "lora" / "adapter.json").exists()
    assert list((kernel_environment / "lora" / "visualdl").iterdir())


def test_the_saved_outputs_are_of_a_complete_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    check_outputs(notebook)
    asked = code_cells(notebook)[-1]
    assert "A: 山\n" in text_of(asked), "a run long enough to learn"


def test_the_notebook_is_small_and_contains_no_machine_paths():
    assert NOTEBOOK.stat().st_size < 200_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        texts = [cell.source, *(text_of(cell).splitlines() if cell.cell_type == "code" else [])]
        for text in texts:
            found = re.search(r"(?<![\w.:/}])(/(home|root|work|tmp|usr|opt|mnt|var|Users)/\S+|[A-Z]:\\)", text)
            assert not found, found
    assert not [
        name for name in (os.uname().nodename, str(Path.home())) if len(name) > 5 and name in NOTEBOOK.read_text()
    ]


def test_installation_is_skipped_if_oarlock_is_installed():
    """Runs the cell also with a Python that has no oarlock and a pip that records its arguments."""
    (cell,) = [cell for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4)) if "pip install" in cell.source]
    script = cell.source.removeprefix("%%bash\n")

    def run(oarlock: bool) -> str:
        stand_in = (
            'python() { case "$*" in "-c import oarlock") return '
            + str(int(not oarlock))
            + ';; *) echo "python $*";; esac; }\n'
        )
        done = subprocess.run(["bash", "-c", stand_in + script], capture_output=True, text=True, cwd=ROOT, check=True)
        return done.stdout

    assert "pip install" not in run(oarlock=True)
    assert "-c constraints.txt ." in run(oarlock=False)


_INTERFACE_CELLS = (
    "import oarlock\nfrom oarlock import *",
    "options = dict(model_name_or_path=MODEL, max_steps=2, warmup_steps=1, gradient_accumulation_steps=1, logging_steps=1)\n"
    "first = finetune('lora_7b', output_dir='first', **options)",
    "again = finetune(load_config('finetune', 'lora_7b', output_dir='again', **options))\n"
    "losses = [[row['loss'] for row in run.metrics if 'loss' in row] for run in (first, again)]\n"
    "print(losses[0] == losses[1] and len(losses[0]) == 2)",
    "merge_adapters([first.output_dir], 'merged')\nprint(convert_model('merged', 'hf', 'hf').proof.difference)",
    "print(len(ask('merged', ['one', 'two'])))",
    "print(export_model('vllm', 'served', model=MODEL, adapters=['again']), check_export('served'))",
    "engine = Engine.load('merged')\nprint(sum(1 for _ in engine.stream(Prompt(text='a'), SamplingParams(max_tokens=3))))\nengine.close()",
    "try:\n    finetune('lora_7b', output_dir='third', **options | {'model_name_or_path': './nowhere'})\n"
    "except ModelError as error:\n    print(error)",
    "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
)


def test_the_python_api_works_in_cells(tiny_model, tmp_path, monkeypatch):
    """The runs follow one another in one kernel; a failure raises an exception in its cell and the kernel survives."""
    monkeypatch.setenv("PYTHONPATH", str(LLM))
    notebook = nbformat.v4.new_notebook()
    sources = (f"MODEL = {str(tiny_model)!r}", *_INTERFACE_CELLS)
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [text_of(cell).splitlines() for cell in notebook.cells]
    assert printed[3][-1] == "True" and float(printed[4][-1]) < 1e-4 and printed[5][-1] == "2"
    assert printed[6][-1] == "served []" and int(printed[7][-1]) > 0
    assert "./nowhere: no such folder" in printed[8][-1] and printed[9] == ["True"]
