"""The command that starts the ranks of a node: Python, Paddle's launcher for several ranks, the script, its flags."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oarlock.cpu_ranks.meeting_point import SECRET_FILE
from oarlock.errors import ConfigError
from oarlock.launch.degrees import Degrees, choose_degrees
from oarlock.launch.devices import choose_devices
from oarlock.launch.nodes import NodePlace, choose_node
from oarlock.launch.options import LaunchOptions

# A later start of a job must not delete its checkpoints, even if the flags of the first start asked for that.
RESUME_FLAG = "--no_overwrite_output_dir"


@dataclass(frozen=True)
class LaunchCommand:
    """A command that starts the ranks of a node.

    Attributes:
        argv: the words of the command.
        has_launcher: the ranks are children of Paddle's launcher, not of this program.
        log_dir: where the launcher writes the output of each rank.
        num_ranks: on all nodes.
        degrees: set if the launcher chose them (--tp).
    """

    argv: list[str]
    has_launcher: bool
    log_dir: str
    num_ranks: int
    degrees: Degrees | None


def build_command(options: LaunchOptions, script: str, arguments: Sequence[str]) -> LaunchCommand:
    """Build the command for this node.

    Args:
        script: path of a training script.
        arguments: its own arguments; they win over the flags that are added here.

    Raises:
        ConfigError: the options are wrong, or don't fit this machine.
    """
    devices = choose_devices(options)
    node = choose_node(options)
    num_ranks = len(devices) * node.count
    degrees = choose_degrees(options, num_ranks)
    if not Path(script).is_file():
        raise ConfigError(f"there is no script {script} in {Path.cwd()}")
    has_launcher = num_ranks > 1
    log_dir = options.log_dir
    if node.count > 1:
        log_dir = f"{log_dir}/node-{node.rank}"  # the nodes may share the folder, and each writes workerlog.0
    launcher = _build_launcher_argv(options, devices, node, log_dir) if has_launcher else []
    recipe = 1 if arguments and not arguments[0].startswith("-") else 0  # a YAML file comes first
    flags = [*(degrees.to_flags() if degrees else []), "--device", options.device]
    argv = [sys.executable, "-u", *launcher, script, *arguments[:recipe], *flags, *arguments[recipe:]]
    if os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0"):
        argv.append(RESUME_FLAG)
    return LaunchCommand(argv, has_launcher, log_dir, num_ranks, degrees)


def _build_launcher_argv(options: LaunchOptions, devices: list[str], node: NodePlace, log_dir: str) -> list[str]:
    words = ["-m", "paddle.distributed.launch"]
    if options.device == "cpu":
        words += ["--nproc_per_node", str(len(devices))]  # --gpus crashes in a CPU build of Paddle
    else:
        words += ["--gpus", ",".join(devices)]
    if node.count > 1 and options.device == "cpu":
        # CPU ranks share one machine, and each node gets a loopback address of its own. So no node needs a master,
        # whose port would be open on every address of the machine. Paddle refuses 127.0.0.1 here.
        addresses = [f"127.0.1.{i}" for i in range(1, node.count + 1)]
        words += ["--nnodes", str(node.count), "--ips", ",".join(addresses), "--start_port", str(node.port)]
        words += ["--host", addresses[node.rank]]
    elif node.count > 1:
        words += ["--nnodes", str(node.count), "--master", f"{node.master}:{node.port}", "--rank", str(node.rank)]
        if node.rank == 0:
            # The ranks meet at the address of the first node's launcher. By default it is what the host's name
            # resolves to, which may be loopback or another network. The other nodes can reach the master's address.
            words += ["--host", node.master]
    if options.max_restart is not None:
        words += ["--max_restart", str(options.max_restart)]
    return [*words, "--log_dir", log_dir]


@contextlib.contextmanager
def make_environment(options: LaunchOptions, command: LaunchCommand) -> Iterator[dict[str, str]]:
    """Make the environment of the ranks. On the CPU it hides GPUs and names a secret.

    The ranks of a launch prove to each other that they know the secret (docs/security.md). It is in an unnamed file,
    which they read through a descriptor of this process, until the context ends. For several nodes, the user may name a
    file that they share.
    """
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        if options.device == "cpu":
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher would hand out the GPUs of this machine
            environment["PADDLE_DISTRI_BACKEND"] = "gloo"
            if command.has_launcher and options.nnodes == 1 and not environment.get(SECRET_FILE):
                file = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # readable by this user alone
                file.write(os.urandom(32))
                environment[SECRET_FILE] = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield environment
