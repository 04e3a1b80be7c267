"""`oarlock admin`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Adder = Callable[..., argparse.ArgumentParser]
_ORDERS = ("status", "reload", "load", "unload", "keys")


def add_admin(commands: Any, command: Adder) -> None:
    """The admin subcommand."""
    admin = command(commands, "admin", "Reload the model of a running `oarlock serve`, or print its state.", _admin)
    admin.add_argument(
        "order",
        choices=_ORDERS,
        help="status: print the state (JSON); reload: load the model again from its folder, while the old one answers; "
        "load, unload: oarlock_infer or oarlock_json; keys: read --api-key-file again, as on SIGHUP",
    )
    admin.add_argument(
        "model", nargs="?", default="", help="name of the model (default for reload: the one with the engine)"
    )
    admin.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="the server's socket, as printed at its start (default: that of the one server that runs)",
    )


def _admin(arguments: argparse.Namespace) -> int:
    from oarlock.errors import ConfigError
    from oarlock.serve.supervision.admin_client import find_server, order

    if arguments.order in ("load", "unload") and not arguments.model:
        raise ConfigError(f"oarlock admin {arguments.order}: name the model")
    if arguments.order in ("status", "keys") and arguments.model:
        raise ConfigError(f"oarlock admin {arguments.order} takes no model")
    answer = order(find_server(arguments.socket), arguments.order, arguments.model)
    print(answer["text"] if "text" in answer else json.dumps(answer, indent=1))
    return 0
