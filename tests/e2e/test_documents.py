"""Every command of the documentation runs as written, in reading order, in one folder that begins with the quickstart.

Each page continues where the previous one ended, as a reader does. A command may be skipped only for a reason below; a
command for GPUs must report that on a machine without one.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers import ROOT

PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("README", "data", "training", "from_scratch", "recipes", "parallelism", "methods")
    ),
    *(
        f"docs/{name}.md"
        for name in ("merging", "conversion", "export", "serving", "python_api", "security", "troubleshooting")
    ),
    *(f"docs/{name}.md" for name in ("coming_from", "not_supported", "families", "benchmarks", "comparison")),
]
# The parts of a checkout that commands name; output, data and the like belong to the folder.
CHECKOUT = ("README.md", "CHANGELOG.md", "configs", "constraints.txt", "custom_ops", "deploy", "docs", "llm", "pyproject.toml", "scripts", "setup.py")  # fmt: skip
QUICKSTART = {"PRETRAIN_STEPS": "30", "TUNING_EPOCHS": "0.3"}
NOT_HERE = {  # beginning of a command -> the reason why it is not run
    "bash scripts/parity_env.sh": "scripts/test.sh has run it",
    "python tests/fuzz/": "tests/fuzz and tests/unit/train/test_manifest.py do what it does",
    "pip install": "scripts/setup.sh has done it",
    "sbatch": "there is no batch system here",
}
# Commands for GPUs, and their error on a machine without one.
FOR_GPUS = {
    "bash scripts/finetune_lora.sh": "no NVIDIA GPU here",
    "DATA=my_questions OUTPUT=output/lora_7b": "no NVIDIA GPU here",
    "RECIPE=lora_13b GPUS=0,1": "no NVIDIA GPU here",
    "bash scripts/run_trainer.sh": "no NVIDIA GPU here",
    "bash scripts/run_trainer_tp4pp2.sh": "no NVIDIA GPU here",
    "oarlock launch --gpus": "no NVIDIA GPU here",
    "NNODES=4": "no NVIDIA GPU here",
    "python -m paddle.distributed.launch --gpus": None,  # on a CPU build, Paddle's launcher fails with its own message
}
SERVERS = {"oarlock serve": "oarlock: ready after", "visualdl": "Running VisualDL"}
TIMEOUT_S = 600  # per command; only guards against hanging


def blocks(page: str) -> list[list[str]]:
    """The commands of each ```bash block, without comments; a ```python block of the Python API is one program."""
    found = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S):
        if language == "python":
            found += [[f"python -c {shlex.quote(block)}"]] if page == "docs/python_api.md" else []
            continue
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
        found.append(lines)
    return found


@dataclass
class Reader:
    """A reader who types the commands in `folder`."""

    folder: Path
    failed: str = ""
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in CHECKOUT:
            (self.folder / name).symlink_to(ROOT / name)
        programs = Path(sys.executable).parent
        self.folder.joinpath(".venv").symlink_to(programs.parent)
        self.environment = {
            **os.environ,
            **QUICKSTART,
            "VENV": str(programs.parent),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "llm"),
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, line: str, log: Path, **given: object) -> subprocess.Popen[str]:
        with open(log, "w", encoding="utf-8") as out:
            return subprocess.Popen(
                ["bash", "-c", line], cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT,
                text=True, start_new_session=True, **given,
            )  # fmt: skip

    def type(self, line: str) -> tuple[int, str]:
        """Run a command and return its exit code and output; a server is left running."""
        log = self.folder / "said.log"
        server = next((ready for start, ready in SERVERS.items() if line.startswith(start)), None)
        if server is not None:
            self.stop_servers()
            return self.serve(line, server)
        process = self.start(line, log, stdin=subprocess.PIPE)
        try:  # chat reads questions, one per line
            process.communicate("Repeat the words. river\n", timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124, log.read_text(encoding="utf-8")
        return process.returncode, log.read_text(encoding="utf-8")

    def serve(self, line: str, ready: str) -> tuple[int, str]:
        log = self.folder / f"server-{len(self.servers)}.log"
        self.servers.append(process := self.start(f"exec {line}", log, stdin=subprocess.DEVNULL))
        deadline = time.monotonic() + TIMEOUT_S
        while ready not in (said := log.read_text(encoding="utf-8")):
            if process.poll() is not None or time.monotonic() > deadline:
                return process.poll() or 124, said
            time.sleep(0.1)
        return 0, said

    def stop_servers(self) -> None:
        for process in self.servers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(120)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def check(self, line: str) -> None:
        """Type a line and check that it does what the page says."""
        gpus = next((said for start, said in FOR_GPUS.items() if line.startswith(start)), "")
        code, said = self.type(line)
        report = f"$ {line}\n{said[-4000:]}\nexit code {code}"
        if gpus != "":
            assert code != 0 and (gpus is None or gpus in said), report
        else:
            assert code == 0, report
            assert "Traceback" not in said, report


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    made = Reader(tmp_path_factory.mktemp("reader"))
    yield made
    made.stop_servers()


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(reader: Reader, page: str) -> None:
    if reader.failed:
        pytest.fail(f"not run: the chain broke at {reader.failed}")
    reader.failed = page
    for lines in blocks(page):
        for line in lines:
            if any(line.startswith(start) for start in NOT_HERE):
                continue
            started = time.monotonic()
            reader.check(line)
            print(f"{time.monotonic() - started:6.1f} s  {line[:110]}", flush=True)
    reader.stop_servers()
    reader.failed = ""


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "scripts").glob("*_*.sh") if "REHEARSAL=" in path.read_text())
)
def test_what_a_script_advises_without_a_gpu_works(reader: Reader, script: str) -> None:
    code, said = reader.type(f"bash scripts/{script}")
    assert code == 2 and "no NVIDIA GPU here" in said
    (advice,) = [line.strip() for line in said.splitlines() if f"scripts/{script}" in line]
    reader.check(f"OUTPUT=output/advised_{script} LOG_DIR=output/advised_log {advice}")


def test_every_page_is_read() -> None:
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(PAGES)


def test_reasons_are_needed() -> None:
    every = [line for page in PAGES for lines in blocks(page) for line in lines]
    for start in (*NOT_HERE, *FOR_GPUS):
        assert any(line.startswith(start) for line in every), f"no command begins with {start!r}"
