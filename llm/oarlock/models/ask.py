"""Ask a saved model a question, in the words it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from oarlock.data.tokens import tokenize
from oarlock.environment import set_paddlenlp_log_level
from oarlock.models.generate import generate_ids
from oarlock.models.tuned import open_tuned
from oarlock.models.window import check_window


def ask_model(
    name_or_path: str, questions: Sequence[str], max_new_tokens: int, base: str | None = None
) -> Iterator[tuple[str, str]]:
    """(question, greedy answer) of each.

    Raises:
        ModelError: when the model can't be loaded, or its sliding window is shorter than question and answer.
    """
    set_paddlenlp_log_level("error")
    tuned = open_tuned(name_or_path, base)
    for question in questions:
        chat = tuned.template.render_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        (prompt,) = tokenize(tuned.tokenizer, [chat.text])
        place = str(tuned.folder / "config.json")
        check_window(tuned.model.config, len(prompt.ids) + max_new_tokens, place, "question and answer may take")
        (ids,) = generate_ids(tuned.model, tuned.tokenizer, [prompt.ids], max_new_tokens, tuned.ends)
        yield question, tuned.template.answer_in(tuned.tokenizer.decode(ids, skip_special_tokens=True)).strip()
