"""The launch scripts: the published commands, 4D degrees, several nodes, rehearsals on a CPU, signals, and Slurm.

Stand-ins for nvidia-smi, getent, Python with Paddle's launcher, and Slurm's programs record what the scripts do.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import ROOT, heed_signals, rows
from oarlock.config import PretrainConfig, load_config

SCRIPTS = ROOT / "scripts"
ENTRYPOINT = str(ROOT / "llm" / "run_pretrain.py")

# The published commands: with sharding stage 2, and the 4D one, which shares what was not published of it.
SHARED = """
--model_type llama --model_name_or_path facebook/llama-7b --tokenizer_name_or_path facebook/llama-7b
--input_dir ./data --split 949,50,1 --max_seq_length 2048 --per_device_train_batch_size 1
--use_flash_attention 1 --use_fused_rms_norm 0 --fp16 --fp16_opt_level O2 --learning_rate 0.00001
--lr_scheduler_type cosine --max_steps 10000 --save_steps 5000 --weight_decay 0.01 --warmup_ratio 0.01
--max_grad_norm 1.0 --dataloader_num_workers 1 --eval_steps 1000 --report_to visualdl --disable_tqdm true
--continue_training 1 --recompute 1 --do_train --do_eval --device gpu
"""
STAGE_2 = f"""{SHARED} --output_dir output/llama_hybid --per_device_eval_batch_size 1 --scale_loss 1024
--min_learning_rate 0.000005 --logging_steps 20 --sharding stage2
"""
TP4_PP2 = f"""{SHARED} --output_dir output/llama_4d --gradient_accumulation_steps 4 --per_device_eval_batch_size 4
--scale_loss 512 --tensor_parallel_degree 4 --pipeline_parallel_degree 2 --virtual_pp_degree 1 --sequence_parallel 0
--sharding stage1 --min_learning_rate 0.000001 --logging_steps 10
"""

# Paddle's launcher as far as the scripts see it: trainers in sessions of their own, and the first one's exit code.
LAUNCHER = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
from pathlib import Path

fake, rank = Path(os.environ["FAKE"]), os.environ.get("NODE_RANK", "0")
with open(fake / f"launched-{{rank}}.jsonl", "a") as file:
    names = ("CUDA_VISIBLE_DEVICES", "PADDLE_DISTRI_BACKEND")
    secret = os.environ.get("OARLOCK_LAUNCH_SECRET_FILE", "")
    content = Path(secret).read_bytes().hex() if secret else ""
    seen = {{"words": sys.argv[1:], "environment": {{n: os.environ.get(n) for n in names}}, "secret": [secret, content]}}
    file.write(json.dumps(seen) + "\\n")
if os.environ.get("FAKE_DOES") == "start":  # waiting for the other nodes, where SIGTERM ends it with code 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    (fake / f"ready-{{rank}}").touch()
    time.sleep(60)
elif os.environ.get("FAKE_DOES") == "train":
    code = '''
import signal, sys
from pathlib import Path

def stop(*_):
    Path(sys.argv[1], "saved-" + sys.argv[2]).touch()
    sys.exit(int(sys.argv[3]))

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1], "ready-" + sys.argv[2]).touch()
signal.pause()
'''
    def killed(*_):
        (fake / f"launcher-{{rank}}-got-SIGTERM").touch()
        sys.exit(15)

    signal.signal(signal.SIGTERM, killed)
    signal.signal(signal.SIGINT, killed)
    words = [sys.executable, "-c", code, str(fake)]
    end = os.environ.get("FAKE_CODE", "0")
    trainers = [subprocess.Popen([*words, f"{{rank}}-{{i}}", end], start_new_session=True) for i in range(2)]
    sys.exit([trainer.wait() for trainer in trainers][0])
codes = os.environ.get("FAKE_CODES", "0").split(",")
starts = len((fake / f"launched-{{rank}}.jsonl").read_text().splitlines())
sys.exit(int(codes[min(starts, len(codes)) - 1]))
"""

