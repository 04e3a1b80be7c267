"""The command of `oarlock launch`: devices, nodes, degrees, and refusals."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from oarlock.cli.main import main
from oarlock.errors import ConfigError
from oarlock.launch import nodes
from oarlock.launch.command import RESUME_FLAG, LaunchCommand, build_command, make_environment
from oarlock.launch.options import LaunchOptions
from support.launch_scripts import parse_flags

HOSTS = {"node1": "10.0.0.1", "node2": "10.0.0.2", "loopback": "127.0.1.1"}


class Machine:
    """A machine with 8 GPUs, names that resolve, and the address 10.0.0.9."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.script = folder / "train.py"
        self.script.touch()
        self.see(8)
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setattr(nodes, "resolve_host", HOSTS.get)
        patch.setattr(nodes, "list_addresses", lambda: ["10.0.0.9", "172.17.0.1"])
        for name in ("CUDA_VISIBLE_DEVICES", "SLURM_RESTART_COUNT", "OARLOCK_LAUNCH_SECRET_FILE"):
            patch.delenv(name, raising=False)

    def see(self, gpus: int) -> None:
        listing = "\n".join(f"GPU {i}: NVIDIA A100 (UUID: GPU-0000-{i})" for i in range(gpus))
        program = self.script.with_name("nvidia-smi")
        program.write_text(f"#!/bin/sh\necho '{listing}'\n")
        program.chmod(0o755)

    def build(self, *arguments: str, **options: Any) -> LaunchCommand:
        return build_command(LaunchOptions(**options), str(self.script), arguments)

    def launcher(self, **options: Any) -> dict[str, str]:
        """Flags of Paddle's launcher."""
        words = self.build(**options).argv
        assert words[:4] == [sys.executable, "-u", "-m", "paddle.distributed.launch"]
        return parse_flags(words[4 : words.index(str(self.script))])

    def refused(self, **options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            self.build(**options)
        return str(error.value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_several_ranks_use_paddles_launcher(machine):
    assert machine.launcher(gpus="2", log_dir="logs") == {"gpus": "0,1", "log_dir": "logs"}
    assert machine.launcher() == {"gpus": "0,1,2,3,4,5,6,7", "log_dir": "log"}, "all that can be seen"
    assert machine.launcher(device="cpu", gpus="4,5,6") == {"nproc_per_node": "3", "log_dir": "log"}
    assert machine.launcher(max_restart=3, gpus="2")["max_restart"] == "3"


def test_one_rank_needs_no_launcher(machine):
    for options in ({"gpus": "1"}, {"device": "cpu"}):
        command = machine.build("--x", "1", **options)
        device = options.get("device", "gpu")
        assert command.argv == [sys.executable, "-u", str(machine.script), "--device", device, "--x", "1"]
        assert not command.has_launcher and command.num_ranks == 1
    launcher = machine.launcher(gpus="1", nnodes=2, master="10.0.0.1:29500", node_rank=1)
    assert launcher["nnodes"] == "2" and launcher["gpus"] == "0"


def test_script_arguments_follow_the_recipe(machine):
    words = machine.build("r.yaml", "--device", "mine", gpus="1").argv
    assert words[3:] == ["r.yaml", "--device", "gpu", "--device", "mine"]


def test_visible_gpus_are_used(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert machine.launcher(gpus="2")["gpus"] == "4,5"
    assert machine.launcher(gpus="6,4")["gpus"] == "6,4"
    assert machine.launcher()["gpus"] == "4,5,6"
    assert "no GPU 0 here (there are: 4 5 6)" in machine.refused(gpus="0,4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no NVIDIA GPU here (CUDA_VISIBLE_DEVICES is empty)" in machine.refused(gpus="1")


def test_a_dry_run_may_describe_another_machine(machine):
    machine.see(0)
    assert machine.launcher(gpus="6,7", dry_run=True)["gpus"] == "6,7"
    text = machine.refused(gpus="6,7", rehearsal="DEVICE=cpu bash it.sh")
    assert "no NVIDIA GPU here (nvidia-smi lists none). To rehearse on the CPU," in text
    assert text.endswith("\n  DEVICE=cpu bash it.sh")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpus": "9"}, "asks for 9 GPUs, but 8 can be seen (0 1 2 3 4 5 6 7)"),
        ({"gpus": "7,8"}, "no GPU 8 here"),
        ({"gpus": "many"}, "GPUS (--gpus) must be a list (0,1,2,3) or a number of GPUs (4); got 'many'"),
        ({"gpus": "0,,1"}, "must be a list"),
        ({"gpus": "0"}, "must be a list"),
        ({"gpus": "a[$(touch RUN)]"}, "must be a list"),
        ({"nnodes": 2}, "every node needs MASTER (--master)"),
        ({"nnodes": 2, "master": "node1:29500"}, "every node needs NODE_RANK (--node_rank)"),
        ({"nnodes": 2, "master": "node1:29500", "node_rank": 2}, "must be from 0 to 1"),
        ({"nnodes": 2, "master": "nowhere:29500", "node_rank": 1}, "the name nowhere has no IPv4 address"),
        ({"nnodes": 300, "master": "127.0.0.1:1", "node_rank": 1, "device": "cpu"}, "at most 254 nodes"),
        ({"nnodes": 2, "master": "node1:1", "node_rank": 1, "device": "cpu"}, "is on another machine (10.0.0.1)"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(machine, options, expected):
    assert expected in machine.refused(**options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--nnodes two", "argument --nnodes: must be a whole number; got 'two'"),
        ("--nnodes 1+1", "must be a whole number"),
        ("--nnodes 0x10", "must be a whole number"),
        ("--nnodes " + "9" * 30, "must be a whole number"),
        ("--nnodes 0", "must lie in [1, 999999]"),
        ("--master node1", "must be host:port; got 'node1'"),
        ("--master $(touch): 1", "must be host:port"),
        ("--node_rank=-1", "must be at least 0"),
        ("--max_restart=-1", "argument --max-restart/--max_restart: must lie in"),
        ("--tp x", "argument --tp: must be a whole number"),
        ("--slurm --gpus 2", "--slurm takes no other option"),
    ],
)
def test_wrong_flags_are_named(machine, capsys, words, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["launch", *words.split(), str(machine.script)])
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_a_dry_run_prints_one_line_for_a_shell(machine, capfdbinary):
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "--dry-run", "--gpus", "1", "--log_dir", "l", str(machine.script), "--x", "a b'$c", "\udcff"])
    assert stopped.value.code == 0
    line = capfdbinary.readouterr().out
    assert line.startswith(sys.executable.encode()) and line.endswith(b"--x 'a b'\"'\"'$c' '\xff'\n")


def test_a_missing_script_is_refused(machine):
    machine.script.unlink()
    assert f"there is no script {machine.script}" in machine.refused(gpus="1")


def test_the_master_must_be_an_address(machine):
    several = {"nnodes": 2, "gpus": "8"}
    first = machine.launcher(**several, master="node1:29500", node_rank=0, log_dir="l")
    assert first == {
        "gpus": "0,1,2,3,4,5,6,7", "nnodes": "2", "master": "10.0.0.1:29500", "rank": "0", "host": "10.0.0.1",
        "log_dir": "l/node-0",
    }  # fmt: skip
    second = machine.launcher(**several, master="node1:29500", node_rank=1)
    assert second["master"] == "10.0.0.1:29500" and "host" not in second
    own = machine.launcher(**several, master="loopback:29500", node_rank=0)
    assert own["master"] == "10.0.0.9:29500" and own["host"] == "10.0.0.9"
    other = machine.launcher(**several, master="elsewhere:29500", node_rank=1, dry_run=True)
    assert other["master"] == "elsewhere:29500"


def test_host_names_are_resolved():
    assert nodes.resolve_host("localhost") == "127.0.0.1"
    assert nodes.resolve_host("no-such-host.invalid") is None
    assert all(socket.inet_aton(a) for a in nodes.list_addresses() if ":" not in a)


def test_cpu_nodes_need_no_master(machine):
    for master in ("127.0.0.1:1234", "10.0.0.9:1234"):
        launcher = machine.launcher(device="cpu", gpus="2", nnodes=3, node_rank=1, master=master)
        expected = {"ips": "127.0.1.1,127.0.1.2,127.0.1.3", "start_port": "1234", "host": "127.0.1.2", "nnodes": "3"}
        assert expected.items() <= launcher.items() and "master" not in launcher


@pytest.mark.parametrize(
    ("options", "degrees", "flags"),
    [
        ({"gpus": "8"}, "data 1 x sharding 1 (stage1) x tensor 4 x pipeline 2", ("stage1", None)),
        ({"gpus": "16"}, "data 1 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        ({"gpus": "24"}, "data 1 x sharding 3 (stage2) x tensor 4 x pipeline 2", ("stage2", "3")),
        ({"gpus": "32"}, "data 2 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        ({"gpus": "48"}, "data 3 x sharding 2 (stage2) x tensor 4 x pipeline 2", ("stage2", "2")),
        (
            {"gpus": "32", "sharding_degree": 4, "sharding": "stage1"},
            "data 1 x sharding 4 (stage1) x tensor 4 x pipeline 2",
            ("stage1", "4"),
        ),
        (
            {"gpus": "8", "tp": 2, "pp": 1},
            "data 2 x sharding 2 (stage2) x tensor 2 x pipeline 1",
            ("stage2", "2"),
        ),
    ],
)
def test_degrees_follow_from_the_number_of_ranks(machine, options, degrees, flags):
    options = {"tp": 4, "pp": 2, "dry_run": True} | options
    command = machine.build("r.yaml", "--seed", "1", **options)
    assert str(command.degrees) == degrees
    words = command.argv[command.argv.index("r.yaml") + 1 :]
    found = parse_flags(words)
    assert (found["sharding"], found.get("sharding_parallel_degree")) == flags
    assert found["tensor_parallel_degree"] == str(options["tp"]) and words[-2:] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpus": "4"}, "4 ranks (1 node(s) x 4) can't be divided by tensor 4 x pipeline 2 = 8"),
        ({"gpus": "8", "sharding_degree": 2}, "a sharding degree of 2 does not divide the 1 rank(s)"),
    ],
)
def test_degrees_that_do_not_fit_are_named(machine, options, expected):
    assert expected in machine.refused(**({"tp": 4, "pp": 2} | options))


def test_a_requeued_job_resumes(machine, monkeypatch):
    for count, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        words = machine.build("--overwrite_output_dir", gpus="1").argv
        assert (words[-1] == RESUME_FLAG) is expected


def environment(machine: Machine, **options: Any) -> tuple[dict[str, str], bytes, Path]:
    """The environment of the ranks, and the path and content of the secret file."""
    checked = LaunchOptions(**options)
    with make_environment(checked, build_command(checked, str(machine.script), [])) as found:
        file = Path(found.get("OARLOCK_LAUNCH_SECRET_FILE", "/nowhere"))
        return found, file.read_bytes() if file.exists() else b"", file


def test_cpu_ranks_see_no_gpu_and_share_a_secret(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found, secret, file = environment(machine, device="cpu", gpus="2")
    assert "CUDA_VISIBLE_DEVICES" not in found and found["PADDLE_DISTRI_BACKEND"] == "gloo"
    _, other, _ = environment(machine, device="cpu", gpus="2")
    assert len(secret) == len(other) == 32 and secret != other
    assert file.is_relative_to("/proc") and not file.exists(), "it ends with the launch"
    assert not list((tmp_path / "temporary").iterdir())


def test_other_launches_get_no_secret(machine, monkeypatch):
    several = {"nnodes": 2, "master": "127.0.0.1:1", "node_rank": 0}
    for options in ({"device": "cpu", "gpus": "1"}, {"gpus": "2"}, {"device": "cpu", "gpus": "2", **several}):
        found, _, _ = environment(machine, **options)
        assert "OARLOCK_LAUNCH_SECRET_FILE" not in found
    monkeypatch.setenv("OARLOCK_LAUNCH_SECRET_FILE", "/mine")
    assert environment(machine, device="cpu", gpus="2")[0]["OARLOCK_LAUNCH_SECRET_FILE"] == "/mine"
