"""What differs between model families is data in oarlock.families; no other code names one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.errors import ModelError
from oarlock.families.registry import BROKEN, FAMILIES, find_family

PACKAGE = Path(__file__).resolve().parents[3] / "llm" / "oarlock"
ELSEWHERE = {
    "data/tokenizers/folder.py": "which tokenizer class transformers 5 chooses for a model_type, also of families not here",
}


def names_in(path: Path) -> set[str]:
    """The families that a file names in a string of its own."""
    constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    return constants & {*FAMILIES, *BROKEN}


def test_no_file_outside_the_registry_names_a_family():
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    outside = {name: path for name, path in files.items() if not name.startswith("families/")}
    found = {name: names_in(path) for name, path in outside.items() if names_in(path)}
    assert found.keys() == ELSEWHERE.keys(), f"what is special about a family belongs into oarlock/families: {found}"


def test_every_family_has_a_file_of_its_name():
    records = {path.stem for path in (PACKAGE / "families").glob("*/*.py")}
    assert records - {"__init__"} == set(FAMILIES)


def test_the_registry_needs_no_paddle():
    code = (
        "import sys, oarlock.families.registry, oarlock.families.model_sizes\n"
        "assert not {'paddle', 'paddlenlp', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, timeout=300)


def test_families_that_are_not_supported_are_refused():
    assert find_family("llama") is FAMILIES["llama"]
    with pytest.raises(ModelError, match="model_type 'bert' is not supported; Oarlock has llama, qwen2"):
        find_family("bert")
    with pytest.raises(ModelError, match=r"gpt_oss models can't be run here: our decoder's experts"):
        find_family("gpt_oss")
