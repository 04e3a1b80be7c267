"""The record of a run in its output folder: configuration, command, versions."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import paddle

from oarlock.environment import matmul_library
from oarlock.environment.ranks import world_size
from oarlock.files import write_json, write_text_atomically
from oarlock.train.output.folder_guard import RUN_FILE
from oarlock.versions import read_package_versions

CONFIG_FILE = "oarlock_config.yaml"


def record_run(output_dir: Path, text: str) -> None:
    """Write the resolved configuration, the command and the versions.

    Args:
        text: the configuration as YAML.
    """
    write_text_atomically(output_dir / CONFIG_FILE, text)
    write_json(
        output_dir / RUN_FILE,
        {
            "command": shlex.join([sys.executable.rsplit("/", 1)[-1], *sys.argv]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": world_size(),
            "device": paddle.device.get_device(),
            "products": matmul_library.find_library_in_use(),
            "versions": read_package_versions(),
        },
    )
