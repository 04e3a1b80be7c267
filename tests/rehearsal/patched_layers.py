"""Fleet's layers on two CPU ranks, with oarlock's patches and without each of them: python patched_layers.py FOLDER.

Rank r writes into FOLDER/checks-r.json how every check went ("" or a traceback), and into FOLDER/LABEL-r.json how the
check of a patch went without it; outcomes.json has the latter, with what killed a rank, and what the parent saw.
"""

from __future__ import annotations

import importlib
import json
import re
import resource
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

RANKS = 2
WORKS = "works"
CHECKS = (  # the last one makes other groups
    "layer_checks.identity",
    "layer_checks.all_reduce",
    "layer_checks.concat",
    "layer_checks.split",
    "layer_checks.cross_entropy",
    "layer_checks.fused_cross_entropy",
    "layer_checks.names_of_paddlenlp",
    "layer_checks.broadcast_input_data",
    "layer_checks.embedding",
    "layer_checks.column_linear",
    "layer_checks.overlapped_column_linear",
    "layer_checks.row_linear",
    "layer_checks.sequence_operators",
    "layer_checks.tensor_parallel_wrapper",
    "layer_checks.pipeline_layer",
    "layer_checks.timers",
    "layer_checks.synchronize",
    "layer_checks.stage_2",
    "layer_checks.stage_3",
    "model_checks.tracker",
    "model_checks.recompute_draws_the_same_masks",
    "model_checks.reseeded_tracker",
    "model_checks.split_heads",
    "model_checks.tied_embeddings_on_two_stages",
)
NEEDED_BY = {  # a patch -> a check that fails without it
    "hybrid_parallel_util.broadcast_input_data": "layer_checks.broadcast_input_data",
    "ParallelEnv._device_id": "layer_checks.pipeline_layer",
    "_C_ops.c_identity": "layer_checks.identity",
    "_legacy_C_ops.c_identity": "layer_checks.overlapped_column_linear",
    "cuda.synchronize": "layer_checks.timers",
    "device.synchronize": "layer_checks.synchronize",
    "mp_ops._c_concat": "layer_checks.concat",
    "mp_ops._c_split": "layer_checks.split",
    "mp_ops._c_softmax_with_cross_entropy": "layer_checks.cross_entropy",
    "core.is_compiled_with_cuda": "layer_checks.stage_3",
    "paddle.get_device": "layer_checks.stage_2",
    "ParamStorage.add_rank_params": "layer_checks.stage_2",
}


def main(folder: Path) -> int:
    """In the parent: import, check what a run on a GPU would install, fork the ranks."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some of Paddle's operators crash
    import_paddle(1)
    import paddlenlp.transformers  # noqa: F401

    from oarlock.train import group_sharding, setup

    set_paddlenlp_log_level("error")
    with group_sharding._patch_fleet_for("gpu"):
        outcomes = {"lends": which_ranks_get_cpu_patches(setup), "imported": imported()}
    from oarlock.compat.patches import PATCHES
    from oarlock.cpu_ranks import fleet_patches
    from oarlock.cpu_ranks.fork_launch import launch

    patches = {label(patch): patch for patch in PATCHES if patch.installed_by == fleet_patches.__name__}
    outcomes["owners"] = {name: owners_and_holders(patch) for name, patch in patches.items()}
    originals = {
        name: [vars(owner).get(patch.name, mock.DEFAULT) for owner in patch.owners()] for name, patch in patches.items()
    }
    codes = launch(RANKS, lambda: all_checks(folder), folder / "log", 100, quiet=True)
    if any(codes):
        sys.exit("".join(log.read_text()[-3000:] for log in sorted((folder / "log").iterdir())))
    for name, patch in patches.items():
        codes = launch(RANKS, partial(without, patch, originals[name], folder), folder / "log", 30, quiet=True)
        outcomes[name] = [read(folder / f"{name}-{rank}.json", codes[rank]) for rank in range(RANKS)]
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    return 0


def imported() -> list[str]:
    names = ("fleet_patches", "tensor_parallel_ops", "process_group")
    return [name for name in names if f"oarlock.cpu_ranks.{name}" in sys.modules]


def which_ranks_get_cpu_patches(setup) -> dict[str, bool]:
    """Device and number of ranks -> whether the start of a run installs the patches for CPUs."""
    found = {}
    for device in ("cpu", "gpu"):
        for ranks in (1, 2):
            with mock.patch.object(setup, "install_cpu_groups") as lend:
                setup.connect_cpu_ranks(SimpleNamespace(world_size=ranks), device, 9.0)
            found[f"{device}, {ranks}"] = lend.called
    return found


def label(patch) -> str:
    """The last two names of the target."""
    return ".".join(re.split("[.:]", patch.target)[-2:])


def owner_name(owner) -> str:
    """The module name of an owner; paddle._C_ops has the __name__ of another module."""
    return next((name for name, module in list(sys.modules.items()) if module is owner), owner.__name__)


def owners_and_holders(patch) -> tuple[list[str], list[str]]:
    """The objects that a patch changes, and the modules that hold a reference to the original."""
    original = vars(patch.owners()[0]).get(patch.name)
    holders = [name for name, module in list(sys.modules.items()) if vars(module).get(patch.name, patch) is original]
    return [owner_name(owner) for owner in patch.owners()], [name for name in holders if name.startswith("paddle")]


def read(path: Path, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return json.loads(path.read_text()) if path.exists() else f"exit code {code}"


# On a rank.


def run_check(name: str) -> None:
    module, function = name.split(".")
    getattr(importlib.import_module(module), function)()


def connect() -> None:
    import paddle

    from oarlock.train.setup import install_cpu_groups

    paddle.set_device("cpu")
    install_cpu_groups(20.0)
    split(mp_degree=2)


def split(**degrees: int) -> None:
    """Create the groups of this plan (again, for another plan)."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.base import topology

    topology._HYBRID_PARALLEL_GROUP = None
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, **degrees}
    fleet.init(is_collective=True, strategy=strategy)


def all_checks(folder: Path) -> int:
    from paddle.distributed import barrier

    from oarlock.environment.ranks import rank

    connect()
    result = dict.fromkeys(CHECKS, "not reached, see the first that failed")
    for name in CHECKS:
        try:
            run_check(name)
            barrier()
        except BaseException:
            result[name] = traceback.format_exc()
            break  # the ranks are no longer in step
        result[name] = ""
    (folder / f"checks-{rank()}.json").write_text(json.dumps(result))
    return 0


def without(patch, originals: list, folder: Path) -> int:
    """The check of a patch with Paddle's original in place of this patch only."""
    from oarlock.compat.patches import list_patches
    from oarlock.cpu_ranks import fleet_patches
    from oarlock.environment.ranks import rank

    connect()
    if patch.scope == "while_building":
        others = [other for other in list_patches(patch.installed_by, patch.scope) if other is not patch]
        fleet_patches.list_patches = lambda *_: others
    else:
        for owner, original in zip(patch.owners(), originals, strict=True):
            delattr(owner, patch.name) if original is mock.DEFAULT else setattr(owner, patch.name, original)
    try:
        run_check(NEEDED_BY[label(patch)])
        outcome = WORKS
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    (folder / f"{label(patch)}-{rank()}.json").write_text(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
