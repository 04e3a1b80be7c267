"""The Jinja environment of chat templates: that of transformers, with limits.

Its features follow `transformers.utils.chat_template_utils` (version 5): white space rules, the `generation` tag, break
and continue, `tojson`, `strftime_now`, `raise_exception`, and namespaces without underscores.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
from jinja2 import Template, TemplateError, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from oarlock.data.templates.jinja_limits import (
    Steps,
    charge_value,
    check_call,
    check_filter,
    check_operation,
    format_size,
    start_budget,
)


class Refused(TemplateError):
    """A template called `raise_exception`."""


# The number of characters rendered so far, and the [start, end) of generation blocks.
_TRACKED: ContextVar[tuple[list[int], list[tuple[int, int]]] | None] = ContextVar("generation_blocks", default=None)
# Converts placeholders to user text and back around `tojson`; see oarlock.data.templates.special_token_text.
Respell = tuple[Callable[[Any], Any], Callable[[str], str]]
_RESPELL: ContextVar[Respell | None] = ContextVar("respell", default=None)


class _GenerationBlocks(jinja2.ext.Extension):
    """The tag {% generation %} ... {% endgeneration %}, which encloses what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - declared this way by Jinja

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _note(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        if (tracked := _TRACKED.get()) is not None:
            (done,), places = tracked
            places.append((done, done + len(text)))
        return text


class _CountingTransformer(NodeTransformer):
    """Routes loops, concatenations and literal text through the functions that count them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_steps", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_concat", [], [], None, None).set_lineno(node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data).set_lineno(node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that counts every loop, call and text."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _CountingTransformer().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **named: Any) -> Any:
        next(iter(Steps((obj,))))
        bound = getattr(obj, "__wrapped__", obj)
        owner = getattr(bound, "__self__", None)
        if isinstance(owner, str):
            args = check_call(owner, bound.__name__, args, named)
        return charge_value(super().call(context, obj, *args, **named))


class _TemplateDict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **named)


class _TemplateNamespace(Namespace):
    """A namespace that refuses names with a leading underscore."""

    def __init__(*args: Any, **named: Any) -> None:  # positional, because any name may be given, even "self"
        self, args = args[0], args[1:]
        given = dict(*args, **named)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't have {name!r}, which starts with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    back, again = _RESPELL.get() or (None, None)
    value = back(value) if back else value
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return again(text) if again else text


def _raise_exception(message: str) -> None:
    raise Refused(message)


@pass_context
def _finalize(context: Any, value: Any) -> str:
    """Convert an output value (Jinja's `finalize`). It takes the context so that constants are not folded."""
    if not isinstance(value, str):
        format_size(value)
    return charge_value(str(value))


@pass_context
def _concat(context: Any, parts: list[Any]) -> str:
    format_size(parts)
    return charge_value("".join(map(str, parts)))


@pass_context
def _steps(context: Any, items: Any) -> Steps:
    return Steps(items)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes before the value

    @functools.wraps(function)
    def bounded(*args: Any, **named: Any) -> Any:
        if len(args) > first:
            value = check_filter(name, args[first], args[first + 1 :], named)
            args = (*args[:first], value, *args[first + 1 :])
        return charge_value(function(*args, **named))

    return bounded


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded_filter(name, f) for name, f in environment.filters.items()}
    environment.filters |= {"_steps": _steps, "_concat": _concat}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    del environment.globals["lipsum"]  # random words
    return environment


@lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """Compile a template.

    Raises:
        TemplateError: for invalid Jinja, with the line.
    """
    try:
        return _make_environment().from_string(source)
    except SyntaxError as error:  # in the Python code that Jinja generates, e.g. a break outside a loop
        raise TemplateSyntaxError(error.msg, 1) from error


def run_template(
    source: str, variables: Mapping[str, Any], given: int, respell: Respell | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Render a template. Returns its text and the [start, end) of its generation blocks.

    Args:
        given: number of characters of the messages among the variables. The limits grow with it.
        respell: two functions around `tojson`: placeholders to user text, and back.

    Raises:
        TemplateError, OverBudget, or any error of the template itself.
    """
    template = compile_template(source)
    done: list[int] = [0]
    places: list[tuple[int, int]] = []
    parts: list[str] = []
    tokens = _TRACKED.set((done, places)), _RESPELL.set(respell)
    try:
        with start_budget(given) as budget:
            for part in template.generate(**variables):
                parts.append(part)
                done[0] += len(part)
                budget.allow(done[0])
    finally:
        _TRACKED.reset(tokens[0])
        _RESPELL.reset(tokens[1])
    return "".join(parts), places


def find_failing_line(error: BaseException) -> int | None:
    """Return the line of the template that raised an error."""
    if isinstance(line := getattr(error, "lineno", None), int):
        return line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None
