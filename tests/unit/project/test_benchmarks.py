"""The benchmarks import only what exists and read their flags, so that a rename can't break one unnoticed.

mypy checks their calls (pyproject.toml).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import LLM, ROOT

BENCHMARKS = ROOT / "benchmarks"


def find_module(name: str, importer: Path) -> Path | None:
    """The file of an Oarlock module; None for any other module."""
    roots = [LLM] if name.split(".")[0] == "oarlock" else [importer.parent, BENCHMARKS]
    for root in roots:
        base = root / name.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return path
    assert name.split(".")[0] != "oarlock", f"{importer.name} imports {name}, which does not exist"
    return None


def defined_names(path: Path) -> set[str]:
    """What a file defines or imports at its top level, and its submodules."""
    names = {child.stem for child in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return names


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.name)
def test_imports_of_benchmarks_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and (module := find_module(node.module, path)):
            missing = {alias.name for alias in node.names} - defined_names(module)
            assert not missing, f"{path}:{node.lineno}: {node.module} has no {', '.join(sorted(missing))}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                find_module(alias.name, path)


PROGRAMS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
NEEDS_TORCH = "rms_norm_gpu.py"  # at its imports; tests/unit/ops/test_cuda_kernels.py runs it


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_benchmark_starts_and_has_the_flags_that_its_docstring_names(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and re.search(rf"python benchmarks/\S*{path.name}", docstring), "no usage in the docstring"
    if path.name == NEEDS_TORCH:
        return
    command = [sys.executable, str(path), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    _, described, options = result.stdout.partition(docstring)
    assert described, "the help does not begin with the docstring: see make_parser"
    named = {
        flag for line in docstring.splitlines() if "python benchmarks" in line for flag in re.findall(r"--\w+", line)
    }
    assert named <= set(re.findall(r"--\w+", options)), named


def test_every_benchmark_reports_a_table_and_json():
    silent = [path.name for path in PROGRAMS if "report(" not in path.read_text(encoding="utf-8")]
    assert not silent, f"{silent}: see report() of benchmarks/common.py"
