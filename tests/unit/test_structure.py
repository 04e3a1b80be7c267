"""The house's rules: nobody imports upstream, and asking for help does not import paddle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "llm" / "oarlock"
# Each room may use itself and those before it. Modules beside the rooms (errors, files, ...) may be used by all;
# the CLI and doctor may use all.
ROOMS = ("config", "parallel", "ops", "data", "models", "train", "export", "serve")
# What is ready for the world knows nothing of training, and a server knows only the directories that it is given.
NEVER = {"export": {"train"}, "serve": {"train", "export"}}
BESIDE = {
    "downloads",
    "errors",
    "files",
    "formats",
    "environment",
    "http_download",
    "light_imports",
    "memory",
    "own_code",
    "processes",
    "products",
    "triton_config",
    "versions",
    "__init__",
}
ABOVE = {
    "cli",
    "cli_parallel",
    "cli_convert",
    "cli_resize",
    "cli_export",
    "cli_chat",
    "cli_serve",
    "cli_weights",
    "cli_admin",
    "doctor",
    "__main__",
}


def imported(path: Path) -> set[str]:
    """oarlock.X that a file imports at run time (not under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("oarlock"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("oarlock.")}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_imports_upstream(path):
    parts = path.relative_to(PACKAGE).parts
    used = imported(path) - {"__version__"}
    if parts[0] == "formats":
        allowed = {"formats", "errors"}
    elif len(parts) == 1:
        allowed = {*ROOMS, *BESIDE, *ABOVE} if path.stem in ABOVE else BESIDE
    else:
        allowed = {*ROOMS[: ROOMS.index(parts[0]) + 1], *BESIDE} - NEVER.get(parts[0], set())
    assert used <= allowed, f"{path} imports {sorted(used - allowed)}"


def test_every_room_has_a_place_in_the_order():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == {*ROOMS, "formats"}  # which lies beside them and knows none


def test_only_one_file_knows_training_arguments():
    users = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "TrainingArguments(" in p.read_text()]
    assert users == ["parallel/paddle_args.py"]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "oarlock", "--version"],
        ["-m", "oarlock", "data", "pretrain", "--help"],
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


# What parses JSON beside oarlock.formats, and why that may.
OWN_JSON = {
    "data/json_text.py": "records of data, as strict as formats but for what stands beside the text",
    "data/json_lists.py": "finds the end of a record that json_text has refused",
    "data/fast_tokenizer.py": "what the tokenizers library says of a tokenizer in memory",
    "data/marked_encoding.py": "the same",
    "data/tokenizer_identity.py": "the same",
    "models/save.py": "what save_pretrained wrote a moment before",
    "parallel/nodes.py": "what a rank of this launch put into its memory, which only such ranks reach",
    "serve/admin_client.py": "its answer",
    "serve/front/options.py": "what `oarlock serve` tells the front on its input",
    "serve/front/process.py": "the same",
    "serve/json_form.py": "a request that the front has bounded; checked field by field behind it",
    "serve/triton_fields.py": "the same",
    "serve/triton_relay.py": "the model's configuration, which `oarlock serve` wrote, from Triton",
    "serve/triton_stream.py": "the same",
    "serve/settings.py": "limits from the environment, which `oarlock serve` sets",
    "train/flops.py": "a table of this package",
    "train/rehearsal_rank.py": "what a process of this rehearsal wrote into its folder",
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


def test_only_formats_reads_json_and_yaml_of_others():
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if parses(path)}
    assert {name for name in users if not name.startswith("formats/")} == set(OWN_JSON)


def test_no_eval_exec_or_shell():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert False, f"{path}:{node.value.lineno}: shell"  # noqa: B011
