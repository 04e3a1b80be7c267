"""What the benchmarks share: the machine's name, a table, the memory of a process tree, turns with a peer."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "llm"))


def machine() -> dict[str, Any]:
    """CPU, cores and versions, for the head of every result."""
    from oarlock.environment.cpu import available_cores
    from oarlock.versions import package_versions

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"cpu": model, "cores": available_cores(), "system": platform.platform(), "versions": package_versions()}


def report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print a table for people, then one JSON line for programs."""
    about = machine()
    print(f"\n{name}: {about['cpu']}, {about['cores']} cores")
    columns = list(rows[0])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    print("| " + " | ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)) + " |")
    print("| " + " | ".join("-" * w for w in widths) + " |")
    for row in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    print(json.dumps({"benchmark": name, "rows": rows, "machine": about, **more}))


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


class TreeMemory:
    """Peak memory of a process and its children, MB: proportional set size, so that shared pages count once."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, sum(_pss(pid) for pid in _tree(self.pid)))
            time.sleep(0.1)

    def stop(self) -> float:
        """End watching; the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
    return found


def _pss(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
    except OSError:
        pass
    return 0.0


def free_of_noise() -> float:
    """Load average of the last minute: above the cores' number, timings say little."""
    return os.getloadavg()[0]


def seconds(run: Callable[[], object], at_least: float) -> float:
    """Of one call: the median of those in `at_least` seconds, at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Peer:
    """A script in another Python, asked by a JSON line and answering by one (see answer_asked)."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def ask(self, question: Any) -> Any:
        assert self._process.stdin
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.ready()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def ready(self) -> Any:
        """What it says next."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer left with code {self._process.wait()}")
        return json.loads(line)


def answer_asked(answer: Callable[[Any], Any]) -> None:
    """The peer's side: until stdin ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def peak_mb(run: Callable[[], object]) -> float:
    """By how much a run raises the memory of this process above what it has before, at its peak (Linux)."""
    before = _status_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(name)