NVIDIA_SMI = """#!/bin/sh
[ "$FAKE_GPUS" = 0 ] && exit 9
i=0; while [ $i -lt "$FAKE_GPUS" ]; do echo "GPU $i: NVIDIA A100 (UUID: GPU-0000-$i)"; i=$((i + 1)); done
"""

GETENT = """#!/bin/sh
case $2 in
  node[1-9]) echo "10.0.0.${2#node}     STREAM $2" ;;
  loopback) echo "127.0.1.1       STREAM $2" ;;
  *) exit 2 ;;
esac
"""

SRUN = """#!/usr/bin/env bash
trap 'touch "$FAKE/srun-got-SIGTERM"' TERM
printf '%s\\n' "$@" >"$FAKE/srun"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_GPUS_ON_NODE=8 "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$FAKE/tasks"
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") for ((i = 1; i <= SLURM_JOB_NUM_NODES; i++)); do echo "node$i"; done ;;
  "show job") printf 'JobId=%s JobName=oarlock\\n   Command=%s --some flag\\n   WorkDir=/\\n' "$3" "$FAKE_COMMAND" ;;
  requeue*) echo "$*" >>"$FAKE/requeued" ;;
  *) exit 1 ;;
esac
"""

SCANCEL = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/scancel"
kill -TERM $(<"$FAKE/tasks")
"""


class Machine:
    """A folder of stand-in programs, and what they recorded."""

    def __init__(self, folder: Path, gpus: int = 8) -> None:
        self.folder, self.work = folder / "records", folder / "work folder"
        self.programs = folder / "bin"
        for made in (self.folder, self.work, self.programs):
            made.mkdir(parents=True)
        for name, text in {
            "python": LAUNCHER, "nvidia-smi": NVIDIA_SMI, "getent": GETENT, "srun": SRUN, "scontrol": SCONTROL,
            "scancel": SCANCEL, "hostname": '#!/bin/sh\necho "10.0.0.9 172.17.0.1 "\n',
        }.items():  # fmt: skip
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "HOME": str(folder),
            "FAKE": str(self.folder),
            "FAKE_GPUS": str(gpus),
            "PYTHON": str(self.programs / "python"),
        }

    def start(self, script: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
        """The script, in a process group of its own as a terminal or Slurm gives it."""
        return subprocess.Popen(
            ["bash", str(script), *words],
            cwd=self.work,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(SCRIPTS / script, *words, **environment)
        output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def dry_run(self, script: str, *words: str, **environment: str) -> tuple[list[str], list[str]]:
        """Words of the command before and after the training script."""
        result = self.run(script, *words, DRY_RUN="1", **environment)
        assert result.returncode == 0, result.stderr
        (line,) = result.stdout.splitlines()
        found = shlex.split(line)
        assert found[:4] == [self.environment["PYTHON"], "-u", "-m", "paddle.distributed.launch"]
        position = found.index(ENTRYPOINT)
        return found[4:position], found[position + 1 :]

    def error(self, script: str, *words: str, **environment: str) -> str:
        result = self.run(script, *words, **environment)
        assert result.returncode == 2 and not result.stdout
        assert not list(self.folder.glob("launched*")), "started all the same"
        return result.stderr

    def launched(self, rank: int = 0) -> list[dict[str, Any]]:
        return rows(self.folder / f"launched-{rank}.jsonl")

    def names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))

    def wait_for(self, pattern: str, count: int) -> None:
        wait_until(lambda: len(self.names(pattern)) == count, f"{count} {pattern}")


def is_waiting(pid: int) -> bool:
    """Whether a process waits for a child, as far as this kernel tells."""
    return Path(f"/proc/{pid}/wchan").read_text() in ("do_wait", "0", "")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in psutil.process_iter():  # where a test fails, in sessions of their own
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FAKE") == made.environment["FAKE"]:
                process.kill()


def parsed(words: list[str]) -> PretrainConfig:
    return load_config(PretrainConfig, words).config


def options(words: list[str]) -> dict[str, str]:
    """--name value pairs; a flag without a value has ""."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            found[name] = ""
        else:
            found[name] = word
    return found


# the commands


