"""Parsing the forms of fine-tuning records to conversations or plain text.

Forms: src/tgt (strings, or lists of equal length for several rounds), Alpaca (instruction, input, output), question and
answer under their usual names (question/answer, prompt/completion, query/response), ShareGPT (conversations of
from/value), OpenAI messages (role/content), and plain text (text). Each record has its file:line for messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from oarlock.data.records.fields import (
    ANSWERS,
    MORE,
    QUESTIONS,
    SYSTEM,
    Conversation,
    PlainText,
    choose_field,
    make_system_messages,
    read_text_field,
    require_answer,
)
from oarlock.data.records.message_records import ROLES, parse_chat
from oarlock.data.records.messages import Message, normalize_tools
from oarlock.data.records.training_marks import find_untrained

__all__ = [
    "ANSWERS",
    "QUESTIONS",
    "READ_FIELDS",
    "ROLES",
    "Conversation",
    "Message",
    "PlainText",
    "detect_form",
    "parse_record",
]


def parse_record(item: Any, form: str, where: str) -> Conversation | PlainText:
    """Parse a record of a known form.

    Raises:
        ValueError: with the invalid field and what was expected.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {type(item).__name__}")
    if form != "text":
        for name in ("label", "kto_tag"):
            if item.get(name) is False:
                raise ValueError(f"field {name!r} is false: KTO marks this answer as rejected; remove the record")
    record = _FORMS[form](item, where)
    if isinstance(record, PlainText):
        if find_untrained(item, [{}], [True], "text"):
            raise ValueError("the text is marked as not trained on; remove the record")
        return record
    variables = item.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"field 'chat_template_kwargs' holds {type(variables).__name__}, expected an object")
    tools, functions = (normalize_tools(item.get(name), name) for name in ("tools", "functions"))
    if tools and functions and tools != functions:
        raise ValueError("fields 'tools' and 'functions' describe different functions; remove one")
    return replace(record, tools=tools or functions, variables=variables)


def detect_form(item: Any) -> str:
    """Detect the form of a record from its fields.

    Raises:
        ValueError: for an unknown form, with the fields of the record and the supported forms.
    """
    advice = ""
    if isinstance(item, dict):
        for form, fields in _FIELDS.items():
            if all(any(item.get(name) is not None for name in names) for names in fields):
                return form
        inside = next((k for k, v in item.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
        if "chosen" in item or "rejected" in item:
            advice = "preference data (chosen, rejected) are not supported; "
        elif "input_ids" in item:
            advice = "tokenized data (input_ids) are not supported, use the text; "
        elif inside:
            advice = f"if the records are in the list {inside!r}, the file must contain only this list; "
    have = ", ".join(map(repr, list(item)[:8])) if isinstance(item, dict) else type(item).__name__
    known = ", ".join(f"{'/'.join(names[0] for names in fields)} ({form})" for form, fields in _FIELDS.items())
    raise ValueError(f"unknown form of record ({have}); {advice}known are {known}")


def find_other_forms(item: Any, form: str) -> list[str]:
    """Return the non-empty fields of a record that only other forms than its own use, and that are ignored."""
    if not isinstance(item, dict) or form not in _READ:
        return []
    read = _READ[form]
    if form in ("sharegpt", "messages"):
        read = {*read, next((name for names in _FIELDS[form] for name in names if item.get(name) is not None), "")}
    return [name for name in _ANY_FORM if name not in read and item.get(name) not in (None, "", [])]


def _add_marks(item: dict[str, Any], messages: list[Message], where: str) -> Conversation:
    """Return the conversation of a record whose messages have no training marks of their own."""
    answers = [message["role"] == "assistant" for message in messages]
    return Conversation(messages, where, frozenset(find_untrained(item, [{}] * len(messages), answers, "messages")))


def _parse_src_tgt(item: dict[str, Any], where: str) -> Conversation:
    sides = []
    for name in ("src", "tgt"):
        value = item.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            sides.append(value)
        elif isinstance(value, list):
            raise ValueError(f"field {name!r} must be a text or a non-empty list of texts")
        else:
            sides.append([read_text_field(item, name)])
    sources, targets = sides
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} rounds in 'src' but {len(targets)} in 'tgt'")
    messages = make_system_messages(item)
    for source, target in zip(sources, targets, strict=True):
        messages += [{"role": "user", "content": source}, {"role": "assistant", "content": require_answer(target)}]
    return _add_marks(item, messages, where)


def _parse_question_answer(item: dict[str, Any], where: str) -> Conversation:
    question = choose_field(item, QUESTIONS[:3])
    if item.get(question) is None:
        question = choose_field(item, QUESTIONS)
    if isinstance(item.get(question), list):
        # TRL's conversational prompt and completion: only the messages of the completion are trained on.
        answer = choose_field(item, ANSWERS)
        completion = item.get(answer)
        if not isinstance(completion, list):
            completion = [{"role": "assistant", "content": read_text_field(item, answer)}]
        whole = parse_chat(
            {"messages": [*item[question], *completion], **{k: item[k] for k in SYSTEM if k in item}}, "messages", where
        )
        read = len(whole.messages) - len(completion)
        earlier = {i for i in range(read) if whole.messages[i]["role"] == "assistant"}
        if whole.unanswered:
            raise ValueError(f"field {answer!r} must end with an assistant message")
        return replace(whole, not_trained=whole.not_trained | earlier)
    more = tuple(name for name in MORE if name != question)
    return _parse_round(item, where, question, more if len(more) == 1 else MORE, ANSWERS)


def _parse_round(
    item: dict[str, Any], where: str, question: str, more_names: Sequence[str], answer_names: Sequence[str]
) -> Conversation:
    """Parse a system prompt, earlier rounds ([[question, answer], ...]), a question with its input, and its answer."""
    instruction = read_text_field(item, question)
    more = read_text_field(
        item, choose_field(item, more_names) if len(more_names) > 1 else more_names[0], required=False
    )
    content = f"{instruction}\n{more}" if more else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": more}
    answer = {"role": "assistant", "content": require_answer(read_text_field(item, choose_field(item, answer_names)))}
    messages, rounds = make_system_messages(item), item.get("history") or []
    for i, pair in enumerate(rounds if isinstance(rounds, list) else [None]):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"field 'history[{i}]' must be a pair of texts (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": require_answer(pair[1])}]
    return _add_marks(item, [*messages, user, answer], where)


