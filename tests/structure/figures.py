"""All figures of the source tree, each with its limit and the places that make it up."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from structure import functions, words
from structure.hops import follow
from structure.imports import circles, file_circles, import_graph, package_graph
from structure.source_tree import Function, SourceTree
from structure.walks import WALKS

MAX_LINES = 320
MAX_FILES = 16
_CODE = (".py", ".sh", ".cc", ".cu", ".h", ".cuh")


@dataclass(frozen=True)
class Figure:
    """A measured number, the places behind it, and its limit.

    Attributes:
        items: places of the product, each beginning with a file's path below llm/oarlock.
        limit: None where a figure is only reported.
    """

    name: str
    title: str
    value: float
    items: list[str]
    limit: float | None = None
    percent: bool = False

    @property
    def shown(self) -> str:
        """The value as shown in a table."""
        return f"{self.value:.1%}" if self.percent else f"{self.value:.4g}"

    @property
    def is_above_limit(self) -> bool:
        """Whether the value exceeds the limit."""
        return self.limit is not None and self.value > self.limit

    def of_package(self, package: str) -> Figure:
        """The items of one package, with their count as the value."""
        start = package.strip("/") + "/"
        inside = [i for i in self.items if (i.startswith(start) if package != "." else "/" not in i.split(":")[0])]
        return replace(self, items=inside, value=len(inside), percent=False)


def measure(root: Path) -> list[Figure]:
    """All figures of a repository."""
    tree = SourceTree(root)
    return [*_sizes(tree), *_imports(tree), *_functions(tree), *_words(tree), *_hops(root)]


def _sizes(tree: SourceTree) -> list[Figure]:
    lines = [file.num_lines for file in tree.files]
    product = [(file.name, file.num_lines) for file in tree.files]
    others = [
        (path.relative_to(tree.root).as_posix(), path.read_text(encoding="utf-8").count("\n"))
        for folder in ("tests", "benchmarks", "scripts", "custom_ops")
        for path in sorted((tree.root / folder).rglob("*"))
        if path.suffix in _CODE and "build" not in path.parts
    ]
    folders = Counter(path.parent for path in tree.package.rglob("*.py") if path.name != "__init__.py")
    crowded = [f"{_below(p, tree)}: {n} files" for p, n in sorted(folders.items()) if n > MAX_FILES]
    counted = _longest(product, MAX_LINES), _longest(others, MAX_LINES)
    return [
        Figure("files", "Python files of the product", len(lines), []),
        Figure("lines", "lines of the product", sum(lines), []),
        Figure("lines_median", "lines of a file, median", median(lines), []),
        Figure("lines_max", "lines of a file, largest", max(lines), _longest(product, 280), MAX_LINES),
        Figure("files_too_long", f"files of the product above {MAX_LINES} lines", len(counted[0]), counted[0], 0),
        Figure("others_too_long", f"files of tests, benchmarks, scripts and custom_ops above {MAX_LINES} lines", len(counted[1]), counted[1], 0),
        Figure("folder_max", "files in a folder, most (without __init__.py)", max(folders.values()), crowded, MAX_FILES),
    ]  # fmt: skip


def _longest(sizes: Iterable[tuple[str, int]], limit: int) -> list[str]:
    return [f"{name}: {lines} lines" for name, lines in sorted(sizes, key=lambda size: -size[1]) if lines > limit]


def _below(path: Path, tree: SourceTree) -> str:
    return path.relative_to(tree.package).as_posix() + "/"


def _imports(tree: SourceTree) -> list[Figure]:
    graph, packages = import_graph(tree), {file.name: file.package for file in tree.files}
    inside = [", ".join(circle) for circle in file_circles(graph, packages)]
    between = [", ".join(circle) for circle in circles(package_graph(graph, packages))]
    return [
        Figure("file_circles", "circles of imports inside a package", len(inside), inside, 0),
        Figure("package_circles", "circles of imports between packages", len(between), between, 0),
    ]


def _functions(tree: SourceTree) -> list[Figure]:
    number = len(functions.ordinary(tree))
    single = functions.used_once(tree)
    places = functions.mentions(tree, {function.name for function in single})
    once = [f"{f.title}, in {_other(places[f.name], f)}" for f in single]
    short_once = [f"{f.title}, in {_other(places[f.name], f)}" for f in functions.inlinable(tree)]
    short, long, verbless = (
        [function.title for function in found]
        for found in (functions.one_statement(tree), functions.too_long(tree), functions.without_verb(tree))
    )
    repeated = [
        f"{places[0]} {name}: also {', '.join(places[1:])}" for name, places in functions.repeated_classes(tree).items()
    ]
    return [
        Figure("functions", "functions, special methods left out", number, []),
        Figure("used_once", "functions used once", len(once) / number, once, 0.18, percent=True),
        Figure("inlinable", "of them short, with a short caller in the same file", len(short_once), short_once),
        Figure("one_statement", "functions of one statement", len(short) / number, short, percent=True),
        Figure("long_functions", f"functions above {functions.MAX_LINES} lines", len(long), long),
        Figure("without_verb", "functions whose name has no verb", len(verbless), verbless),
        Figure("repeated_classes", "public class names defined more than once", len(repeated), repeated, 0),
        Figure("fragments", "docstrings that are no sentence", len(fragments := functions.fragments(tree)), fragments, 0),
        Figure("family_tests", "comparisons of a family's name outside families/", len(tests := _family_tests(tree)), tests, 0),
        Figure("sharding_decisions", "conditions on stage and pipeline outside parallel/plan.py", len(pairs := _sharding_decisions(tree)), pairs, 1),
        Figure("mocks", "uses of unittest.mock in the product", len(mocks := _mocks(tree)), mocks, 0),
    ]  # fmt: skip


def _other(places: list[str], function: Function) -> str:
    """The mention of a function outside its definition."""
    own = f"{function.file.name}:{function.node.lineno}"
    return next((place for place in places if place != own), own)


def _family_tests(tree: SourceTree) -> list[str]:
    """Comparisons of something named family or model_type with a literal."""
    found = []
    for file in tree.files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Compare) and file.package != "families":
                sides = [node.left, *node.comparators]
                named = any(str(_last_name(side)) in {"family", "model_type"} for side in sides)
                if named and any(_is_text(side) for side in sides):
                    found.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
    return found


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is a string, or a list, tuple or set of strings."""
    values = node.elts if isinstance(node, ast.Tuple | ast.Set | ast.List) else [node]
    return bool(values) and all(isinstance(v, ast.Constant) and isinstance(v.value, str) and v.value for v in values)