@pytest.mark.parametrize("name", ["launch_common.sh", "run_trainer.sh", "run_trainer_tp4pp2.sh", "launch.slurm"])
def test_bash_can_read_it(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    assert name.startswith("launch") or os.access(SCRIPTS / name, os.X_OK)


@pytest.mark.parametrize(
    ("script", "published", "log"),
    [
        ("run_trainer.sh", STAGE_2, "output/llama_hybid_log"),
        ("run_trainer_tp4pp2.sh", TP4_PP2, "output/llama_4d_log"),
    ],
)
def test_on_8_gpus_it_is_the_published_command(machine: Machine, script: str, published: str, log: str) -> None:
    launcher, words = machine.dry_run(script)
    assert launcher == ["--gpus", "0,1,2,3,4,5,6,7", "--log_dir", log]
    assert options(words) == options(shlex.split(published))
    assert parsed(words) == parsed(shlex.split(published))


def test_32_gpus_on_4_nodes_are_4d(machine: Machine) -> None:
    for node in range(4):
        launcher, words = machine.dry_run(
            "run_trainer_tp4pp2.sh", NNODES="4", MASTER="10.0.0.1:29500", NODE_RANK=str(node)
        )
        assert options(launcher) == {
            "gpus": "0,1,2,3,4,5,6,7", "nnodes": "4", "master": "10.0.0.1:29500", "rank": str(node),
            "log_dir": f"output/llama_4d_log/node-{node}", **({"host": "10.0.0.1"} if node == 0 else {}),
        }  # fmt: skip
        parallel = parsed(words).parallel
        degrees = (
            parallel.sharding_parallel_degree, parallel.tensor_parallel_degree, parallel.pipeline_parallel_degree
        )  # fmt: skip
        assert degrees == (2, 4, 2) and parallel.sharding == "stage2"
        changed = {"sharding": "stage2", "sharding_parallel_degree": "2"}
        assert options(words) == options(shlex.split(TP4_PP2)) | changed


@pytest.mark.parametrize(
    ("environment", "said", "flags"),
    [
        ({"GPUS": "8"}, "data 1 x sharding 1 (stage1) x tensor 4 x pipeline 2", ("stage1", None)),
        ({"GPUS": "16"}, "data 1 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        ({"GPUS": "24"}, "data 1 x sharding 3 (stage2) x tensor 4 x pipeline 2", ("stage2", "3")),
        ({"GPUS": "32"}, "data 2 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        ({"GPUS": "48"}, "data 3 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        (
            {"GPUS": "32", "SHARDING_DEGREE": "4", "SHARDING": "stage1"},
            "data 1 x sharding 4 (stage1) x tensor 4 x pipeline 2",
            ("stage1", "4"),
        ),
        ({"GPUS": "8", "TP": "2", "PP": "1"}, "data 2 x sharding 2 (stage2) x tensor 2 x pipeline 1", ("stage2", "2")),
    ],
)
def test_degrees(machine: Machine, environment: dict[str, str], said: str, flags: tuple[str, str | None]) -> None:
    result = machine.run("run_trainer_tp4pp2.sh", DRY_RUN="1", **environment)
    assert said in result.stderr
    found = options(shlex.split(result.stdout))
    assert (found["sharding"], found.get("sharding_parallel_degree")) == flags


@pytest.mark.parametrize("script", ["run_trainer.sh", "run_trainer_tp4pp2.sh"])
def test_variables_and_flags_go_over_the_published_values(machine: Machine, script: str) -> None:
    launcher, words = machine.dry_run(
        script, "--max_steps", "20", "--learning_rate=3e-4", "--no_do_eval", "--seed", "7",
        MODEL="my models/it's", TOKENIZER="tok", DATA="1 a 2 b", OUTPUT="out put", GPUS="2,5", TP="2", PP="1",
        MODEL_TYPE="qwen2",
    )  # fmt: skip
    assert options(launcher) == {"gpus": "2,5", "log_dir": "out put_log"}
    config = parsed(words)
    assert config.model.model_name_or_path == "my models/it's" and config.model.tokenizer_name_or_path == "tok"
    assert config.model.model_type == "qwen2"
    assert config.data.input_dir == "1 a 2 b" and config.checkpoint.output_dir == "out put"
    assert config.schedule.max_steps == 20 and config.schedule.learning_rate == 3e-4 and config.runtime.seed == 7
    assert not config.evaluation.do_eval
    own = options(machine.dry_run(script, MODEL="m")[1])
    assert own["tokenizer_name_or_path"] == "m"


@pytest.mark.parametrize("script", ["run_trainer.sh", "run_trainer_tp4pp2.sh"])
def test_a_rehearsal_on_the_cpu(tmp_path: Path, script: str) -> None:
    machine = Machine(tmp_path, gpus=0)
    launcher, words = machine.dry_run(script, "--max_steps", "3", DEVICE="cpu", MODEL="small", GPUS="8")
    assert options(launcher)["nproc_per_node"] == "8" and "--gpus" not in launcher
    config = parsed(words)
    assert config.runtime.device == "cpu" and config.schedule.max_steps == 3
    assert config.data.input_dir is None, "no ./data: the embedded text"
    assert options(machine.dry_run(script, DEVICE="cpu", MODEL="small", DATA="mine")[1])["input_dir"] == "mine"
    (machine.work / "data").mkdir()
    assert options(machine.dry_run(script, DEVICE="cpu", MODEL="small")[1])["input_dir"] == "./data"
    result = machine.run(script, DEVICE="cpu", MODEL="small", GPUS="0,1,2,3,4,5,6,7", CUDA_VISIBLE_DEVICES="3")
    assert result.returncode == 0
    (start,) = machine.launched()
    assert start["environment"] == {"CUDA_VISIBLE_DEVICES": None, "PADDLE_DISTRI_BACKEND": "gloo"}


def test_ranks_on_a_cpu_get_a_secret_that_stands_nowhere(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    cpu = {"DEVICE": "cpu", "MODEL": "small", "GPUS": "2", "TMPDIR": str(tmp_path / "temporary")}
    for _ in range(2):
        assert machine.run("run_trainer.sh", **cpu).returncode == 0
    starts = machine.launched()
    (file, secret), (_, other) = (start["secret"] for start in starts)
    assert file.startswith("/proc/") and len(secret) == len(other) == 64 and secret != other
    assert not any(secret in word or file in word for word in starts[0]["words"])
    assert not Path(file).exists() and not list((tmp_path / "temporary").iterdir())
    (tmp_path / "own").write_bytes(b"s" * 32)
    assert machine.run("run_trainer.sh", **cpu, OARLOCK_LAUNCH_SECRET_FILE=str(tmp_path / "own")).returncode == 0
    assert machine.run("run_trainer.sh", **(cpu | {"DEVICE": "gpu"})).returncode == 0
    assert [start["secret"] for start in machine.launched()[2:]] == [
        [str(tmp_path / "own"), (b"s" * 32).hex()],
        ["", ""],
    ]


def test_nodes_on_a_cpu_ask_no_master(machine: Machine) -> None:
    cpu = {"DEVICE": "cpu", "MODEL": "small", "GPUS": "2", "NNODES": "3", "NODE_RANK": "1"}
    for master in ("127.0.0.1:1234", "10.0.0.9:1234"):
        launcher, _ = machine.dry_run("run_trainer.sh", **cpu, MASTER=master)
        expected = {"ips": "127.0.1.1,127.0.1.2,127.0.1.3", "start_port": "1234", "host": "127.0.1.2", "nnodes": "3"}
        assert expected.items() <= options(launcher).items() and "--master" not in launcher
    assert "is another machine's, and CPU ranks work on one" in machine.error(
        "run_trainer.sh", **cpu, MASTER="10.0.0.1:1234"
    )


def test_gpus_are_those_that_can_be_seen(machine: Machine) -> None:
    seen = machine.dry_run("run_trainer.sh", GPUS="2", CUDA_VISIBLE_DEVICES="4,5,6")[0]
    assert options(seen)["gpus"] == "4,5"
    assert machine.run("run_trainer.sh", GPUS="4,5").returncode == 0
    assert options(machine.launched()[0]["words"])["gpus"] == "4,5"


TWO = {"NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FAKE_GPUS": "0"}, "no NVIDIA GPU here (nvidia-smi lists none). To rehearse on the CPU,"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "no NVIDIA GPU here (CUDA_VISIBLE_DEVICES is empty)"),
        ({"FAKE_GPUS": "4"}, "asks for 8 GPUs, but 4 can be seen (0 1 2 3): set GPUS"),
        ({"GPUS": "7,8"}, "no GPU 8 here"),
        ({"GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "4,5"}, "no GPU 0 here (there are: 4 5)"),
        ({"GPUS": "many"}, "must be a list (0,1,2,3) or a number"),
        ({"GPUS": "0,,1"}, "must be a list (0,1,2,3) or a number"),
        ({"DEVICE": "tpu"}, 'DEVICE must be gpu or cpu; got "tpu"'),
        ({"DEVICE": "cpu"}, "DEVICE=cpu needs MODEL="),
        ({"NNODES": "two"}, "NNODES must be a number"),
        ({**TWO}, "NNODES=2 needs MASTER=host:port"),
        ({**TWO, "MASTER": "node1", "NODE_RANK": "0"}, 'MASTER must be host:port; got "node1"'),
        ({**TWO, "MASTER": "node1:29500"}, "NNODES=2 needs NODE_RANK"),
        ({**TWO, "MASTER": "node1:29500", "NODE_RANK": "2"}, "NODE_RANK must be from 0 to 1"),
        ({**TWO, "MASTER": "nowhere:29500", "NODE_RANK": "1"}, "the name nowhere has no IPv4 address"),
        ({"MAX_RESTART": "-1"}, "MAX_RESTART must be a number"),
    ],
)
def test_wrong_settings_are_named(machine: Machine, environment: dict[str, str], expected: str) -> None:
    for script in ("run_trainer.sh", "run_trainer_tp4pp2.sh"):
        assert expected in machine.error(script, **environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GPUS": "4"}, "4 ranks (1 node(s) x 4) can't be divided by TP 4 x PP 2 = 8"),
        ({"TP": "x"}, "TP must be a number of ranks"),
        ({"SHARDING_DEGREE": "2"}, "SHARDING_DEGREE=2 does not divide the 1 rank(s)"),
    ],
)
def test_degrees_that_do_not_fit_are_named(machine: Machine, environment: dict[str, str], expected: str) -> None:
    assert expected in machine.error("run_trainer_tp4pp2.sh", **environment)


def test_the_master_is_an_address(machine: Machine) -> None:
    first = options(machine.dry_run("run_trainer.sh", NNODES="2", MASTER="node1:29500", NODE_RANK="0")[0])
    assert first["master"] == "10.0.0.1:29500" and first["host"] == "10.0.0.1"
    second = options(machine.dry_run("run_trainer.sh", NNODES="2", MASTER="node1:29500", NODE_RANK="1")[0])
    assert second["master"] == "10.0.0.1:29500" and "host" not in second
    own = options(machine.dry_run("run_trainer.sh", NNODES="2", MASTER="loopback:29500", NODE_RANK="0")[0])
    assert own["master"] == "10.0.0.9:29500" and own["host"] == "10.0.0.9"


def test_the_python_is_the_repositorys_where_there_is_one(machine: Machine, tmp_path: Path) -> None:
    copied = tmp_path / "a copy"
    shutil.copytree(SCRIPTS, copied / "scripts")
    script = copied / "scripts" / "run_trainer.sh"

    def python(**environment: str) -> str:
        output, errors = machine.start(script, DRY_RUN="1", **environment).communicate(timeout=300)
        assert str(copied / "llm" / "run_pretrain.py") in shlex.split(output), errors
        return shlex.split(output)[0]

    assert python(PYTHON="") == str(machine.programs / "python")
    (copied / ".venv" / "bin").mkdir(parents=True)
    own = copied / ".venv" / "bin" / "python"
    shutil.copy(machine.programs / "python", own)
    assert python(PYTHON="") == str(own)
    assert python(PYTHON="/some/python") == "/some/python"


# running


def test_a_dry_run_starts_nothing(machine: Machine) -> None:
    assert machine.run("run_trainer.sh", DRY_RUN="1", FAKE_GPUS="0").returncode == 0
    assert not machine.names("launched*")
    assert machine.run("run_trainer.sh", DRY_RUN="0").returncode == 0
    assert machine.names("launched*")


@pytest.mark.parametrize(
    ("codes", "max_restart", "expected", "starts"),
    [
        ("0", "3", 0, 1),
        ("1", "", 1, 1),
        ("1,247,0", "3", 0, 3),
        ("241", "2", 241, 3),
        ("2", "3", 2, 1),
    ],
)
def test_failed_trainers_start_again(
    machine: Machine, codes: str, max_restart: str, expected: int, starts: int
) -> None:
    result = machine.run("run_trainer.sh", "--overwrite_output_dir", FAKE_CODES=codes, MAX_RESTART=max_restart)
    assert result.returncode == expected
    launched = machine.launched()
    assert len(launched) == starts
    assert options(launched[0]["words"]).get("max_restart", "") == max_restart
    assert result.stderr.count("launch: the trainers ended") == starts - (expected == 0)
    for number, start in enumerate(launched):  # starting anew a second time would delete the checkpoints
        words = start["words"][start["words"].index(ENTRYPOINT) + 1 :]
        assert parsed(words).checkpoint.overwrite_output_dir is (number == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_trainers_and_not_the_launcher(machine: Machine, number: signal.Signals) -> None:
    process = machine.start(SCRIPTS / "run_trainer.sh", FAKE_DOES="train", MAX_RESTART="3")
    machine.wait_for("ready-*", 2)
    wait_until(lambda: is_waiting(process.pid), "the script to wait for its launcher")
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal: to all processes of the group
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "passing SIGTERM to 2 trainer(s)" in errors
    assert machine.names("saved-*") == ["saved-0-0", "saved-0-1"]
    assert not machine.names("*got*") and len(machine.launched()) == 1


def test_a_signal_before_there_are_trainers(machine: Machine) -> None:
    process = machine.start(SCRIPTS / "run_trainer.sh", FAKE_DOES="start", MAX_RESTART="3")
    machine.wait_for("ready-*", 1)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 143 and len(machine.launched()) == 1


# Slurm


class Job:
    """launch.slurm as slurmd runs it: a copy in a spool folder, started in the folder of submission."""

    def __init__(self, machine: Machine, *words: str, **environment: str) -> None:
        self.machine = machine
        spool = machine.folder / "spool"
        spool.mkdir()
        shutil.copy(SCRIPTS / "launch.slurm", spool / "slurm_script")
        job = {
            "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_JOB_NUM_NODES": "4",
            "SLURM_SUBMIT_DIR": str(machine.work), "FAKE_COMMAND": str(SCRIPTS / "launch.slurm"),
        }  # fmt: skip
        self.process = machine.start(spool / "slurm_script", *words, **(job | environment))

    def end(self) -> tuple[int, str]:
        output, errors = self.process.communicate(timeout=300)
        return self.process.returncode, output + errors

    @property
    def requeued(self) -> list[str]:
        path = self.machine.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []


def test_slurm_runs_the_4d_script_on_every_node(machine: Machine) -> None:
    job = Job(machine, "--model_name_or_path", "my models/it's $HOME", "--max_steps", "9")
    code, output = job.end()
    assert code == 0, output
    assert job.requeued == []
    for node in range(4):
        (start,) = machine.launched(node)
        position = start["words"].index(ENTRYPOINT)
        launcher = options(start["words"][:position])
        assert launcher["gpus"] == "0,1,2,3,4,5,6,7"
        assert (launcher["nnodes"], launcher["rank"]) == ("4", str(node))
        address, port = launcher["master"].split(":")
        assert address == "10.0.0.1" and 20000 <= int(port) < 32768
        config = parsed(start["words"][position + 1 :])
        assert config.model.model_name_or_path == "my models/it's $HOME" and config.schedule.max_steps == 9
        assert config.parallel.sharding == "stage2" and config.parallel.sharding_parallel_degree == 2
    assert "--kill-on-bad-exit=1" in (machine.folder / "srun").read_text().splitlines()


def test_slurm_runs_another_script(machine: Machine) -> None:
    script = machine.work / "my script.sh"
    script.write_text('printf "%s|" "$NODE_RANK" "$NNODES" "$MASTER" "$GPUS" "$@" >"$FAKE/launched-$NODE_RANK"\n')
    code, output = Job(machine, "my script.sh", "a b", "", "c", SLURM_JOB_NUM_NODES="2").end()
    assert code == 0, output
    assert [(machine.folder / f"launched-{node}").read_text() for node in range(2)] == [
        f"{node}|2|node1:{20000 + 4242}|8|a b||c|" for node in range(2)
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_before_the_time_limit_all_save_and_the_job_is_requeued_once(machine: Machine, number: int) -> None:
    job = Job(machine, FAKE_DOES="train")
    machine.wait_for("ready-*", 8)
    for _ in range(number):
        job.process.send_signal(signal.SIGUSR1)
        wait_until((machine.folder / "scancel").exists, "scancel")
    code, output = job.end()
    assert code == 0, output
    assert len(machine.names("saved-*")) == 8, output
    assert (machine.folder / "scancel").read_text().splitlines() == ["--signal=TERM 4242"]
    assert job.requeued == ["requeue 4242"]
    assert not machine.names("*got*")


def test_a_job_stopped_while_it_starts_is_requeued(machine: Machine) -> None:
    job = Job(machine, FAKE_DOES="start")
    machine.wait_for("ready-*", 4)
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.end()
    assert code == 0 and job.requeued == ["requeue 4242"], output


def test_a_requeued_job_goes_on(machine: Machine) -> None:
    assert Job(machine, "--overwrite_output_dir", SLURM_RESTART_COUNT="1").end()[0] == 0
    words = machine.launched(2)[0]["words"]
    assert not parsed(words[words.index(ENTRYPOINT) + 1 :]).checkpoint.overwrite_output_dir


def test_a_cancelled_job_saves_and_stays_away(machine: Machine) -> None:
    job = Job(machine, FAKE_DOES="train")
    machine.wait_for("ready-*", 8)
    job.process.terminate()
    code, output = job.end()
    assert code == 143 and "cancelled" in output
    assert len(machine.names("saved-*")) == 8 and job.requeued == []


def test_a_failed_job_stays_away(machine: Machine) -> None:
    job = Job(machine, FAKE_CODES="1")
    code, output = job.end()
    assert code == 1 and job.requeued == [], output


def test_a_job_that_fails_while_it_saves_stays_away(machine: Machine) -> None:
    job = Job(machine, FAKE_DOES="train", FAKE_CODE="1")
    machine.wait_for("ready-*", 8)
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.end()
    assert code == 1 and job.requeued == [], output


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {"SLURM_JOB_ID": ""}, "not in a Slurm job; start it with: sbatch"),
        ([], {"FAKE_COMMAND": "/elsewhere/launch.slurm"}, "submit from the repository's folder"),
        (["absent.sh"], {}, "there is no script absent.sh"),
    ],
)
def test_slurm_mistakes_are_named(
    machine: Machine, words: list[str], environment: dict[str, str], expected: str
) -> None:
    code, output = Job(machine, *words, **environment).end()
    assert code == 2 and expected in output
    assert not machine.names("launched*")


def test_slurm_directives() -> None:
    lines = [line.split(" ", 1)[1] for line in (SCRIPTS / "launch.slurm").read_text().splitlines() if "#SBATCH" in line]
    given = dict(line.removeprefix("--").partition("=")[::2] for line in lines if line.startswith("--"))
    assert given["ntasks-per-node"] == "1" and given["output"] == "%x-%j.log" and given["open-mode"] == "append"
    assert {"nodes", "gpus-per-node", "time", "requeue"} <= set(given)
    assert given["signal"] == "B:USR1@120"
