"""Chat templates from untrusted models: compiled and rendered within the limits, or refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from harness import Harness

from oarlock.data.templates.builtin import BUILT_IN
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.data.templates.template_files import read_template
from oarlock.errors import OarlockError

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <s>2 + 2</s>?"},
    {"role": "assistant", "content": "4", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None]}}}]},
    {"role": "tool", "content": "4"},
]
_CONVERSATIONS = (_MESSAGES[1:2], [_MESSAGES[1], {"role": "assistant", "content": "4"}], _MESSAGES)
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def target(data: bytes, folder: Path) -> None:
    path = folder / "t.jinja"
    path.write_bytes(data)
    template = ChatTemplate("t", read_template(path), _SPECIAL, ("<s>", "</s>"), False, {}, None)
    refusals = []
    for run in (template.check, *(partial(_render, template, messages) for messages in _CONVERSATIONS)):
        try:
            run()
        except OarlockError as error:  # a fault in one conversation does not affect the others
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _render(template: ChatTemplate, messages: list[dict]) -> None:
    template.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant").encode()


def seeds() -> list[bytes]:
    folder = Path(__file__).resolve().parents[1] / "chat_templates"
    own = [
        "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(5) }}{{ messages | length }}",
        "{% set ns = namespace(i=0) %}{% for i in range(3) %}{% set ns.i = ns.i + i %}{% endfor %}{{ ns.i }}",
        "{{ messages | map(attribute='content') | join(', ') }}{{ messages[0] | tojson(indent=1) }}",
        "{{ raise_exception('no') if messages[0].role != 'user' }}{{ 'a'.replace('a', 'b') * 3 }}{{ strftime_now('%Y') }}",
        "{{ '%s %5d' % ('a', 3) }}{{ '{:>9}'.format('x') }}{{ [1, 2, 3] | batch(2) | list }}",
    ]
    files = sorted(folder.glob("*.jinja"))[:12] if folder.is_dir() else []
    return [
        *(text.encode() for text in (*BUILT_IN.values(), *own)),
        *(path.read_bytes() for path in files if path.stat().st_size < 16_000),
    ]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"{{ ",
        b" }}",
        b"{% for x in range(10**9) %}",
        b"{% endfor %}",
        b"{% if ",
        b"{% endif %}",
        b"* 10**9",
        b"** 10**9",
        b"|",
        b"|tojson",
        b"|center(10**9)",
        b"|list",
        b"|sort",
        b"|groupby('role')",
        b".__class__",
        b"|attr('__init__')",
        b".format(",
        b".join(",
        b"range(",
        b"namespace(",
        b"{% macro m() %}",
        b"{% endmacro %}",
        b"{% call ",
        b"{% include 'x' %}",
        b"{% import 'x' as y %}",
        b"{% generation %}",
        b"{#",
        b"-%}",
        b"loop.index",
        b"cycler(",
        b"lipsum(",
        b"joiner(",
        b"(" * 300,
        b"[" * 300,
        b"not " * 300,
        b"\xff",
    ],
    seconds=15,  # a rendering has four, and there are up to three
)
