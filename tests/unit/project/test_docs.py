"""Every command in the documentation is accepted by the programs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from oarlock.cli.main import make_parser
from oarlock.config import FinetuneConfig, PretrainConfig, load_config

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md", "custom_ops/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(path.name, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    return found


@pytest.mark.parametrize(("document", "line"), commands(), ids=lambda text: text[:60])
def test_commands_are_accepted(document, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[:2] in (["oarlock", "pretrain"], ["oarlock", "finetune"]):
        kind = PretrainConfig if words[1] == "pretrain" else FinetuneConfig
        assert load_config(kind, [word for word in words[2:] if word != "--print_config"])
    elif words[0] == "oarlock":
        with contextlib.suppress(SystemExit) as exited:
            make_parser().parse_args(words[1:])
        assert exited is None or "--version" in words
    elif words[:2] in (["python", "llm/run_pretrain.py"], ["python", "llm/finetune_generation.py"]):
        kind = PretrainConfig if "pretrain" in words[1] else FinetuneConfig
        rest = [word for word in words[2:] if word != "--print_config"]
        assert "--help" in rest or load_config(kind, rest)
    elif words[0] == "curl":  # tests/e2e uses a server at these addresses
        (address,) = [word for word in words if word.startswith("http://127.0.0.1:")]
        assert address.split("/", 3)[3].startswith(("v1/chat/completions", "v2/models/", "v2/repository/models/"))
        assert all(json.loads(given) for option, given in pairwise(words) if option in ("-d", "--data"))
    else:
        programs = [word for word in words if word.endswith((".sh", ".py"))]
        assert all((ROOT / program).exists() for program in programs)
        assert programs or words[0] in ("visualdl", "source", "pip", "git", "sbatch", "mkdir", "cp", "openssl"), (
            f"who runs this? {line}"
        )


def test_the_table_of_families_is_the_registry():
    from oarlock.families.registry import make_families_table

    assert f"{make_families_table()}\n" in (ROOT / "docs/families.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page get."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^):]+)\)", path.read_text(encoding="utf-8").replace("\n", " ")):
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {target}"


def test_python_examples_import_existing_names():
    for path in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "oarlock":
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{path.name}: {node.module}"


def test_every_unusual_pin_has_a_reason():
    odd = ("aistudio-sdk", "numpy", "protobuf", "pyarrow", "pandas", "datasets", "setuptools")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for name in odd:
        (line,) = [line for line in lines if line.startswith(f"{name}==")]
        assert "  # " in line, name


def test_no_page_has_merge_markers_or_unbalanced_bold():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(<{7}|>{7}|={7})( |$)", text, re.M), path.name
        prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        assert not [one for one in prose.split("\n\n") if one.count("**") % 2], path.name
