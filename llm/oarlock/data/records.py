"""Fine-tuning records as people have them -> conversations, or plain text.

Forms: src/tgt (strings, or lists of equal length for several rounds), Alpaca (instruction, input, output), a question
and an answer under the names people have (question/answer, prompt/completion, query/response), ShareGPT (conversations
of from/value), OpenAI messages (role/content), and plain text (text). Every record knows its file:line, so that a wrong
one can be named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oarlock.data.messages import CHAT_ROLES, Message, MessageError, normalize_message, normalize_tools, text_of
from oarlock.data.train_marks import not_trained

__all__ = ["ROLES", "Conversation", "Message", "PlainText", "detect_form", "parse_record"]

ROLES = {
    **CHAT_ROLES,
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Turns that hold a call and nothing else, as JSON text.
_CALLS = ("function_call", "tool_call")
_SYSTEM = ("system", "system_prompt")
QUESTIONS = ("question", "prompt", "query", "input")
ANSWERS = ("answer", "completion", "response", "output")
_MORE = ("input", "context")


@dataclass(frozen=True)
class Conversation:
    """Messages ({"role": system|user|assistant|tool, "content": text}, ...) that end with an assistant's.

    An Alpaca user message also holds "instruction" and "input", which the alpaca template puts in their places.

    Attributes:
        where: file:line.
        not_trained: positions of assistant messages that are read only.
        unanswered: whether a question without an answer followed and was left out.
        tools: descriptions of functions that the assistant may call.
        variables: more that the template reads (the record's chat_template_kwargs).
    """

    messages: list[Message]
    where: str
    not_trained: frozenset[int] = frozenset()
    unanswered: bool = False
    tools: list[Message] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text that is trained on whole; a long one comes in pieces, the last of which ends it."""

    text: str
    where: str
    ends: bool = True


def parse_record(item: Any, form: str, where: str) -> Conversation | PlainText:
    """A record of a known form.

    Raises:
        ValueError: naming the field and what was expected there.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {type(item).__name__}")
    record = _FORMS[form](item, where)
    if isinstance(record, PlainText):
        if not_trained(item, [{}], [True], "text"):
            raise ValueError("the text is marked as one that is not trained on; leave it out")
        return record
    variables = item.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"field 'chat_template_kwargs' holds {type(variables).__name__}, expected an object")
    tools = item.get("tools") or item.get("functions")
    name = "tools" if item.get("tools") else "functions"
    return replace(record, tools=normalize_tools(tools, name), variables=variables)


def detect_form(item: Any) -> str:
    """The form of a record, by its fields.

    Raises:
        ValueError: listing the fields it has and the forms that are known.
    """
    if isinstance(item, dict):
        for form, fields in _FIELDS.items():
            if all(any(item.get(name) is not None for name in names) for names in fields):
                return form
    have = ", ".join(map(repr, list(item)[:8])) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"unknown form of record ({have}); known are {_known()}")


def _known() -> str:
    return ", ".join(f"{'/'.join(names[0] for names in fields)} ({form})" for form, fields in _FIELDS.items())


def _text(item: dict[str, Any], name: str, required: bool = True, within: str = "") -> str:
    value = item.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if name in item else "is missing"
        raise ValueError(f"field {within + name!r} {got}, expected text")
    return value


def _one_of(item: dict[str, Any], names: Sequence[str]) -> str:
    """Which of the names a record has; the first where it has none.

    Raises:
        ValueError: where it has several, and they differ.
    """
    have = [name for name in names if item.get(name) not in (None, "")]
    if len(have) > 1 and any(item[name] != item[have[0]] for name in have):
        raise ValueError(
            f"fields {' and '.join(map(repr, have))} both look like the {_MEANT[tuple(names)]}; "
            "say which one with --columns, or leave one out"
        )
    return next((name for name in (*have, *(n for n in names if item.get(n) is not None))), names[0])


_MEANT = {
    _SYSTEM: "system text",
    QUESTIONS[:3]: "question",
    QUESTIONS: "question",
    ANSWERS: "answer",
    ANSWERS[::-1]: "answer",
    _MORE: "input",
}


def _answer(text: str) -> str:
    if not text.strip():
        raise ValueError("the answer is empty: there is nothing to train on")
    return text


def _system(item: dict[str, Any]) -> list[Message]:
    text = _text(item, _one_of(item, _SYSTEM), required=False)
    return [{"role": "system", "content": text}] if text else []


def _marked(item: dict[str, Any], messages: list[Message], where: str) -> Conversation:
    """A conversation of a form whose messages have no marks of their own."""
    answers = [message["role"] == "assistant" for message in messages]
    return Conversation(messages, where, frozenset(not_trained(item, [{}] * len(messages), answers, "messages")))


def _from_src_tgt(item: dict[str, Any], where: str) -> Conversation:
    sides = []
    for name in ("src", "tgt"):
        value = item.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            sides.append(value)
        elif isinstance(value, list):
            raise ValueError(f"field {name!r} must be text or a list of texts with at least one")
        else:
            sides.append([_text(item, name)])
    sources, targets = sides
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} rounds in 'src' but {len(targets)} in 'tgt'")
    messages = _system(item)
    for source, target in zip(sources, targets, strict=True):
        messages += [{"role": "user", "content": source}, {"role": "assistant", "content": _answer(target)}]
    return _marked(item, messages, where)


def _from_alpaca(item: dict[str, Any], where: str) -> Conversation:
    return _round(item, where, "instruction", _MORE, ANSWERS[::-1])


def _from_question_answer(item: dict[str, Any], where: str) -> Conversation:
    question = _one_of(item, QUESTIONS[:3])
    if item.get(question) is None:
        question = _one_of(item, QUESTIONS)
    if isinstance(item.get(question), list):
        return _from_prompt_messages(item, question, where)
    more = tuple(name for name in _MORE if name != question)
    return _round(item, where, question, more if len(more) == 1 else _MORE, ANSWERS)


def _round(
    item: dict[str, Any], where: str, question: str, more_names: Sequence[str], answer_names: Sequence[str]
) -> Conversation:
    """A system text, earlier rounds, a question with what it is about, and its answer."""
    instruction = _text(item, question)
    more = _text(item, _one_of(item, more_names) if len(more_names) > 1 else more_names[0], required=False)
    content = f"{instruction}\n{more}" if more else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": more}
    answer = {"role": "assistant", "content": _answer(_text(item, _one_of(item, answer_names)))}
    return _marked(item, [*_system(item), *_history(item), user, answer], where)


def _history(item: dict[str, Any]) -> list[Message]:
    """Earlier rounds of an Alpaca record: [[question, answer], ...]."""
    rounds = item.get("history") or []
    messages: list[Message] = []
    for i, pair in enumerate(rounds if isinstance(rounds, list) else [None]):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"field 'history[{i}]' must be a pair of texts (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": _answer(pair[1])}]
    return messages


def _from_prompt_messages(item: dict[str, Any], prompt: str, where: str) -> Conversation:
    """TRL's conversational prompt and completion: messages to read, then messages to train on."""
    answer = _one_of(item, ANSWERS)
    completion = item.get(answer)
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": _text(item, answer)}]
    whole = _from_chat(
        {"messages": [*item[prompt], *completion], **{k: item[k] for k in _SYSTEM if k in item}}, "messages", where
    )
    read = len(whole.messages) - len(completion)
    earlier = {i for i in range(read) if whole.messages[i]["role"] == "assistant"}
    if whole.unanswered:
        raise ValueError(f"field {answer!r} must end with an assistant's message")
    return replace(whole, not_trained=whole.not_trained | earlier)


def _chat(*list_fields: str) -> Callable[[dict[str, Any], str], Conversation]:
    """ShareGPT and OpenAI messages: they differ in the names of fields and roles, and data mixes those."""

    def parse(item: dict[str, Any], where: str) -> Conversation:
        name = next((name for name in list_fields if item.get(name) is not None), list_fields[0])
        return _from_chat(item, name, where)

    return parse


def _from_chat(item: dict[str, Any], list_field: str, where: str) -> Conversation:
    rows = item.get(list_field)
    if not isinstance(rows, list) or not rows:
        got = f"holds {type(rows).__name__}" if list_field in item else "is missing"
        raise ValueError(f"field {list_field!r} {got}, expected a list of messages with at least one")
    messages: list[Message] = []
    marks: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        message = _message(row, f"{list_field}[{i}]")
        if _is_call(row) and i and _is_call(rows[i - 1]):  # several calls at once
            messages[-1]["tool_calls"] += message["tool_calls"]
            marks[-1] = {**marks[-1], **row}
        else:
            messages.append(message)
            marks.append(row)
    system = _system(item)
    if system and messages[0]["role"] == "system" and system[0]["content"] != messages[0]["content"]:
        raise ValueError(f"field 'system' and {list_field}[0] hold two system texts")
    if system and messages[0]["role"] != "system":
        messages, marks = [*system, *messages], [{}, *marks]
        if any(isinstance(item.get(name), list) for name in ("loss_mask", "train_mask", "train_on_turn")):
            raise ValueError(f"a list of marks does not count the text of 'system'; put it into {list_field!r}")
    answers = [message["role"] == "assistant" for message in messages]
    if not any(answers):
        raise ValueError(f"field {list_field!r} has no assistant message: there is nothing to train on")
    read = frozenset(not_trained(item, marks, answers, list_field))
    last = max(i for i, answer in enumerate(answers) if answer)
    return Conversation(messages[: last + 1], where, read, unanswered=last + 1 < len(messages))


def _is_call(row: dict[str, Any]) -> bool:
    return (row.get("from") or row.get("role")) in _CALLS


def _message(row: Any, within: str) -> Message:
    if not isinstance(row, dict):
        raise ValueError(f"field {within!r} holds {type(row).__name__}, expected an object")
    role_field = "from" if row.get("from") is not None else "role"
    text_field = "value" if row.get("value") is not None else "content"
    role = _text(row, role_field, within=f"{within}.")
    if role not in ROLES and role not in _CALLS:
        known = ", ".join((*ROLES, *_CALLS))
        raise ValueError(f"field '{within}.{role_field}' is {role!r}; known roles are {known}")
    given = {name: value for name, value in row.items() if name not in ("from", "value")}
    if role in _CALLS:
        return normalize_message(
            {**given, "role": "assistant", "content": None, "tool_calls": _calls_in(row, text_field, within)}, within
        )
    if text_field == "value":
        given["content"] = text_of(row["value"], f"{within}.value")
    message = normalize_message({**given, "role": ROLES[role]}, within)
    if message["role"] == "assistant" and not message.get("tool_calls") and not message.get("reasoning_content"):
        _answer(message["content"])
    return message


def _calls_in(row: dict[str, Any], text_field: str, within: str) -> list[Any]:
    """Calls in the text of a turn: {"name": ..., "arguments": ...}, or a list of them."""
    text = row.get(text_field)
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise MessageError(f"field '{within}.{text_field}' is not the JSON of a call: {error}") from error
    return calls if isinstance(calls, list) else [calls]


def _from_text(item: dict[str, Any], where: str) -> PlainText:
    text = _text(item, "text")
    if not text.strip():
        raise ValueError("field 'text' is empty: there is nothing to train on")
    return PlainText(text, where)


_FORMS: dict[str, Callable[[dict[str, Any], str], Conversation | PlainText]] = {
    "src_tgt": _from_src_tgt,
    "alpaca": _from_alpaca,
    "sharegpt": _chat("conversations", "conversation"),
    "messages": _chat("messages"),
    "question_answer": _from_question_answer,
    "text": _from_text,
}
# By which fields, one of each group, a form is told; the first that fits.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "src_tgt": (("src",), ("tgt",)),
    "alpaca": (("instruction",), ANSWERS[::-1]),
    "sharegpt": (("conversations", "conversation"),),
    "messages": (("messages",),),
    "question_answer": (QUESTIONS, ANSWERS),
    "text": (("text",),),
}
# Fields that one of the forms reads.
READ_FIELDS = frozenset(
    (
        *("src", "tgt", "instruction", "history", "conversations", "conversation", "messages", "text", "tools"),
        *("functions", "chat_template_kwargs", "from", "value", "role", "content", "name", "tool_calls"),
        *("tool_call_id", "function_call", *_SYSTEM, *QUESTIONS, *ANSWERS, *_MORE),
    )
)
