"""Long texts are tokenized in pieces with the ids of the full text, for every kind of tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from oarlock.data.corpus import text_chunks
from oarlock.data.corpus.text_chunks import TextSplitter

ROOT = Path(__file__).resolve().parents[3]
CHINESE = "从前有座山，山里有座庙。庙里有个老和尚在讲故事！讲的是什么呢？从前有座山，山里有座庙。"
# Llama 3's; GPT-4's has no relevant difference.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _text() -> str:
    parts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/data.md", "CONTRIBUTING.md")]
    code = (ROOT / "llm" / "oarlock" / "data" / "corpus" / "text_chunks.py").read_text(encoding="utf-8")
    odd = "a\u0301e\u0301 x\ufb01x ½ 12345678901234\t\t\n\n\n   indented\r\nnext\r\n" + "==" * 200 + "\n"
    return "\n\n".join([parts[0], CHINESE * 20, parts[1], odd, code, parts[2], odd])


def _bpe(normalizer=None, pre_tokenizer=None, alphabet=(), **trainer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", "<s>"],
            initial_alphabet=list(alphabet),
            show_progress=False,
            **trainer,
        ),
    )


def _trained(tokenizer: Tokenizer, trainer) -> Tokenizer:
    # Lines, for tokenizers that treat a text without them as one word.
    tokenizer.train_from_iterator([line for line in _text().split("\n") if line], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    return _bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    both = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _bpe(pre_tokenizer=both, alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama2() -> Tokenizer:
    """SentencePiece as converted by transformers: a space before every text, and no pre-tokenizer."""
    trained = _bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))
    trained.pre_tokenizer = pre_tokenizers.Sequence([])
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained


def metaspace_first() -> Tokenizer:
    return _bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False), max_token_length=12)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return _trained(tokenizer, trainer)


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"], show_progress=False))


KINDS = {make.__name__: make for make in (gpt2, llama3, llama2, metaspace_first, unigram, bert)}


@pytest.fixture(scope="module")
def encoders():
    def encode_with(tokenizer: Tokenizer):
        return lambda texts: [row.ids for row in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return {name: encode_with(make()) for name, make in KINDS.items()}


def _joined(rows) -> list[int]:
    return list(itertools.chain.from_iterable(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ids_of_the_full_text(encoders, kind, monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_LENGTH", 700)
    text, encode = _text(), encoders[kind]
    splitter = TextSplitter(encode)
    parts = splitter.split_text(text)
    assert len(parts) > len(text) / 1500 and splitter.unsure == 0
    assert _joined(encode(parts)) == encode([text])[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_text_read_in_blocks_gives_the_ids_of_the_full_text(encoders, kind, data):
    text, encode = _text()[: data.draw(st.integers(1, 20_000))], encoders[kind]
    block = data.draw(st.integers(100, 3000))
    splitter, rest, parts = TextSplitter(encode), "", []
    for first in range(0, len(text), block):
        rest += text[first : first + block]
        done, rest = splitter.split_start(rest, 500)
        assert rest
        parts += splitter.split_text(done) if done else []
    parts += splitter.split_text(rest)
    assert _joined(encode(parts)) == encode([text])[0] and splitter.unsure == 0


def test_chinese_without_spaces_is_cut_too(encoders, monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_LENGTH", 1000)
    text = CHINESE * 200
    for kind in ("gpt2", "llama3", "bert"):
        splitter = TextSplitter(encoders[kind])
        parts = splitter.split_text(text)
        assert len(parts) > 5 and splitter.unsure == 0
        assert _joined(encoders[kind](parts)) == encoders[kind]([text])[0], kind


def test_uncuttable_text_stays_whole_up_to_a_limit_and_is_then_counted(encoders, monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_LENGTH", 1000)
    runs = TextSplitter(lambda texts: [[len(text)] for text in texts])  # a tokenizer that makes any text a single token
    text = "a b\n" * 5000
    assert runs.split_text(text) == [text] and runs.unsure == 0
    monkeypatch.setattr(text_chunks, "MAX_CHUNK_LENGTH", 4000)
    parts = runs.split_text(text)
    assert "".join(parts) == text and max(map(len, parts)) <= 8000 and runs.unsure == len(parts) - 1
    done, rest = runs.split_start(text, 500)
    assert done + rest == text and rest and runs.unsure == len(parts)


def test_long_runs_are_not_cut_at_coincidental_boundaries(encoders, monkeypatch):
    """Groups of three digits and pairs of letters are counted from the start of a run."""
    monkeypatch.setattr(text_chunks, "CHUNK_LENGTH", 1000)
    for kind, text in itertools.product(("gpt2", "llama3", "llama2"), ("1" * 5003, "number " + "7" * 5000, "z" * 5001)):
        splitter = TextSplitter(encoders[kind])
        assert _joined(encoders[kind](splitter.split_text(text))) == encoders[kind]([text])[0], (kind, text[:20])


def test_the_tokenizer_is_called_rarely(encoders):
    asked = []

    def counting(texts):
        asked.append(sum(map(len, texts)))
        return encoders["llama2"](texts)

    text = _text() * (1 + 2_000_000 // len(_text()))
    parts = TextSplitter(counting).split_text(text)
    assert len(parts) > 20 and sum(asked) < len(text) / 10
    assert np.array_equal(
        _joined(encoders["llama2"](parts[:3])),
        encoders["llama2"](["".join(parts[:1]) + " " + parts[1] + " " + parts[2]])[0],
    )
