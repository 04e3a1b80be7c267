"""What ranks share before there are groups where no CPU group is installed, as on GPUs: python early_sharing.py FOLDER.

Four ranks on one node, then on two nodes of two, and two nodes with a store in which a stranger writes.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "llm"))

from oarlock.environment.paddle_import import import_paddle

RANKS = 4


def share(folder: Path, nodes: int, forged: object = None) -> int:
    from oarlock.environment.ranks import rank
    from oarlock.errors import OarlockError
    from oarlock.parallel import nodes as sharing

    os.environ |= {"PADDLE_RANK_IN_NODE": str(rank() % (RANKS // nodes)), "PADDLE_LOCAL_SIZE": str(RANKS // nodes)}
    if nodes == 1:
        sharing._gather_through_store = None  # not needed: they share a machine
    if forged is not None:  # a stranger overwrites all values except the first ones, which say who shares a machine
        answers = iter([[json.dumps(["host", i // 2 * 2]) for i in range(RANKS)], [json.dumps(forged)] * RANKS])
        sharing._gather_through_store = lambda text: next(answers)
        sharing.make_node_key = lambda: ("host", rank() // 2 * 2)
    done: list[int] = []

    def find() -> str:
        done.append(rank())
        return f"/of/{rank()}"

    try:
        found = sharing.run_once_per_node(find)
        problem = ""
    except OarlockError as error:
        found, problem = None, str(error)
    (folder / f"{nodes}-{forged is not None}-{rank()}.json").write_text(json.dumps([found, done, problem]))
    return 0


def main(folder: Path) -> None:
    import_paddle(1)
    import paddle.distributed  # noqa: F401

    from oarlock.cpu_ranks.fork_launch import launch

    for nodes, forged in ((1, None), (2, None), (2, [False, "/of/a stranger"])):
        codes = launch(RANKS, partial(share, folder, nodes, forged), folder / f"log-{nodes}", 240, quiet=True)
        if any(codes):
            sys.exit("\n".join((folder / f"log-{nodes}" / f"workerlog.{i}").read_text()[-2000:] for i in range(RANKS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
