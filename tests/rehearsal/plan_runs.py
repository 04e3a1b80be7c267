"""Start runs.py for a list of groups in two processes, because ranks spend half their time waiting for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_PROCESSES = 2


def run_groups(groups: list[dict[str, Any]], folder: Path, seconds: int) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Return results by (group, plan, link of a chain).

    Args:
        seconds: after which it is given up.
    """
    shares: list[list[int]] = [[] for _ in range(_PROCESSES)]
    for number in sorted(range(len(groups)), key=lambda i: -len(groups[i]["plans"])):
        min(shares, key=lambda share: sum(len(groups[i]["plans"]) for i in share)).append(number)
    running = []
    for i, share in enumerate(shares):
        spec, out, log = folder / f"spec-{i}.json", folder / f"out-{i}.json", folder / f"log-{i}.txt"
        spec.write_text(json.dumps([groups[number] for number in share]))
        temporary = folder / f"runs-{i}"
        temporary.mkdir()
        with open(log, "w") as stream:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("runs.py")), str(spec), str(out)],
                stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            )  # fmt: skip
        running.append((share, process, out, log))
    results = {}
    try:
        for share, process, out, log in running:
            assert process.wait(timeout=seconds) == 0, log.read_text()[-6000:]
            for result in json.loads(out.read_text()):
                number, position, link = result["case"]
                results[share[number], position, link] = result
    finally:
        for _, process, _, _ in running:
            process.kill()
            process.wait()
    return results
