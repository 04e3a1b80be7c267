"""Ask a saved model a question, in the words it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from oarlock.data.tokens import tokenize
from oarlock.environment import say_once, set_paddlenlp_log_level
from oarlock.errors import ModelError
from oarlock.models.build import positions_of
from oarlock.models.generate import generate_ids
from oarlock.models.tuned import open_tuned
from oarlock.models.window import check_window


def ask_model(
    name_or_path: str, questions: Sequence[str], max_new_tokens: int, base: str | None = None
) -> Iterator[tuple[str, str]]:
    """(question, greedy answer) of each.

    Raises:
        ModelError: when the model can't be loaded, its context has no room for an answer, or its sliding window is
            shorter than question and answer.
    """
    set_paddlenlp_log_level("error")
    tuned = open_tuned(name_or_path, base)
    for question in questions:
        chat = tuned.template.render_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        (prompt,) = tokenize(tuned.tokenizer, [chat.text])
        place = str(tuned.folder / "config.json")
        check_window(tuned.model.config, len(prompt.ids) + max_new_tokens, place, "question and answer may take")
        longest = _longest_answer(tuned.model.config, len(prompt.ids), max_new_tokens)
        (ids,) = generate_ids(tuned.model, tuned.tokenizer, [prompt.ids], longest, tuned.ends)
        yield question, tuned.template.answer_in(tuned.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _longest_answer(config: Any, prompt: int, asked: int) -> int:
    """New tokens that fit the model's context."""
    name, positions = positions_of(config)
    room = positions - prompt
    if not positions or asked <= room:
        return asked
    if room < 1:
        raise ModelError(
            f"the question takes {prompt:,} tokens, and the model was made for {positions:,} ({name}) with its answer"
        )
    say_once(f"--max-new-tokens {asked:,}: the model was made for {positions:,} tokens ({name}); {room:,} are left")
    return room
