"""Finding what a chat template omits from a conversation.

A template may omit a system message, a tool's result or a tool call next to content, or render an unknown role as
another one. The model would then see another conversation than the one given. What is omitted depends on roles and
fields, not on the content. So one rendering with a stand-in for each text decides for all conversations of the same
shape.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from oarlock.data.records.messages import REASONING, Message
from oarlock.data.templates.rendering import PreparedChat, TemplateStopped
from oarlock.errors import DataError

_MAX_CACHED = 4096  # shapes
_found: OrderedDict[Any, str | None] = OrderedDict()
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "ProbeTool",
        "description": "ProbeText",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "ProbeText"}}},
    },
}


def check_rendered(chat: PreparedChat, add_generation_prompt: bool = False) -> None:
    """Check that a template renders all messages, tool calls, reasoning and tools.

    Raises:
        DataError: with what it omits.
    """
    key = (*_describe_shape(chat), add_generation_prompt)
    problem = _found.get(key, "")
    if problem == "":
        problem = _found[key] = _find_left_out(chat, add_generation_prompt)
        if len(_found) > _MAX_CACHED:
            _found.popitem(last=False)
    if problem == _UNKNOWN:
        problem = _find_missing_content(chat, add_generation_prompt)
    if problem:
        raise DataError(f"chat template {chat.template.name} {problem}")


_UNKNOWN = "?"  # the template fails on the stand-ins, so the content itself is searched for


def _describe_shape(chat: PreparedChat) -> tuple[Any, ...]:
    """Return what rendering depends on besides the content."""
    ids: dict[str, int] = {}
    rows = []
    for message in chat.messages:
        calls = message.get("tool_calls") or ()
        numbers = [ids.setdefault(str(call.get("id")), len(ids)) for call in calls]
        rows.append(
            (
                message["role"],
                tuple(sorted(name for name, value in message.items() if value not in ("", [], {}))),
                tuple(
                    (number, bool(call["function"]["arguments"])) for number, call in zip(numbers, calls, strict=True)
                ),
                ids.get(str(message.get("tool_call_id"))),
            )
        )
    variables = json.dumps(chat.variables, sort_keys=True, default=str)
    return chat.source, tuple(chat.template.special_tokens.items()), tuple(rows), bool(chat.tools), variables


def probe_message(message: Message, number: int, ids: dict[str, str]) -> Message:
    """Replace each text of a message by a stand-in. Distinct call ids stay distinct."""
    probe = dict(message)
    for kind, name in enumerate(("content", *REASONING, "instruction", "input")):
        if isinstance(message.get(name), str) and message[name].strip():
            probe[name] = f"Probe{number:05d}{'R' if name in REASONING else 'CXXXIM'[kind]}x"
    if message.get("tool_calls"):
        probe["tool_calls"] = []
        for k, call in enumerate(message["tool_calls"]):
            arguments = {"probe": f"Probe{number:05d}A{k:02d}x"} if call["function"]["arguments"] else {}
            function = {**call["function"], "name": f"Probe{number:05d}N{k:02d}x", "arguments": arguments}
            given = {"id": ids.setdefault(str(call["id"]), f"call{len(ids):05d}")} if "id" in call else {}
            probe["tool_calls"].append({**call, **given, "function": function})
    if "tool_call_id" in message:
        probe["tool_call_id"] = ids.setdefault(str(message["tool_call_id"]), f"call{len(ids):05d}")
    return probe


def list_stand_ins(probe: Message) -> list[str]:
    """Return the stand-ins in a message of probe_message()."""
    words = [probe[name] for name in ("content", REASONING[0]) if str(probe.get(name, "")).startswith("Probe")]
    for call in probe.get("tool_calls") or ():
        words += [call["function"]["name"], *call["function"]["arguments"].values()]
    return words


def _find_left_out(chat: PreparedChat, add_generation_prompt: bool) -> str | None:
    ids: dict[str, str] = {}
    probes = [probe_message(message, i, ids) for i, message in enumerate(chat.messages)]
    asked = _Probed(chat, [_PROBE_TOOL] if chat.tools else None)
    try:
        text = asked.run(probes, add_generation_prompt)
    except TemplateStopped:
        raise
    except DataError:
        # Many templates without tool calls fail on one without content. Report the missing calls, not the failure.
        worded = [{"content": "", **probe} for probe in probes]
        text = asked.try_run(worded, add_generation_prompt) if worded != probes else ""
        if not text:
            return _UNKNOWN
        return _find_all_left_out(chat, worded, text, asked, add_generation_prompt) or _UNKNOWN
    return _find_all_left_out(chat, probes, text, asked, add_generation_prompt)


def _find_all_left_out(
    chat: PreparedChat, probes: list[Message], text: str, asked: _Probed, add_generation_prompt: bool
) -> str | None:
    if chat.tools and "ProbeTool" not in text:
        return "does not render 'tools'"
    for i, probe in enumerate(probes):
        parts = [probe[name] for name in ("instruction", "input") if probe.get(name)]
        content = probe.get("content", "").strip()
        if content and content not in text and not (parts and all(part in text for part in parts)):
            calls = " next to its tool calls" if probe.get("tool_calls") else ""
            return f"leaves out messages[{i}] (role {probe['role']}){calls}"
        for call in probe.get("tool_calls") or ():
            function = call["function"]
            if not all(word in text for word in (function["name"], *function["arguments"].values())):
                return f"does not render messages[{i}].tool_calls"
        reasoning = probe.get(REASONING[0], "").strip()
        # Reasoning of earlier rounds may be omitted by design, but not that of the last one.
        if reasoning and reasoning not in text and reasoning not in asked.try_run(probes[: i + 1]):
            return f"does not render messages[{i}].{REASONING[0]}"
    for i, probe in enumerate(probes):
        if probe["role"] == "tool":
            as_user = [*probes[:i], {**probe, "role": "user"}, *probes[i + 1 :]]
            if asked.try_run(as_user, add_generation_prompt) == text:
                return f"renders messages[{i}] (role tool) as a user message"
    return None


class _Probed:
    """The template of a chat, applied to stand-ins."""

    def __init__(self, chat: PreparedChat, tools: list[Any] | None) -> None:
        self._chat, self._tools = chat, tools

    def run(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._chat.run(messages, add_generation_prompt, tools=self._tools)[0]

    def try_run(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.run(messages, add_generation_prompt)
        except DataError:
            return ""


def _find_missing_content(chat: PreparedChat, add_generation_prompt: bool) -> str | None:
    """Find omissions by the content itself, ignoring white space."""
    text = "".join(chat.run(add_generation_prompt=add_generation_prompt)[0].split())
    for i, message in enumerate(chat.messages):
        content = "".join(message.get("content", "").split())
        if content and content not in text and not message.get("instruction"):
            return f"leaves out messages[{i}] (role {message['role']})"
        if any(call["function"]["name"] not in text for call in message.get("tool_calls") or ()):
            return f"does not render messages[{i}].tool_calls"
    return None
