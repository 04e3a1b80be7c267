"""The claims of the documentation about options, messages and combinations are true."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.options import list_option_specs
from oarlock.errors import ConfigError
from oarlock.families.model_sizes import ModelSizes
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.plan_rules import check_plan
from structure.words import average_sentence, sentences

ROOT = Path(__file__).resolve().parents[3]
NOT_AN_OPTION = "not an option here; the error says why or what to use"
NOT_OPTIONS = NOT_AN_OPTION.replace("an option", "options")
LLAMA_7B = ModelSizes("llama", num_layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000)


def rows(page: str, section: str = "") -> Iterator[list[str]]:
    """The cells of the tables of a page, or of one of its sections, without their headers."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("|") and before.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def quoted(cell: str) -> list[str]:
    return [word.strip() for word in re.findall(r"``(.+?)``|`(.+?)`", cell) for word in word if word]


def refusal(config_class: type, flags: list[str]) -> str:
    try:
        load_config(config_class, flags)
    except ConfigError as error:
        return str(error)
    return ""


# coming_from.md


OPTION_ROWS = [
    (section, theirs, ours)
    for section in ("LLaMA-Factory", "Hugging Face Trainer, TRL and PEFT", "axolotl", "Megatron-LM")
    for theirs, ours in rows("coming_from.md", section)
]


@pytest.mark.parametrize(("section", "theirs", "ours"), OPTION_ROWS, ids=lambda text: text[:40])
def test_the_documented_option_names_match_the_hints(section, theirs, ours):
    config_class = PretrainConfig if section == "Megatron-LM" else FinetuneConfig
    for name in quoted(theirs):
        name, _, value = name.partition(":")
        said = refusal(config_class, [f"--{name}", *([value.strip()] if value else []), "--do_train"])
        assert f"unknown flag --{name}: " in said, said
        if ours in (NOT_AN_OPTION, NOT_OPTIONS):
            assert "use --" not in said, said
            continue
        for option in quoted(ours.split(";")[0]):
            own, _, own_value = option.partition(":")
            assert own in list_option_specs(config_class)
            assert f"--{own} {own_value.strip()}".strip() in said, said


# not_supported.md


def combination(cell: str) -> tuple[type, list[str]]:
    """The flags that a row combines, and its entrypoint."""
    asked = re.split(r" without ", cell)[0]
    flags = [word for flag in quoted(asked) for word in flag.split() if not flag.startswith("run_")]
    return (PretrainConfig if "pretraining" in cell else FinetuneConfig), flags


@pytest.mark.parametrize(
    "cell", [row[0] for row in rows("not_supported.md", "Combinations")], ids=lambda text: text[:60]
)
def test_a_combination_that_is_not_supported_is_refused(cell):
    config_class, flags = combination(cell)
    if "--tensor_parallel_degree 3" in cell:
        plan, _ = make_plan(load_config(config_class, ["--do_train", *flags]).config, 3)
        with pytest.raises(ConfigError, match="num_attention_heads 32"):
            check_plan(plan, LLAMA_7B, 1024)
        return
    with pytest.raises(ConfigError, match=re.escape(flags[0])):
        make_plan(load_config(config_class, ["--do_train", *flags]).config, 8)


def test_the_same_plan_without_the_combination_is_accepted():
    for config_class in (PretrainConfig, FinetuneConfig):
        make_plan(load_config(config_class, ["--do_train"]).config, 8)


# troubleshooting.md


def messages_of(tree: ast.AST) -> Iterator[str]:
    """Every text of a module except docstrings; "…" stands for inserted values."""
    nodes = list(ast.walk(tree))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def every_message() -> str:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "llm").rglob("*.py")]
    shell = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh")]
    return "\n".join([*(text for source in sources for text in messages_of(ast.parse(source))), *shell])


def test_troubleshooting_quotes_real_messages(every_message):
    ours = ("Starting", "Options", "Data", "Models and tokenizers", "Training", "Exporting and serving")
    given = [message for section in ours for cell, _ in rows("troubleshooting.md", section) for message in quoted(cell)]
    assert len(given) > 40
    assert not [message for message in given if message not in every_message]


# all pages


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / x / "README.md" for x in ("deploy", "custom_ops"))]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short(page):
    assert average_sentence(page) <= 20
    assert max(len(sentence.split()) for sentence in sentences(page.read_text(encoding="utf-8"))) <= 45


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_the_documentation_exist(page):
    named = re.findall(
        r"(?<![\w/])(?:tests|scripts|configs|benchmarks|deploy|notebooks|custom_ops)/[\w/.-]*\w",
        page.read_text(encoding="utf-8"),
    )
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not [path for path in missing if not path.startswith("deploy/kubernetes")]


def test_the_example_of_a_new_family_is_its_file():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = (ROOT / "llm/oarlock/families/dense/qwen3.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in page
