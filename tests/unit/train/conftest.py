""""""

from __future__ import annotations

import pytest

from helpers import write_checkpoint
from oarlock.train.output.folder_guard import RUN_FILE
from oarlock.train.output.lock import hold_output_lock

# losing the folder of a run


@pytest.fixture
def run(tmp_path):
    """A run in a folder with a checkpoint."""
    folder = tmp_path / "out"
    with hold_output_lock(folder):
        (folder / RUN_FILE).write_text("{}")
        write_checkpoint(folder / "checkpoint-2", 2)
        yield folder
