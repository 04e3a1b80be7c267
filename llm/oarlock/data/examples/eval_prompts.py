"""--eval_prompts FILE: fixed prompts that the model answers at every evaluation.

Each line of a .jsonl file is a record in a form of oarlock.data.records.conversations, whose last answer is optional.
Each line of any other file is a user message.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.data.examples.labels import EvalPrompt, encode_prompt
from oarlock.data.files.byte_streams import decode_text
from oarlock.data.files.text_readers import check_characters, parse_json_line
from oarlock.data.records.conversations import ANSWERS, QUESTIONS, ROLES, PlainText, detect_form, parse_record
from oarlock.errors import DataError
from oarlock.formats.files import read_bytes

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

    from oarlock.data.templates.chat_template import ChatTemplate

_MAX_BYTES = 1 << 24  # answering more would take hours
_UNKNOWN = "?"  # placeholder for a missing answer, because a conversation must end with one


def load_eval_prompts(
    path: str | Path, tokenizer: PretrainedTokenizerBase, template: ChatTemplate, src_length: int
) -> list[EvalPrompt]:
    """Load the prompts of a file, each with its file:line and its reference answer, if it has one.

    Raises:
        DataError: with file:line and the reason.
    """
    path = Path(path)
    try:
        lines = read_bytes(path, limit=_MAX_BYTES, what="file of prompts", error=DataError).split(b"\n")
    except DataError as error:
        raise DataError(f"--eval_prompts {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".jsonl":
                item = parse_json_line(line)
            else:
                item = decode_text(line).removeprefix("\ufeff").rstrip("\r")
            check_characters(item)
            if isinstance(item, dict) and isinstance(item.get("text"), str):
                item = item["text"]
            if isinstance(item, str):
                item = {"messages": [{"role": "user", "content": item}]}
            where, filled = f"{path.name}:{number}", _add_missing_answer(item)
            conversation = parse_record(filled, detect_form(filled), where)
            assert not isinstance(conversation, PlainText)  # texts became user messages above
            prompt = encode_prompt(conversation, tokenizer, template, src_length)
            if not prompt.input_ids:
                raise ValueError("the prompt is empty")
            prompts.append(EvalPrompt(prompt.input_ids, prompt.text, prompt.answer if filled is item else "", where))
        except (ValueError, DataError) as error:
            raise DataError(f"--eval_prompts {path}:{number}: {error}") from error
    if not prompts:
        raise DataError(f"--eval_prompts {path}: no prompts in this file")
    return prompts


def _add_missing_answer(item: Any) -> Any:
    """Return the record with a placeholder for its last answer if that is missing, else the record itself."""
    if not isinstance(item, dict):
        return item
    for field in ("messages", "conversations", "conversation"):
        messages = item.get(field)
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            role = str(messages[-1].get("role") or messages[-1].get("from"))
            if ROLES.get(role, "assistant") == "assistant":
                return item
            return item | {field: [*messages, {"role": "assistant", "content": _UNKNOWN}]}
    questions, answers = item.get("src"), item.get("tgt")
    if questions is not None and not isinstance(questions, list) and not answers:
        return item | {"tgt": _UNKNOWN}
    if isinstance(questions, list) and isinstance(answers or [], list) and len(answers or []) < len(questions):
        return item | {"tgt": [*(answers or []), _UNKNOWN]}
    if questions is None and not any(item.get(name) for name in ANSWERS):
        if item.get("instruction") is not None:
            return item | {"output": _UNKNOWN}
        if any(item.get(name) is not None for name in QUESTIONS):
            return item | {"answer": _UNKNOWN}
    return item
