"""Fuzz one reader or front door for a while: `python tests/fuzz/run.py NAME --seconds 600`.

Prints executions, executions a second and findings; leaves with 1 when there are any. Inputs of findings lie in
build/fuzz/NAME afterwards, and `--replay FILE` runs one of them again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "llm")]

from table import TABLE  # noqa: E402


def _choose(engine: str) -> str:
    if engine:
        return engine
    return "atheris" if importlib.util.find_spec("atheris") else "hypothesis"


def _harness(name: str, engine: str):
    row = TABLE[name]
    if engine != "atheris":
        return importlib.import_module(row.module).HARNESS
    import atheris

    with atheris.instrument_imports(include=["oarlock", row.module, *row.instrument]):
        return importlib.import_module(row.module).HARNESS


def _fuzz(name: str, engine: str, seconds: float, results: Path) -> None:
    """Fuzz in a separate process: libFuzzer ends the one that it runs in."""
    harness = _harness(name, engine)
    from engines import with_atheris, with_hypothesis
    from harness import keep, open_judge

    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(open_judge(harness))
        corpus = results / "corpus"
        corpus.mkdir()
        start = time.monotonic()

        def done() -> None:
            took = time.monotonic() - start
            stack.close()
            found = keep(list(judge.findings.values()), ROOT / "build" / "fuzz" / name)
            counts = {"executions": judge.executions, "refused": judge.refused, "seconds": took, "findings": found}
            (results / "counts.json").write_text(json.dumps(counts))

        if engine == "atheris":
            with_atheris(judge, seconds, corpus, done)
        else:
            with_hypothesis(judge, seconds)
            done()


def run(name: str, seconds: float, engine: str = "") -> dict:
    """Fuzz in a child process and return its counts. A crashed child is a finding too."""
    engine = _choose(engine)
    with tempfile.TemporaryDirectory(prefix="oarlock-fuzz-run-") as folder:
        command = [sys.executable, __file__, name, "--seconds", str(seconds), "--engine", engine, "--results", folder]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        counts = Path(folder, "counts.json")
        if counts.exists():
            return json.loads(counts.read_text()) | {"engine": engine}
        kept = ROOT / "build" / "fuzz" / name
        kept.mkdir(parents=True, exist_ok=True)
        for crash in Path(folder, "corpus").glob("crash-*"):
            (kept / crash.name).write_bytes(crash.read_bytes())
        said = f"the process ended with {child.returncode}; inputs in {kept}\n{child.stderr[-4000:]}"
        return {"executions": 0, "refused": 0, "seconds": seconds, "findings": [said], "engine": engine}


def _replay(name: str, path: Path) -> int:
    from harness import open_judge

    with open_judge(_harness(name, "")) as judge:
        judge.seeds()
        finding = judge(path.read_bytes())
        print(f"{finding.what}\n{finding.trace}" if finding else f"fine ({'refused' if judge.refused else 'read'})")
    return int(finding is not None)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(TABLE))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default="")
    parser.add_argument("--replay", type=Path, help="an input to run again")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay:
        return _replay(options.name, options.replay)
    if options.results:
        _fuzz(options.name, options.engine, options.seconds, options.results)
        return 0
    counts = run(options.name, options.seconds, options.engine)
    rate = counts["executions"] / max(counts["seconds"], 1e-9)
    print(
        f"{options.name}: {counts['executions']:,} executions in {counts['seconds']:.0f} s by {counts['engine']} "
        f"({rate:,.0f} a second), {counts['refused']:,} refused, {len(counts['findings'])} findings"
    )
    for finding in counts["findings"]:
        print(f"\n{finding}")
    return int(bool(counts["findings"]))


if __name__ == "__main__":
    sys.exit(main())
