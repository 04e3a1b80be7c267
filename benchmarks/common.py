"""What the benchmarks share: start-up, the machine's name, tables, times, memory, and peers in another Python."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "llm"))
MB = 1 << 20


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of a benchmark."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def import_paddlenlp() -> None:
    """Import Paddle with all cores, and PaddleNLP without its log."""
    from oarlock.environment.cpu import count_available_cores
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(count_available_cores())
    set_paddlenlp_log_level("error")


# tables


def machine() -> dict[str, Any]:
    """CPU, cores and versions, for the head of every result."""
    from oarlock.environment.cpu import count_available_cores
    from oarlock.versions import read_package_versions

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": count_available_cores(),
        "system": platform.platform(),
        "versions": read_package_versions(),
    }


def report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print a table for people, then one JSON line for programs."""
    about = machine()
    print(f"\n{name}: {about['cpu']}, {about['cores']} cores")
    columns = list(rows[0])
    cells = [[_format_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    print("| " + " | ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)) + " |")
    print("| " + " | ".join("-" * w for w in widths) + " |")
    for row in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    print(json.dumps({"benchmark": name, "rows": rows, "machine": about, **more}))


def _format_cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def format_range(values: Iterable[float]) -> str:
    """The least and the most."""
    numbers = list(values)
    return f"{min(numbers):.2f} to {max(numbers):.2f}"


# time


def load_average() -> float:
    """Load average of the last minute. Above the number of cores, timings say little."""
    return os.getloadavg()[0]


def seconds(run: Callable[[], object], at_least: float) -> float:
    """Seconds of one call: the median of the calls in `at_least` seconds, and of three or more."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


Runs = dict[str, tuple[Callable[[], object], Callable[[], object]]]  # name -> (forward, forward + backward)


def measure_runs(runs: Runs, at_least: float) -> dict[str, tuple[float, float]]:
    """Name -> seconds forward, seconds forward + backward."""
    return {name: (seconds(forward, at_least), seconds(both, at_least)) for name, (forward, both) in runs.items()}


# memory


class TreeMemory:
    """Peak memory of a process and its children, MB: proportional set size, so that shared pages count once."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, sum(_read_pss(pid) for pid in _list_tree(self.pid)))
            time.sleep(0.1)

    def stop(self) -> float:
        """Stop watching; returns the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


def _list_tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
    return found


def _read_pss(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
    except OSError:
        pass
    return 0.0


def read_status_kb(name: str) -> int:
    """A field of this process's /proc/self/status, such as VmRSS (held now) and VmHWM (the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def reset_peak() -> None:
    """Let VmHWM start again from what is held now (Linux). It counts all pages, those of mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb(run: Callable[[], object]) -> float:
    """By how much a run raises the memory of this process at its peak."""
    reset_peak()
    before = read_status_kb("VmRSS")
    run()
    return (read_status_kb("VmHWM") - before) / 1024


def run_in_child(action: Callable[[], Any]) -> Any:
    """The action's result (JSON) from a forked process, so that nothing is warm from the last time."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(write_end, json.dumps(action()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        result = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("a measurement failed, see above")
    return json.loads(result)


# peers


def add_peer_flag(parser: argparse.ArgumentParser, needs: str) -> None:
    """Add --peer, by default the Python that scripts/parity_env.sh makes, where it exists."""
    default = ROOT / ".venv-parity" / "bin" / "python"
    parser.add_argument(
        "--peer",
        metavar="PYTHON",
        default=str(default) if default.exists() else "",
        help=f"a Python with {needs} (default: .venv-parity/bin/python, which scripts/parity_env.sh makes); "
        '"" measures Oarlock alone',
    )


class Peer:
    """A script in another Python, asked by a JSON line and answering by one (see answer_asked)."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def ask(self, question: Any) -> Any:
        """Ask, and wait for the answer."""
        assert self._process.stdin
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.read_answer()

    def close(self) -> None:
        """End the script."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def read_answer(self) -> Any:
        """The next answer."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with code {self._process.wait()}")
        return json.loads(line)


def answer_asked(answer: Callable[[Any], Any]) -> None:
    """The peer's side: answer until stdin ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
