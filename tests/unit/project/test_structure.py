"""Rules of the source tree: packages import in one order, and asking for help does not import paddle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "llm" / "oarlock"
# A package may import itself and those before it, at run time and for types.
ORDER = (
    *(
        "errors",
        "typing",
        "versions",
        "package_files",
        "formats",
        "files",
        "families",
        "compat",
        "environment",
        "config",
        "sampling",
        "cpu_ranks",
        "launch",
    ),
    *(
        "parallel",
        "ops",
        "hub",
        "data",
        "weights",
        "decoder",
        "model_config",
        "peft",
        "models",
        "merge",
        "triton_repository",
        "train",
    ),
    *("export", "serve", "api", "cli", "__main__"),
)
# An exported folder does not depend on training, and a server depends only on the folders it is given.
NEVER = {"export": {"train"}, "serve": {"train", "export"}}


def imported_packages(path: Path) -> set[str]:
    """The packages (or top-level modules) of oarlock that a file imports, TYPE_CHECKING and functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "oarlock":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("oarlock.")}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_order_of_packages(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    # Templates of model.py are copied into repositories, and import what is copied with them.
    is_template = path.is_relative_to(PACKAGE / "triton_repository" / "models")
    if own == "__init__" or is_template:
        return
    before = set(ORDER[: ORDER.index(own) + 1]) - NEVER.get(own, set())
    backward = imported_packages(path) - {"__version__"} - before
    assert not backward, f"{path} imports {sorted(backward)}"


def test_every_package_is_in_the_order():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ORDER)


def test_only_one_file_uses_training_arguments():
    users = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "TrainingArguments(" in p.read_text()]
    assert users == ["parallel/training_args.py"]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "oarlock", "--version"],
        ["-m", "oarlock", "data", "pretrain", "--help"],
        ["-m", "oarlock", "launch", "--gpus", "2", "--dry_run", "oarlock/__init__.py"],
        ["-m", "oarlock", "serve", "--help"],
        ["-m", "oarlock", "serve", "tests"],  # refused: no repository
        ["-m", "oarlock", "serve", "tests", "--max-batch", "0"],
        ["-m", "oarlock", "merge", "--adapter", "tests", "--output", "out"],  # refused: not an adapter
        ["-m", "oarlock", "convert", "--to", "hf", "--input", "x", "--output", "."],  # refused: a folder with files
        ["-m", "oarlock", "chat", "tests", "--top-p", "2"],  # refused: out of range
    ],
)
def test_light_commands_do_not_import_paddle(words):
    code = f"import sys, runpy; sys.argv = {words[1:]!r}\ntry: runpy.run_module('oarlock', run_name='__main__')\nexcept SystemExit: pass\nassert not {{'paddle', 'paddlenlp'}} & set(sys.modules), 'paddle was imported'"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr


# Files outside oarlock.formats that parse JSON, and why they may.
OWN_JSON = {
    "data/files/json_text.py": "records of data; as strict as formats, except for the text around them",
    "data/files/json_lists.py": "finds the end of a record that json_text has refused",
    "data/tokenizers/fast_tokenizer.py": "what the tokenizers library says of a tokenizer in memory",
    "data/examples/marked_encoding.py": "the same",
    "data/tokenizers/fingerprint.py": "the same",
    "families/published_sizes.py": "a file of this package",
    "weights/save.py": "what save_pretrained wrote a moment before",
    "parallel/nodes.py": "what a rank of this launch put into its memory, which only such ranks reach",
    "serve/supervision/admin_client.py": "its answer",
    "serve/front/process.py": "messages of `oarlock serve` to the front",
    "serve/triton/fastdeploy_json.py": "a request that the front has bounded; checked field by field behind it",
    "serve/triton/fields.py": "the same",
    "serve/triton/relay.py": "the model's configuration, which `oarlock serve` wrote, from Triton",
    "serve/triton/backend.py": "the same, and settings from the environment, which `oarlock serve` sets",
    "train/throughput.py": "a table of this package",
    "train/rehearsal/rank.py": "what a process of this rehearsal wrote into its folder",
}
PARSERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "yaml": {"load", "safe_load", "full_load", "compose", "parse", "scan"},
}


def parses(path: Path) -> bool:
    """Whether a file calls a parser of JSON or YAML."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr.removesuffix("_all") in PARSERS.get(node.value.id, ())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def test_only_formats_parses_json_and_yaml():
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if parses(path)}
    assert {name for name in users if not name.startswith("formats/")} == set(OWN_JSON)


def test_no_eval_exec_or_shell():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert False, f"{path}:{node.value.lineno}: shell"  # noqa: B011
