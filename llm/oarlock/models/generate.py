"""Greedy generation: for a batch of prompts of different lengths, and for questions to a saved model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import paddle

from oarlock.data.files.text_readers import check_characters
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.environment.paddle_import import set_paddlenlp_log_level
from oarlock.errors import ConfigError, ModelError
from oarlock.families.architecture import Attention
from oarlock.model_config.generation_config import read_token_ids
from oarlock.models.build import find_position_limit
from oarlock.models.load_finetuned import load_finetuned

DEFAULT_TOKENS = 64  # most tokens of an answer

NextIds = Callable[[list[list[int]]], list[int]]


def generate_ids(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int] | None = None
) -> list[list[int]]:
    """Generate new token ids of each row, without the token that ends it.

    Shorter rows are padded on the left and masked, and positions start where the text does, so an answer is the one
    that the row would get alone.

    Args:
        rows: prompt ids of each, [tokens].
        ends: tokens that end an answer; None for the tokenizer's.

    Raises:
        ModelError: for ids beyond the model's vocabulary.
    """
    if len(rows) > 1 and _has_window_and_prefix(model):  # padding between prefix and text would count in the window
        return [generate_ids(model, tokenizer, [row], max_new_tokens, ends)[0] for row in rows]
    ends = read_token_ids(tokenizer.eos_token_id, "the tokenizer") if ends is None else tuple(ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    longest = max(len(row) for row in rows)
    input_ids = np.full([len(rows), longest], pad, np.int64)
    mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    largest, size = int(input_ids.max()), int(model.config.vocab_size)
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest:,}, and the model has {size:,} rows (vocab_size of its config.json): "
            "they do not match"
        )
    with paddle.no_grad():
        new_ids, _ = model.generate(
            input_ids=paddle.to_tensor(input_ids),
            attention_mask=paddle.to_tensor(mask),
            position_ids=paddle.to_tensor(positions),
            max_new_tokens=max_new_tokens,
            decode_strategy="greedy_search",
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            bos_token_id=tokenizer.bos_token_id,
            use_cache=True,
        )
    found = new_ids.numpy().tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in found]


def _has_window_and_prefix(model: Any) -> bool:
    spec = getattr(model, "architecture", None)  # None for PaddleNLP's models
    if spec is None or "prefix_encoder" not in model._sub_layers:
        return False
    attentions = (block.attention for block in spec.blocks)
    return any(isinstance(attention, Attention) and attention.window for attention in attentions)


def generate_without_cache(
    next_ids: NextIds,
    rows: Sequence[Sequence[int]],
    ends: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Generate with a full forward pass for every new token.

    Args:
        next_ids: returns the most likely next token of each row.
        ends: tokens that end an answer.
    """
    answers: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    for _ in range(max_new_tokens):
        if not going:
            break
        tokens = next_ids([[*rows[i], *answers[i]] for i in going])
        for i, token in zip(list(going), tokens, strict=True):
            if token in ends:
                going.remove(i)
            else:
                answers[i].append(token)
    return answers


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, list[int]]:
    """Pad rows to int64 [rows, longest], and return their lengths. No causal model lets a token attend to padding after
    it.
    """
    lengths = [len(row) for row in rows]
    ids = np.full([len(rows), max(lengths)], pad, np.int64)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = row
    return ids, lengths


def select_last_logits(scores: paddle.Tensor, lengths: Sequence[int]) -> paddle.Tensor:
    """The logits after each row's last token, [rows, vocabulary]."""
    return paddle.gather_nd(scores, paddle.to_tensor([[i, length - 1] for i, length in enumerate(lengths)]))


def _find_answer_limit(config: Any, question: int, wanted: int | None) -> int:
    """The most tokens of an answer to a question of this length."""
    name, positions = find_position_limit(config)
    room = positions - question if positions else wanted or DEFAULT_TOKENS
    if room < 1:
        raise ModelError(
            f"the question has {question:,} tokens, and the model supports {positions:,} ({name}), "
            "including the answer: ask a shorter one"
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
    """Yield each question with its greedy answer.

    Args:
        max_new_tokens: longest answer; None for DEFAULT_TOKENS, or what the model's context leaves.

    Raises:
        ConfigError: for more tokens than the context leaves.
        ModelError: when the model can't be loaded, or question and answer exceed its context.
    """
    set_paddlenlp_log_level("error")
    tuned = load_finetuned(name_or_path, base)
    for question in questions:
        try:
            check_characters(question)
        except ValueError as error:  # a command line in another encoding
            raise ConfigError(f"the question {question!r} is not valid text: it {error}") from error
        chat = tuned.template.render_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        (prompt,) = tokenize(tuned.tokenizer, [chat.text])
        longest = _find_answer_limit(tuned.model.config, len(prompt.ids), max_new_tokens)
        (ids,) = generate_ids(tuned.model, tuned.tokenizer, [prompt.ids], longest, tuned.ends)
        yield question, tuned.template.extract_answer(tuned.tokenizer.decode(ids, skip_special_tokens=True)).strip()
