"""Run many training commands one after another from one warm process: python warm_runs.py SPEC OUT.

SPEC (JSON): a list of {"name", "words", "folder"}: the words of a command behind `python`, with Paddle's launcher or
without. Its ranks are forked, so that Paddle is imported once for all. OUT gets name -> {"codes", "said", "seconds"};
`said` is what the first rank that failed wrote, or rank 0.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "llm"))

from oarlock.config.load import LoadedConfig
from oarlock.config.pretrain import PretrainConfig
from oarlock.config.run_config import RunConfig
from oarlock.environment.paddle_import import import_paddle
from oarlock.parallel.launch_command import parse_command

TIMEOUT_S = 120


def train(config: RunConfig) -> int:
    """Train as the entrypoints do with a checked configuration."""
    from oarlock.train.finetune import finetune
    from oarlock.train.pretrain import pretrain

    return (pretrain if isinstance(config, PretrainConfig) else finetune)(LoadedConfig(config))


def main() -> None:
    import_paddle(1)
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.train import finetune, pretrain  # noqa: F401  (imported once, here)

    results = {}
    for run in json.loads(Path(sys.argv[1]).read_text()):
        launched = "paddle.distributed.launch" in run["words"]
        command = parse_command(run["words"], None if launched else 1)
        log, started = Path(run["folder"]) / "log", time.perf_counter()
        codes = launch(command.num_ranks, partial(train, command.config), log, TIMEOUT_S, quiet=True)
        speaker = next((rank for rank, code in enumerate(codes) if code), 0)
        results[run["name"]] = {
            "codes": codes,
            "said": (log / f"workerlog.{speaker}").read_text(),
            "seconds": time.perf_counter() - started,
        }
        print(f"{run['name']}: {codes}, {results[run['name']]['seconds']:.1f} s", flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
