"""The prose: sentence lengths of the documentation, and words of a private dialect in text that people read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from structure.source_tree import SourceTree

# Word -> the plain alternative. Matched case-insensitively, as whole words.
DIALECT = {
    r"whole or not there": "complete or absent",
    r"not there": "missing",
    r"goes first|go first": "takes precedence",
    r"goes on|go on|going on|went on": "continues, resumes",
    r"stands? still": "pauses",
    r"made up first": "runs first",
    r"most of a": "largest",
    r"of the choice of": "for choosing",
    r"gives? (its|their) places? free|gives? free": "frees its slot",
    r"out of the house|the house|houses?": "the project",
    r"rooms?": "package, space",
    r"told|tells|untold": "reported, reports",
    r"\w+ stands? (in|on|for|at|here|there|beside)": "is in, is at",
    r"beside": "besides, next to, compared with",
    r"scores (of|for) (the )?(tokens?|logits)|hold_scores|held scores": "logits",
    r"turned (matrix|matrices|weights?|around)": "transposed",
    r"for who": "for those who",
    r"that it has not": "that it lacks",
    r"has its say|without a word": "silently",
    r"nothing found": "no problems found",
    r"of ours|of theirs": "our, their",
    r"is passed over|passed over": "skipped",
    r"deals? (it |them )?out": "distributes",
    r"e to the power of": "exp()",
    r"against repetitions": "penalise repeated tokens",
    r"likeliest": "most likely",
    r"e\.g\. of": "for example",
    r"word for word": "verbatim",
    r"what differs": "the differences",
}
_PATTERN = re.compile("|".join(rf"(?P<w{i}>\b({words})\b)" for i, words in enumerate(DIALECT)), re.IGNORECASE)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def pages(root: Path) -> list[Path]:
    """README, CONTRIBUTING and docs/."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def sentences(markdown: str) -> list[str]:
    """The sentences of a page. Code blocks, tables, headings and comments are left out; `code` counts as a word."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", markdown, flags=re.DOTALL)
    lines = ["" if re.match(r"\s*(\||#|<)", line) else line for line in text.splitlines()]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", "\n".join(lines))
    found = []
    for block in blocks:
        plain = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", block)
        plain = re.sub(r"`[^`]*`", "CODE", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain))
        found += [
            part for part in re.split(r"(?<=[.!?])[)\"*]*\s+(?=[\"(*]*[A-Z0-9])", plain) if re.search(r"\w", part)
        ]
    return found


def average_sentence(page: Path) -> float:
    """Words per sentence of a page."""
    counts = [len(re.findall(r"[\w'/.-]*\w[\w'/.%-]*", part)) for part in sentences(page.read_text(encoding="utf-8"))]
    return sum(counts) / len(counts) if counts else 0.0


def dialect_of_docs(root: Path) -> list[str]:
    """Words of DIALECT in the pages, with where they are."""
    found = []
    for page in pages(root):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{page.relative_to(root)}:{number} {word}" for word in _dialect(line)]
    return found


def dialect_of_code(tree: SourceTree) -> list[str]:
    """Words of DIALECT in the string literals, docstrings and comments of the product."""
    found = []
    for file in tree.files:
        for number, text in _texts(file.tree):
            found += [f"{file.name}:{number} string: {word}" for word in _dialect(text)]
        for number, line in enumerate(file.text.splitlines(), 1):
            _, mark, comment = line.partition("# ")
            found += [f"{file.name}:{number} comment: {word}" for word in (_dialect(comment) if mark else ())]
    return found


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines of string literals that hold several words, docstrings among them; Chinese and its translations are data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for offset, line in enumerate(node.value.splitlines()):
                if not _CHINESE.search(line):
                    yield node.lineno + offset, line


def _dialect(text: str) -> Iterator[str]:
    for match in _PATTERN.finditer(text):
        number = int(next(name for name, value in match.groupdict().items() if value)[1:])
        yield f'"{match[0]}": {list(DIALECT.values())[number]}'
