"""Measures how far a reader goes from an entrypoint to the place where a behaviour happens.

A walk is a list of steps, places in the source in the order in which they run. It begins in the entrypoint, after the
flags are read, and ends where the behaviour happens. It holds every function on the way, and every place that decides
about the behaviour again; what would be the same without it (writing files, collectives, reading weights) is left out.
Every step is named by the one before it, or by an earlier one: then the reader turns back. A hop is a change of file
from a step to the next.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Step:
    """A place that a reader visits.

    Attributes:
        place: `file:name`, with the file's path below llm/oarlock (`train/trainer.py:OarlockTrainer.training_step`).
        wire: a word that joins it to the step before it where no name in Python does: another process, a file, a hook.
    """

    place: str
    wire: str = ""

    @property
    def file(self) -> str:
        """The file's path below llm/oarlock."""
        return self.place.partition(":")[0]

    @property
    def names(self) -> list[str]:
        """The parts of the name after the file: class and method, or a function."""
        return self.place.partition(":")[2].split(".")


@dataclass(frozen=True)
class Walk:
    """A walk that was checked."""

    hops: int
    turns_back: int
    files: int
    problems: list[str]
    lines: list[str]  # of a drawing


def follow(root: Path, steps: list[Step]) -> Walk:
    """Check that each step is named by an earlier one, and count.

    Args:
        root: of the repository.
    """
    seen: list[_Source] = []
    problems, lines, turns, hops = [], [], 0, 0
    for number, step in enumerate(steps):
        source = _read(root / "llm" / "oarlock" / step.file, step.names)
        if source is None:
            problems.append(f"{step.place} does not exist")
            source = _Source(ast.Module([], []), "")
        callers = [i for i in reversed(range(number)) if _leads_to(seen[i], step, source)]
        if number and not callers:
            problems.append(f"no step before {step.place} names it")
        turned_back = bool(callers) and callers[0] != number - 1
        moved = number > 0 and step.file != steps[number - 1].file
        turns, hops = turns + turned_back, hops + moved
        before = f"back to {steps[callers[0]].place}, " if turned_back else ""
        lines.append(f"{hops if moved else '':>3} {before}{step.place}{f'  ({step.wire})' if step.wire else ''}")
        seen.append(source)
    return Walk(hops, turns, len({step.file for step in steps}), problems, lines)


class _Source(NamedTuple):
    """The source of a step."""

    node: ast.AST
    text: str


def _leads_to(caller: _Source, step: Step, source: _Source) -> bool:
    """Whether an earlier step names a step: the function, or its class; or both contain the word of the wire."""
    if step.wire:
        return all(re.search(rf"\b{re.escape(step.wire)}\b", text) for text in (caller.text, source.text))
    return not {name for name in step.names if name != "__init__"}.isdisjoint(_named(caller.node))


def _named(node: ast.AST) -> set[str]:
    """The names that code uses, imports, or has in a string (dotted paths); not those in docstrings and comments."""
    found: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            found.add(inner.attr)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            found |= {part for alias in inner.names for part in alias.name.split(".")}
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and " " not in inner.value:
            found |= set(re.findall(r"\w+", inner.value))
    return found


def _read(path: Path, names: list[str]) -> _Source | None:
    """The source of a function, class, method or module-level name; of the whole file where `names` is [""]."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text) if path.suffix == ".py" else ast.Module([], [])
    for name in filter(None, names):
        found = next((child for child in ast.iter_child_nodes(node) if name in _defines(child)), None)
        if found is None:
            return None
        node = found
    return _Source(node, text if isinstance(node, ast.Module) else ast.get_source_segment(text, node) or "")


def _defines(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
