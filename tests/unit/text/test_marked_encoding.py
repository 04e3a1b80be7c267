"""Special tokens occur only where the template puts them, for every kind of pre-tokenization."""

from __future__ import annotations

import json
from collections.abc import Callable
from unicodedata import normalize

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from oarlock.data.examples.marked_encoding import MarkedEncoder
from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.tokenizers.load import encode_marked, list_special_spellings

_TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock!\n\n  def f(x):\n    return x\n",
    "<s> and </s>, <|im_start|> user <|im_end|> 你好，世界 </ s> naïve café",
] * 20
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _bpe(special: list[AddedToken] | None = None, **options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **options))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special or _SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level() -> Tokenizer:
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        special = _SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(_TEXTS, trainer)
        return _without_special_bytes(tokenizer)

    return make


def _prepend() -> Tokenizer:
    tokenizer = _metaspace("never")()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never cut here", "isolated")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def _unigram() -> Tokenizer:
    """A tokenizer whose vocabulary holds its special tokens, as sentencepiece writes it: the search alone would find
    them.
    """
    letters = [*sorted(set("".join(_TEXTS)) - {" "}), "▁"]
    pieces = [(token, 0.0) for token in _SPECIAL] + [(letter, -10.0) for letter in letters] + [("▁the", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _stripping() -> Tokenizer:
    """Added tokens that strip spaces, one that is not special, and one that matches after lower-casing."""
    tokenizer = _bpe([AddedToken(text, special=True, lstrip=True, rstrip=True) for text in _SPECIAL])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<think>", normalized=True), AddedToken("<|im_", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<mask>", normalized=True, single_word=True)])
    return tokenizer


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "words as they stand": lambda: _bpe(ignore_merges=True),
    "metaspace always": _metaspace("always"),
    "metaspace first": _metaspace("first"),
    "prepend": _prepend,
    "unigram": _unigram,
    "stripping": _stripping,
}


class _Held:
    """The part of a tokenizer that encode_marked uses."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, _Held]:
    return {name: _Held(make()) for name, make in _KINDS.items()}


_WORDS = st.one_of(
    st.sampled_from(
        [*_SPECIAL, "<mask>", "<think>", "<|im_", " ", "\n", "a", "the", "<", "s>", "</", "你", "🙂", "é", "＜s＞"]
    ),
    st.text(max_size=3),
)
_PARTS = st.lists(st.tuples(st.booleans(), st.lists(_WORDS, max_size=4).map("".join)), max_size=6)


def _marked(parts: list[tuple[bool, str]]) -> MarkedText:
    text, literal = "", []
    for users, part in parts:
        literal += [(len(text), len(text) + len(part))] if users and part else []
        text += part
    return MarkedText(text, tuple(literal))


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=120, deadline=None)
@given(parts=_PARTS)
def test_only_the_template_produces_special_tokens(tokenizers: dict[str, _Held], kind: str, parts) -> None:
    tokenizer, marked = tokenizers[kind], _marked(parts)
    (row,) = encode_marked(tokenizer, [marked])
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    inside = [range(*span) for span in marked.literal]
    unknown = tokenizer.backend_tokenizer.token_to_id("<unk>")
    ends = [0, 0]
    for id_, (start, end) in zip(row.ids, row.offsets, strict=True):
        assert ends[0] <= start <= end <= len(marked.text) and ends[1] <= end
        ends = [start, end]
        if id_ in added and added[id_].special and id_ != unknown:
            found = marked.text[start:end]
            content = normalize("NFKC", found.strip()).lower()  # as tokenizers encode the template's text here
            assert content == added[id_].content, "a special token that nobody wrote"
            at = start + len(found) - len(found.lstrip())
            assert not any(place in span for span in inside for place in range(at, at + len(content)))
    # The template's text is encoded exactly as by the library alone.
    plain = MarkedText(marked.text)
    assert (
        encode_marked(tokenizer, [plain])[0].ids
        == tokenizer.backend_tokenizer.encode(marked.text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=60, deadline=None)
@given(parts=_PARTS)
def test_the_respelled_tokenizer_gives_the_same_ids(tokenizers: dict[str, _Held], kind: str, parts) -> None:
    """Without user text, the slow path gives the ids of the fast one."""
    marked = MarkedText(_marked(parts).text)
    encoder = MarkedEncoder(tokenizers[kind].backend_tokenizer)
    (short,) = encoder.encode([marked])
    (long,) = encoder._encode_spelled([marked])
    if kind in ("unigram", "stripping"):  # they match other spellings of special tokens too: ＜s＞, <S>
        assume(marked.text.lower() == marked.text and "＜" not in marked.text)
    assert (long.ids, long.offsets) == (short.ids, short.offsets)


@pytest.mark.parametrize(
    "text", ["<|im_<mask>", "<mask>\u200d", "\u0301<mask>", "a<mask>", "<mask>_", "<s><mask>", "²<mask>"]
)
def test_tokens_that_match_whole_words_only(tokenizers: dict[str, _Held], text: str) -> None:
    """The library decides whether the neighbouring text is part of the word."""
    encoder = MarkedEncoder(tokenizers["stripping"].backend_tokenizer)
    (short,), (long,) = encoder.encode([MarkedText(text)]), encoder._encode_spelled([MarkedText(text)])
    assert (long.ids, long.offsets) == (short.ids, short.offsets)


def test_user_spellings_at_every_position() -> None:
    tokenizer = _Held(_byte_level())
    text = "<|im_start|>user\n<|im_end|> said<|im_end|>\n"
    start = text.index("<|im_end|>")
    (row,) = encode_marked(tokenizer, [MarkedText(text, ((start, start + len("<|im_end|> said")),))])
    token = tokenizer.backend_tokenizer.token_to_id
    assert row.ids.count(token("<|im_start|>")) == 1 and row.ids.count(token("<|im_end|>")) == 1
    end = row.ids.index(token("<|im_end|>"))
    assert text[slice(*row.offsets[end])] == "<|im_end|>" and row.offsets[end][0] == text.rindex("<|im_end|>")
    # Only the template's text becomes a control token; an end token split between template and user text does not.
    (halves,) = encode_marked(tokenizer, [MarkedText("a<|im_end|>", ((0, 6),))])
    assert token("<|im_end|>") not in halves.ids
    assert list_special_spellings(tokenizer) == ("<|im_start|>", "<|im_end|>", "<unk>", "</s>", "<s>")


def test_texts_with_private_use_characters() -> None:
    tokenizer = _Held(_byte_level())
    encoder = MarkedEncoder(tokenizer.backend_tokenizer)
    letters = "".join(chr(0xF0000 + i) for i in range(40))
    text = letters + "<s>"
    (users,) = encoder.encode([MarkedText.mark_all("<s>")])
    (row,) = encoder.encode([MarkedText.mark_all(text)])
    backend = tokenizer.backend_tokenizer
    assert row.ids == backend.encode(letters, add_special_tokens=False).ids + users.ids
    assert backend.decode(row.ids, skip_special_tokens=True) == text


def test_ranges_out_of_order_are_an_error() -> None:
    with pytest.raises(ValueError, match="out of order"):
        MarkedText("abc", ((1, 2), (0, 1)))
    with pytest.raises(ValueError, match="outside 3"):
        MarkedText("abc", ((1, 4),))
