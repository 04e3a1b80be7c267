"""`oarlock launch --slurm` and launch.slurm, with stand-ins for Slurm's programs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, reset_signals
from oarlock.errors import ConfigError
from oarlock.launch.slurm import SlurmJob
from support.launch_scripts import SCRIPTS
from support.launched import LAUNCHER, SUPERVISE, find_leftover_processes, list_names, wait_until

PROGRAMS = ROOT / "tests" / "support" / "slurm_programs.py"


class Job:
    """launch.slurm as slurmd runs it: a copy in a spool folder, started in the submission folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("bin", "spool", "work"):
            (folder / name).mkdir()
        for name in ("srun", "scontrol", "scancel"):
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{PROGRAMS.read_text()}")
            (folder / "bin" / name).chmod(0o755)
        # The program on every node in these tests: two ranks that wait for a signal, or exit with the given codes.
        self.script = folder / "work" / "my script.sh"
        self.script.write_text(
            f'printf "%s|" "$NODE_RANK" "$NNODES" "$MASTER" "$GPUS" "$@" >"{folder}/node-$NODE_RANK"\n'
            f'mkdir -p "{folder}/ranks-$NODE_RANK"\n'
            f'exec "$PYTHON" "{SUPERVISE}" launcher "{LAUNCHER}" "{folder}/ranks-$NODE_RANK" ${{RANKS:-2}} $CODES\n'
        )
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "PYTHON": sys.executable,
            "SLURM_RECORD": str(folder), "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(folder / "work"), "SUBMITTED": str(SCRIPTS / "launch.slurm"),
        }  # fmt: skip

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        shutil.copy(SCRIPTS / "launch.slurm", self.folder / "spool" / "slurm_script")
        return subprocess.Popen(
            ["bash", str(self.folder / "spool" / "slurm_script"), *words], cwd=self.folder / "work",
            env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=reset_signals,
        )  # fmt: skip

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def requeued(self) -> bool:
        return (self.folder / "scontrol").exists() and "requeue 4242" in (self.folder / "scontrol").read_text()


@pytest.fixture
def job(tmp_path):
    yield Job(tmp_path)
    for node in range(2):
        for process in find_leftover_processes(tmp_path / f"ranks-{node}"):
            process.kill()


def test_a_script_runs_on_every_node_with_its_node_rank(job):
    code, output = job.run("my script.sh", "a b", "", "$HOME", CODES="0")
    assert code == 0, output
    for node in range(2):
        expected = f"{node}|2|node1:{20000 + 4242}|8|a b||$HOME|"
        assert (job.folder / f"node-{node}").read_text() == expected
    assert "--kill-on-bad-exit=1" in (job.folder / "srun").read_text() and not job.requeued
    assert f"slurm: job 4242 on 2 node(s), master node1:{20000 + 4242}, start 1: my script.sh a b" in output


def test_the_4d_script_is_the_default(job):
    code, output = job.run("--max_steps", "9", DRY_RUN="1", MASTER="", SLURM_JOB_NUM_NODES="1")
    assert code == 0, output
    assert (
        "run_pretrain.py pretrain_4d_7b" in output and "--max_steps 9" in output and "--gpus 0,1,2,3,4,5,6,7" in output
    )


@pytest.mark.parametrize("signals", [1, 2])
def test_before_the_time_limit_all_ranks_save_and_the_job_is_requeued_once(job, signals):
    process = job.start("my script.sh")
    wait_until(lambda: len(list_names(job.folder, "ranks-*/ready-*")) == 4, "four ranks")
    for _ in range(signals):
        process.send_signal(signal.SIGUSR1)
        wait_until((job.folder / "scancel").exists, "scancel")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert len(list_names(job.folder, "ranks-*/saved-*")) == 4, output
    assert (job.folder / "scancel").read_text().splitlines() == ["--signal=TERM 4242"]
    assert (job.folder / "scontrol").read_text().count("requeue 4242") == 1
    assert not (job.folder / "srun-got-SIGTERM").exists()


def test_a_job_stopped_while_it_starts_is_requeued(job):
    process = job.start("my script.sh", RANKS="0")
    wait_until(lambda: len(list_names(job.folder, "ranks-*/ready-launcher")) == 2, "two launchers")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and job.requeued, output


def test_a_cancelled_job_saves_and_is_not_requeued(job):
    process = job.start("my script.sh")
    wait_until(lambda: len(list_names(job.folder, "ranks-*/ready-*")) == 4, "four ranks")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "cancelled" in output
    assert len(list_names(job.folder, "ranks-*/saved-*")) == 4 and not job.requeued


def test_a_failed_job_is_not_requeued(job):
    code, output = job.run("my script.sh", CODES="2")
    assert code == 2 and not job.requeued and "slurm: ended with code 2" in output


def test_a_job_that_fails_while_saving_is_not_requeued(job):
    job.script.write_text('trap "kill \\$!; exit 3" TERM; touch ready-$NODE_RANK; sleep 60 & wait\n')
    process = job.start("my script.sh")
    wait_until(lambda: len(list_names(job.folder / "work", "ready-*")) == 2, "two nodes")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and not job.requeued, output


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {"SLURM_JOB_ID": ""}, "not in a Slurm job; start it with: sbatch"),
        ([], {"SUBMITTED": "/elsewhere/launch.slurm"}, "submit from the repository's folder"),
        (["absent.sh"], {}, "there is no script absent.sh"),
    ],
)
def test_invalid_options_are_named(job, words, environment, expected):
    code, output = job.run(*words, **environment)
    assert code == 2 and expected in output
    assert not (job.folder / "srun").exists(), "started all the same"


def test_a_copy_outside_the_repository_needs_the_installed_command(job):
    (job.folder / "bin" / "oarlock").write_text('#!/bin/sh\necho "installed: $@"\n')
    (job.folder / "bin" / "oarlock").chmod(0o755)
    assert job.run("my script.sh", SUBMITTED="/elsewhere/launch.slurm") == (
        0,
        "installed: launch --slurm my script.sh\n",
    )


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("value", ["a[$(touch RUN)]", "-1", "1.5", "9" * 13])
def test_slurm_variables_must_be_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a number"):
        SlurmJob.from_environment({"SLURM_JOB_ID": "7", name: value})


def test_slurm_job_records_are_parsed():
    found = SlurmJob.from_environment({"SLURM_JOB_ID": "12007", "SLURM_JOB_NUM_NODES": "4", "SLURM_RESTART_COUNT": "2"})
    assert found == SlurmJob(number=12007, nodes=4, restarts=2, nodelist="")


def test_sbatch_directives():
    lines = [line.split(" ", 1)[1] for line in (SCRIPTS / "launch.slurm").read_text().splitlines() if "#SBATCH" in line]
    given = dict(line.removeprefix("--").partition("=")[::2] for line in lines if line.startswith("--"))
    assert given["ntasks-per-node"] == "1" and given["output"] == "%x-%j.log" and given["open-mode"] == "append"
    assert {"nodes", "gpus-per-node", "time", "requeue"} <= set(given)
    assert given["signal"] == "B:USR1@120"
    assert os.access(SCRIPTS / "run_trainer_tp4pp2.sh", os.X_OK)