def _make_chat_parser(*list_fields: str) -> Callable[[dict[str, Any], str], Conversation]:
    """Return a parser for ShareGPT and OpenAI messages, whose field and role names may be mixed."""

    def parse(item: dict[str, Any], where: str) -> Conversation:
        name = next((name for name in list_fields if item.get(name) is not None), list_fields[0])
        return parse_chat(item, name, where)

    return parse


def _parse_text(item: dict[str, Any], where: str) -> PlainText:
    text = read_text_field(item, "text")
    if not text.strip():
        raise ValueError("field 'text' is empty: there is nothing to train on")
    return PlainText(text, where)


_FORMS: dict[str, Callable[[dict[str, Any], str], Conversation | PlainText]] = {
    "src_tgt": _parse_src_tgt,
    "alpaca": lambda item, where: _parse_round(item, where, "instruction", MORE, ANSWERS[::-1]),
    "sharegpt": _make_chat_parser("conversations", "conversation"),
    "messages": _make_chat_parser("messages"),
    "question_answer": _parse_question_answer,
    "text": _parse_text,
}
# The form of a record is the first with a field of each group.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "src_tgt": (("src",), ("tgt",)),
    "alpaca": (("instruction",), ANSWERS[::-1]),
    "sharegpt": (("conversations", "conversation"),),
    "messages": (("messages",),),
    "question_answer": (QUESTIONS, ANSWERS),
    "text": (("text",),),
}
_ROUNDS = {"history", *SYSTEM}
# The fields that each form reads, of those that any form has. `prompt` often repeats the first of the messages.
_READ: dict[str, set[str]] = {
    "src_tgt": {"src", "tgt", *SYSTEM},
    "alpaca": {"instruction", *MORE, *ANSWERS, *_ROUNDS},
    "question_answer": {*QUESTIONS, *MORE, *ANSWERS, *_ROUNDS},
    "sharegpt": {"prompt", *SYSTEM},
    "messages": {"prompt", *SYSTEM},
    "text": {"text"},
}
_ANY_FORM = (
    *("src", "tgt", "instruction", "history", "conversations", "conversation", "messages", "text"),
    *SYSTEM, *QUESTIONS, *dict.fromkeys((*ANSWERS, "context")),
)  # fmt: skip
# All fields that some form reads.
READ_FIELDS = frozenset(
    (
        *("src", "tgt", "instruction", "history", "conversations", "conversation", "messages", "text", "tools"),
        *("functions", "chat_template_kwargs", "from", "value", "role", "content", "name", "tool_calls"),
        *("tool_call_id", "function_call", *SYSTEM, *QUESTIONS, *ANSWERS, *MORE),
    )
)
