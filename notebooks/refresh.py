"""Run the notebook from its first cell to its last and keep the outputs: python notebooks/refresh.py."""

import sys
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).with_name("aistudio_quickstart.ipynb")
OUTPUT = NOTEBOOK.parent.parent / "output" / "aistudio"


def execute(notebook: NotebookNode) -> None:
    """Every cell in place, without times; raises nbclient's CellExecutionError where one fails."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=resources, record_timing=False, coalesce_streams=True
    ).execute()


def main() -> None:
    """Refresh the saved outputs."""
    if OUTPUT.exists():
        sys.exit(f"{OUTPUT} holds an earlier run, which the notebook would only go on with: delete it first")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