def _sharding_decisions(tree: SourceTree) -> list[str]:
    """Conditions that join a plan's stage and its pipeline: which sharding is done is decided once, in the plan."""
    found = []
    for file in tree.files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.BoolOp) and file.name != "parallel/plan.py":
                names = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                if {"stage", "pipeline"} <= names:
                    found.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
    return found


def _mocks(tree: SourceTree) -> list[str]:
    return [
        f"{file.name}:{node.lineno} {ast.unparse(node)}"
        for file in tree.files
        for node in ast.walk(file.tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("unittest") for alias in node.names))
    ]


def _words(tree: SourceTree) -> list[Figure]:
    averages = {page: words.average_sentence(page) for page in words.pages(tree.root) if page.exists()}
    long = [f"{p.relative_to(tree.root)}: {a:.1f}" for p, a in sorted(averages.items(), key=lambda x: -x[1]) if a > 25]
    docs, code = words.dialect_of_docs(tree.root), words.dialect_of_code(tree)
    return [
        Figure("sentence_words", "words of a sentence, average of the longest page", max(averages.values()), long, 25),
        Figure("dialect_docs", "words of a private dialect in the pages", len(docs), docs, 0),
        Figure("dialect_code", "words of a private dialect in strings and comments", len(code), code, 0),
    ]


def _hops(root: Path) -> list[Figure]:
    found = []
    for name, (title, limit, steps) in WALKS.items():
        walk = follow(root, steps)
        summary = f"{title}: hops ({walk.files} files, {walk.turns_back} turns back)"
        found.append(Figure(f"hops_{name}", summary, walk.hops, [*walk.lines, *walk.problems], limit))
    return found
