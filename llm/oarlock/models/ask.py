"""Ask a saved model a question, in the words it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from oarlock.data.files.text_readers import check_characters
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.environment.paddle_import import set_paddlenlp_log_level
from oarlock.errors import ConfigError, ModelError
from oarlock.model_config.sliding_window import check_window
from oarlock.models.build import positions_of
from oarlock.models.generate import generate_ids
from oarlock.models.load_finetuned import open_tuned

DEFAULT_TOKENS = 64  # of an answer


def _longest(config: Any, question: int, wanted: int | None) -> int:
    """Tokens of an answer to a question of so many."""
    name, positions = positions_of(config)
    room = positions - question if positions else wanted or DEFAULT_TOKENS
    if room < 1:
        raise ModelError(
            f"the question has {question:,} tokens, and the model was made for {positions:,} ({name}), its answer "
            "included: ask a shorter one"
        )
    if wanted is not None and wanted > room:
        raise ConfigError(
            f"--max-new-tokens {wanted:,}: the model's context leaves {room:,} after the question ({name} "
            f"{positions:,})"
        )
    return wanted or min(DEFAULT_TOKENS, room)


def ask_model(
    name_or_path: str, questions: Sequence[str], max_new_tokens: int | None = None, base: str | None = None
) -> Iterator[tuple[str, str]]:
    """(question, greedy answer) of each.

    Args:
        max_new_tokens: longest answer; None: DEFAULT_TOKENS, or what the model's context leaves.

    Raises:
        ConfigError: for more tokens than the context leaves.
        ModelError: when the model can't be loaded, or question and answer are longer than its context or its window.
    """
    set_paddlenlp_log_level("error")
    tuned = open_tuned(name_or_path, base)
    for question in questions:
        try:
            check_characters(question)
        except ValueError as error:  # a command line in another encoding
            raise ConfigError(f"the question {question!r} is not valid text: it {error}") from error
        chat = tuned.template.render_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        (prompt,) = tokenize(tuned.tokenizer, [chat.text])
        place = str(tuned.folder / "config.json")
        longest = _longest(tuned.model.config, len(prompt.ids), max_new_tokens)
        check_window(tuned.model.config, len(prompt.ids) + longest, place, "question and answer may take")
        (ids,) = generate_ids(tuned.model, tuned.tokenizer, [prompt.ids], longest, tuned.ends)
        yield question, tuned.template.answer_in(tuned.tokenizer.decode(ids, skip_special_tokens=True)).strip()
