"""Must work on every Python: train some steps, save, resume bit for bit, ask, serve.

    python tests/smoke.py

By itself, without pytest, in an environment with the extra [serve]; scripts/smoke.sh runs it on every Python found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kill_and_resume import ROOT, command, hash_file, make_model

STEPS = 4  # warm-up takes three


def run(*words: str | Path) -> str:
    """Run a command and return its output; a failure ends the smoke test."""
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def main() -> None:
    """Run the command line."""
    with tempfile.TemporaryDirectory(prefix="oarlock-smoke-") as name:
        folder = Path(name)
        model, trained = folder / "model", folder / "trained"
        make_model(model)
        said = run(*command(model, trained, STEPS))
        assert f"done: {STEPS} steps" in said, said
        whole = hash_file(trained / "model.safetensors")

        # As after a stop at step 2, where a checkpoint was written.
        (trained / "model.safetensors").unlink()
        for checkpoint in trained.glob("checkpoint-*"):
            if checkpoint.name != "checkpoint-2":
                shutil.rmtree(checkpoint)
        said = run(*command(model, trained, STEPS))
        assert "resuming from" in said and "(step 2," in said, said
        assert hash_file(trained / "model.safetensors") == whole, "the resumed run has other weights"

        assert "\nA: " in run(sys.executable, "-m", "oarlock", "ask", trained, "Repeat the words.\nriver window")
        said = run("bash", "scripts/quickstart_serve.sh", sys.executable, trained, folder / "served")
        assert said.count("\nA: ") == 2, said
    print(f"smoke: trained, resumed, asked and served with Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
