"""`oarlock admin`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from oarlock.cli.flags import Command, flag, positional
from oarlock.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdminOptions:
    """Options of `oarlock admin`."""

    order: str = positional(choices=("status", "reload", "load", "unload", "keys"))
    """status: print the state as JSON; reload: load the model again from its folder while the old one still answers;
    load, unload: oarlock_infer or oarlock_json; keys: read --api-key-file again, as on SIGHUP."""
    model: str = positional("")
    """Name of the model. Default for reload: the one with the engine."""
    socket: Path | None = flag(None, metavar="PATH")
    """Socket of the server, as it printed at its start. Default: that of the only running server."""


def _run(options: AdminOptions) -> int:
    from oarlock.serve.supervision.admin_client import find_server, send_order

    if options.order in ("load", "unload") and not options.model:
        raise ConfigError(f"oarlock admin {options.order}: name the model")
    if options.order in ("status", "keys") and options.model:
        raise ConfigError(f"oarlock admin {options.order} takes no model")
    answer = send_order(find_server(options.socket), options.order, options.model)
    print(answer["text"] if "text" in answer else json.dumps(answer, indent=1))
    return 0


COMMAND = Command("admin", "Reload the model of a running `oarlock serve`, or print its state.", AdminOptions, _run)
