"""scripts/setup.sh picks the Python, and the Paddle wheel that the machine's driver can run; so does scripts/smoke.sh."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT


def choose(tmp_path: Path, smi: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run choose_paddle with an nvidia-smi that prints `smi` (None: no nvidia-smi)."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    if smi is not None:
        program = binaries / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{smi}'\n")
        program.chmod(0o755)
    path = f"{binaries}:/usr/bin:/bin" if smi is not None else "/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/scripts/setup.sh; choose_paddle"],
        capture_output=True, text=True, check=False,
        env={"PATH": path, "HOME": os.environ.get("HOME", "/"), **environment},
    )  # fmt: skip


LINE = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {} |"


@pytest.mark.parametrize(
    ("cuda", "wheel"),
    [
        ("13.0", "cu130"),
        ("13.2", "cu130"),
        ("12.9", "cu129"),
        ("12.8", "cu126"),
        ("12.6", "cu126"),
        ("12.4", "cu118"),
        ("11.8", "cu118"),
    ],
)
def test_the_newest_wheel_that_the_driver_runs_is_chosen(tmp_path, cuda, wheel):
    result = choose(tmp_path, LINE.format(cuda))
    assert result.stdout.strip() == wheel, result.stderr


def test_without_a_driver_the_cpu_wheel_is_chosen(tmp_path):
    assert choose(tmp_path, None).stdout.strip() == "cpu"
    (tmp_path / "bin").rmdir()
    assert choose(tmp_path, "NVIDIA-SMI has failed").stdout.strip() == "cpu"


def test_the_choice_of_the_user_takes_precedence(tmp_path):
    assert choose(tmp_path, LINE.format("12.6"), PADDLE="cu118").stdout.strip() == "cu118"


def test_an_old_driver_is_reported(tmp_path):
    result = choose(tmp_path, LINE.format("11.2"))
    assert result.returncode == 1 and "needs 11.8 or newer" in result.stderr


# A Python that reports its version and creates environments with it.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-c "*) echo VERSION ;;
  "-m pip") exit 0 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "--version ") echo "Python VERSION.1" ;;
esac
"""


def pythons(folder: Path, **versions: str) -> Path:
    """Make programs with these names (an underscore for the dot); an empty version is one that does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in versions.items():
        program = folder / name.replace("_", ".")
        program.write_text(PYTHON.replace("VERSION", version) if version else "#!/bin/sh\nexit 127\n")
        program.chmod(0o755)
    return folder


def shell(tmp_path: Path, code: str, script: str = "setup.sh", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash with the functions of a script, tmp_path/bin first in PATH, and the environment tmp_path/venv."""
    tools = tmp_path / "tools"  # no Python of this machine
    tools.mkdir(exist_ok=True)
    for name in ("bash", "cat", "cp", "mkdir", "rm", "dirname", "basename", "id", "env"):
        if not (tools / name).exists():
            (tools / name).symlink_to(next(p for d in ("/usr/bin", "/bin") if (p := Path(d) / name).exists()))
    given = {"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path / "home"), "VENV": str(tmp_path / "venv")}
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/scripts/{script}; {code}"],
        capture_output=True, text=True, check=False, env=given | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ({"python3_10": "3.10", "python3_11": "3.11", "python3_12": "3.12", "python3": "3.11"}, "python3.12"),
        ({"python3": "3.12"}, "python3"),  # Ubuntu 24.04
        ({"python3_12": "", "python3_11": "3.11"}, "python3.11"),  # pyenv's shim of a version that is not active
        ({"python3_13": "3.13", "python3": "3.13", "python": "3.10"}, "python"),
    ],
)
def test_the_newest_supported_python_is_chosen(tmp_path, found, taken):
    pythons(tmp_path / "bin", **found)
    result = shell(tmp_path, "find_python")
    assert result.stdout.strip() == str(tmp_path / "bin" / taken), result.stderr


def test_without_a_supported_python_the_error_says_what_to_install(tmp_path):
    pythons(tmp_path / "bin", python3="3.13")
    result = shell(tmp_path, "find_python")
    assert result.returncode == 1
    assert "no Python of 3.12, 3.11, 3.10 found (python3 is 3.13). Install one" in result.stderr
    result = shell(tmp_path, "find_python", PYTHON="python3")
    assert result.returncode == 1 and "python3 is 3.13" in result.stderr


def test_an_environment_keeps_its_python_until_another_is_requested(tmp_path):
    folder = pythons(tmp_path / "bin", python3_12="3.12", python3_11="3.11")
    made = "python=$(find_python); make_venv $python; version_of $VENV/bin/python"
    assert shell(tmp_path, made, PYTHON=str(folder / "python3.11")).stdout.splitlines()[-1] == "3.11"
    assert shell(tmp_path, made).stdout.splitlines() == ["3.11"]  # nothing is created
    asked = shell(tmp_path, made, PYTHON="python3.12").stdout
    assert "has Python 3.11, so it is rebuilt" in asked and asked.splitlines()[-1] == "3.12"
    pythons(tmp_path / "venv" / "bin", python="3.9")  # from when that version was supported
    again = shell(tmp_path, made).stdout
    assert "has Python 3.9, so it is rebuilt" in again and again.splitlines()[-1] == "3.12"


def test_the_smoke_test_runs_on_the_other_pythons(tmp_path):
    pythons(tmp_path / "venv" / "bin", python="3.12")
    pythons(tmp_path / "bin", python3_10="3.10", python3_11="")
    pythons(tmp_path / "home" / ".pyenv" / "versions" / "3.11.9" / "bin", python3_11="3.11")
    pythons(tmp_path / "home" / ".local" / "share" / "uv" / "python" / "cpython-3.12.1" / "bin", python3_12="3.12")
    found = shell(tmp_path, "for version in $PYTHONS; do python_of $version; done", "smoke.sh").stdout.splitlines()
    assert [path.removeprefix(str(tmp_path)) for path in found] == [
        "/home/.local/share/uv/python/cpython-3.12.1/bin/python3.12",
        "/home/.pyenv/versions/3.11.9/bin/python3.11",
        "/bin/python3.10",
    ]
    # The versions it would set up: bash runs setup.sh, and the environment runs the test.
    said = shell(tmp_path, "bash() { echo set up $PYTHON; exit 0; }; main_smoke", "smoke.sh").stdout
    assert "3.12" not in said and "python3.11" in said


def test_the_supported_pythons_are_the_same_everywhere():
    from oarlock.cli.environment_checks import _TESTED_PYTHONS

    script, project = ((ROOT / name).read_text() for name in ("scripts/setup.sh", "pyproject.toml"))
    newest_first = re.findall(r'^PYTHONS="(.*)"', script, re.MULTILINE)[0].split()
    assert tuple(reversed(newest_first)) == _TESTED_PYTHONS
    assert re.findall(r"Python :: (3\.\d+)", project) == list(_TESTED_PYTHONS)
    last = int(newest_first[0].partition(".")[2])
    assert f'requires-python = ">={newest_first[-1]},<3.{last + 1}"' in project
    for name in ("README.md", "constraints.txt"):
        assert (
            f"Python {', '.join(_TESTED_PYTHONS[:-1])} {'or' if name == 'README.md' else 'and'} {_TESTED_PYTHONS[-1]}"
            in (ROOT / name).read_text()
        )
