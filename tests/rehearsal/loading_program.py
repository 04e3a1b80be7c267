"""The program of test_loading.py: python loading_program.py FOLDER.

It imports Paddle and forks the ranks; every rank goes through all scenarios and writes down how each went.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import loading_scenarios
from loading_before_ranks import BEFORE_CONNECTING, do_data, do_hub
from loading_scenarios import SCENARIOS

RANKS = 4


def main(folder: Path) -> int:
    """In the parent: import, fork, wait."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(1)
    import paddlenlp.transformers  # noqa: F401

    from oarlock.cpu_ranks.fork_launch import launch

    set_paddlenlp_log_level("error")
    codes = launch(RANKS, lambda: all_scenarios(folder), folder / "log", timeout_s=200, quiet=True)
    if any(codes):
        for log in sorted((folder / "log").iterdir()):
            print(f"== {log.name}\n{log.read_text()[-2000:]}")
    return int(any(codes))


def all_scenarios(folder: Path) -> int:
    """Run all scenarios on a rank."""
    from paddle.distributed import barrier

    from oarlock.cpu_ranks import process_group
    from oarlock.environment.ranks import rank
    from oarlock.models import build

    process_group.install(60.0)  # as at the start of a run
    result: dict[str, object] = {}
    for scenario in BEFORE_CONNECTING:
        try:
            kind, case = scenario.split("/")
            {"hub": do_hub, "data": do_data}[kind](folder, case)
            result[scenario] = ""
        except BaseException:
            result[scenario] = traceback.format_exc()
    connect()
    opened = 0
    really_open = build._open_source

    def counted(*args):
        nonlocal opened
        opened += 1
        return really_open(*args)

    build._open_source = counted
    for scenario in SCENARIOS:
        kind, *middle, plan = scenario.split("/")
        try:
            getattr(loading_scenarios, f"do_{kind}")(folder / scenario.replace("/", "-"), plan, *middle)
            result[scenario] = ""
        except BaseException:
            result[scenario] = traceback.format_exc()
        barrier()
    result["opened"] = opened
    (folder / f"rank-{rank()}.json").write_text(json.dumps(result))
    return 0


def connect() -> None:
    import paddle
    import paddle.distributed.fleet as fleet

    from oarlock.cpu_ranks import fleet_patches, process_group

    paddle.set_device("cpu")
    process_group.install(60)
    fleet_patches.install()
    paddle.distributed.init_parallel_env()
    strategy = fleet.DistributedStrategy()
    order = ["dp", "pp", "sharding", "sep", "mp"]
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 2, "sharding_degree": 1, "order": order}
    fleet.init(is_collective=True, strategy=strategy)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
