"""The nodes of a launch: how many there are, which one this is, and where they meet."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
from dataclasses import dataclass

from oarlock.errors import ConfigError
from oarlock.launch.options import LaunchOptions, name_option

_MOST_ON_CPU = 254  # 127.0.1.1 to 127.0.1.254


@dataclass(frozen=True)
class NodePlace:
    """This node among the nodes of a launch.

    Attributes:
        master: address of the first node; empty for a single node.
        port: a free port there.
    """

    count: int = 1
    rank: int = 0
    master: str = ""
    port: int = 0


def choose_node(options: LaunchOptions) -> NodePlace:
    """Check the options for several nodes, and resolve the master's name.

    Raises:
        ConfigError: an option is missing or wrong, or this machine can't be that node.
    """
    count = options.nnodes
    if count == 1:
        return NodePlace()
    given = f"{name_option('nnodes')} is {count}, so"
    if options.master is None:
        raise ConfigError(
            f"{given} every node needs {name_option('master')}: host:port, the first node's name or address and "
            "a free port there"
        )
    if options.node_rank is None:
        raise ConfigError(f"{given} every node needs {name_option('node_rank')}: 0 on the master, then 1, 2, ...")
    if options.node_rank >= count:
        raise ConfigError(f"{given} {name_option('node_rank')} must be from 0 to {count - 1}")
    name, _, port = options.master.rpartition(":")
    master = _resolve_master(name, options)
    if options.device == "cpu":
        if count > _MOST_ON_CPU:
            raise ConfigError(f"{given} the CPU can't be used: at most {_MOST_ON_CPU} nodes fit on one")
        if not options.dry_run and not master.startswith("127.") and master not in list_addresses():
            raise ConfigError(
                f"{name_option('master')} is on another machine ({master}), but CPU ranks all run on one: start "
                "every node there"
            )
    return NodePlace(count, options.node_rank, master, int(port))


def _resolve_master(name: str, options: LaunchOptions) -> str:
    """Return the IPv4 address of the master.

    Paddle's launcher compares it with its own address as text. With a name, no node would open the port and all would
    wait forever.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv4Address(name))
    address = resolve_host(name)
    if address and options.node_rank == 0 and address.startswith("127."):
        address = next(iter(list_addresses()), None)  # /etc/hosts gives the host's own name a loopback address
    if address is None and options.dry_run:
        return name
    if address is None:
        raise ConfigError(f"{name_option('master')}: the name {name} has no IPv4 address here; use the address")
    return address


def resolve_host(name: str) -> str | None:
    """Return the first IPv4 address of a host, or None."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def list_addresses() -> list[str]:
    """Return the addresses of this host, except loopback."""
    try:
        found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return []
    return found.stdout.split()
