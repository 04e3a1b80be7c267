"""Special tokens of prompts and answers: what a tokenizer puts before a text, what of it a client may write itself."""

from __future__ import annotations

from typing import Any, Literal, get_args

# Where a client's text that spells a special token is that token: in raw prompts, which are a template's text by nature
# (as in vLLM), in messages too, or nowhere.
Parsing = Literal["prompts", "all", "none"]
PARSINGS: tuple[str, ...] = get_args(Parsing)


def begin_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text; what it puts behind one, an end token, has no place in a prompt."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(places, 0)])


def begun(ids: list[int], begin: tuple[int, ...]) -> list[int]:
    """A prompt with what stands before it, once."""
    return ids if tuple(ids[: len(begin)]) == begin else [*begin, *ids]


def hidden_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens, which the text of an answer does not show, and how they are written."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    return {token: added.content for token, added in backend.get_added_tokens_decoder().items() if added.special}
