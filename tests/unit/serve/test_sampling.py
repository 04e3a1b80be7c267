"""Sampling compared with a naive implementation, and detokenization across chunk boundaries."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.errors import RequestRefused
from oarlock.sampling.params import SamplingParams
from oarlock.serve.engine.detokenize import Detokenizer, StopFinder
from oarlock.serve.engine.sampler import Sampler, filter_tokens

SCORES = st.lists(st.integers(-40, 40), min_size=1, max_size=40).map(lambda s: np.array(s, np.float32) / 8)
HOW = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.4, 0.9, 0.999, 1.0]),
)


def sample_naively(scores, how):
    """{token: probability} by sorting all tokens."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    masses = np.exp(np.asarray(scores, np.float64) / how.temperature - max(scores) / how.temperature)
    order = order[: how.top_k or None]
    total, found, before = sum(masses[i] for i in order), {}, 0.0
    for i in order:
        if before < how.top_p or not found:
            found[i] = masses[i] / total
        before += masses[i] / total
    return found


@given(scores=SCORES, how=HOW)
@settings(max_examples=300, deadline=None)
def test_top_k_and_top_p_candidates(scores, how):
    tokens, masses = filter_tokens(scores, how)
    wanted = sample_naively(scores, how)
    near = abs(
        np.cumsum(list(sample_naively(scores, SamplingParams(temperature=how.temperature, top_k=how.top_k)).values()))
        - how.top_p
    )
    if how.top_p < 1 and near.min() < 1e-9:
        return  # at the boundary, rounding decides
    assert set(tokens.tolist()) == set(wanted)
    np.testing.assert_allclose(masses, [wanted[token] for token in tokens.tolist()], rtol=1e-9)


def test_more_candidates_than_the_first_selection():
    scores = np.random.default_rng(0).normal(0, 0.01, 5000).astype(np.float32)
    how = SamplingParams(temperature=1.0, top_p=0.9)
    assert (
        set(filter_tokens(scores, how)[0].tolist()) == set(sample_naively(scores, how))
        and len(filter_tokens(scores, how)[0]) > 4000
    )


@given(
    scores=SCORES.filter(lambda s: len(s) > 5),
    prompt=st.lists(st.integers(0, 4), max_size=3),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    frequency=st.sampled_from([-0.5, 0.0, 0.25]),
    presence=st.sampled_from([0.0, 0.75]),
)
@settings(max_examples=200, deadline=None)
def test_penalties(scores, prompt, repetition, frequency, presence):
    how = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    sampler, chosen = Sampler(how, prompt), []
    for _ in range(6):
        expected = scores.astype(np.float64)
        for token in {*prompt, *chosen}:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        for token in set(chosen):
            expected[token] -= frequency * chosen.count(token) + presence
        before = scores.copy()
        chosen.append(sampler.choose(scores))
        assert expected[chosen[-1]] >= expected.max() - 1e-5
        assert np.array_equal(scores, before), "the scores are the caller's"


EXTREMES = st.one_of(
    st.sampled_from([1e-45, 1e-38, 1.2e-38, 1e-30, 1e-7, 1.0, 1e7, 1e30, 1e38, 3.4e38, 5e-324, 1e-300, 1e300]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 2.0**127, width=32),
).flatmap(lambda value: st.sampled_from([value, -value, float(np.float32(min(max(value, -3.4e38), 3.4e38)))]))


@given(
    scores=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=30).map(
        lambda s: np.array(s, np.float32)
    ),
    fields=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty"]),
        EXTREMES,
    ),
    top_k=st.sampled_from([0, 1, 2, 29, 2**31 - 1]),
    hidden=st.booleans(),
)
@settings(max_examples=600, deadline=None)
@pytest.mark.filterwarnings("error")
def test_every_number_is_refused_or_honoured(scores, fields, top_k, hidden):
    """As in requests (float32) and as in JSON (float64)."""
    if hidden and len(scores) > 1:
        scores[-1] = -np.inf
    how = SamplingParams(**fields, top_k=top_k, seed=1)
    try:
        how.check()
    except RequestRefused as refused:
        assert any(name in str(refused) for name in fields)
        return
    sampler = Sampler(how, range(min(3, len(scores))))
    for _ in range(3):
        token = sampler.choose(scores)
        assert 0 <= token < len(scores) and scores[token] > -np.inf


def test_a_penalty_near_zero_keeps_the_order():
    """Of tokens whose logits overflow float32 because of it."""
    scores = np.array([2, 7, 5, 30], np.float32)
    for penalty in (1e-38, 1e-30, 1e-45, 5e-324):
        assert Sampler(SamplingParams(repetition_penalty=penalty), [0, 2]).choose(scores) in (
            {2} if penalty > 1e-300 else {0, 2}
        )
        assert Sampler(SamplingParams(repetition_penalty=penalty, temperature=1e-30, seed=1), [0, 2]).choose(
            scores
        ) in (0, 2)


def test_sample_frequencies_match_the_distribution():
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=5), [])
    found = np.bincount([sampler.choose(scores) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(found, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    again = Sampler(SamplingParams(temperature=1.0, seed=5), []), Sampler(SamplingParams(temperature=1.0, seed=5), [])
    assert [again[0].choose(scores) for _ in range(50)] == [again[1].choose(scores) for _ in range(50)]


def test_end_tokens_are_suppressed_until_min_tokens():
    scores = np.array([3, 2, 1], np.float32)
    sampler = Sampler(SamplingParams(min_tokens=2), [], ends=[0])
    assert [sampler.choose(scores) for _ in range(4)] == [1, 1, 0, 0]


def test_non_finite_logits_are_an_error():
    with pytest.raises(ArithmeticError, match="not finite"):
        Sampler(SamplingParams(), []).choose(np.array([1, np.nan, 2], np.float32))
    with pytest.raises(ArithmeticError, match="not finite"):
        Sampler(SamplingParams(temperature=1.0), []).choose(np.full(3, -np.inf, np.float32))
    allowed = Sampler(SamplingParams(temperature=1.0), []).choose(np.array([-np.inf, 0, -np.inf], np.float32))
    assert allowed == 1


# text


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    text=st.text("ab.\nX", max_size=30),
    stops=st.lists(st.text("ab.X", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 30), max_size=12),
)
@settings(max_examples=500, deadline=None)
def test_stop_texts_are_found_across_chunks(text, stops, places):
    """X is a hidden token: found, but not shown."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = (text[: min(ends)[1]] if ends else text).replace("X", "")
    finder, shown = StopFinder(stops), ""
    for piece in (run for part in cut(text, places) for run in re.findall("X+|[^X]+", part)):
        shown += finder.add(piece, hidden=piece[0] == "X")
        assert wanted.startswith(shown), "never past the beginning of a stop text"
    assert finder.found == bool(ends)
    assert shown + finder.flush() == wanted


def test_a_broken_character_before_a_hidden_token_is_shown():
    tokens = [b"a", b"\xe5\xb1", b"", b"\xb1b", "山".encode()[:2], "山".encode()[2:]]
    detokenizer = Detokenizer(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"))
    assert [detokenizer.add(i, hidden=i == 2) for i in range(6)] == ["a", "", "\ufffd", "\ufffdb", "", "山"]


WORDS = "naïve 山 river 👩‍👩‍👧 🇫🇷"


@given(data=st.one_of(st.text(max_size=20), st.text(WORDS, max_size=20)).map(lambda t: t.encode("utf-8", "ignore")),
       wild=st.binary(max_size=4), places=st.lists(st.integers(0, 60), max_size=40))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_characters_are_never_split(data, wild, places):
    """Tokens of one or several bytes, as in byte-level tokenizers, including invalid UTF-8."""
    tokens = [piece for piece in cut(data + wild, places) if piece]
    detokenizer = Detokenizer(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"))
    pieces = [detokenizer.add(i) for i in range(len(tokens))]
    whole = (data + wild).decode("utf-8", "replace")
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == whole
    assert detokenizer.flush() == ""


def test_a_leading_space_is_kept_in_the_middle_of_a_text():
    words = ["▁Hello", "▁world", "", "▁!"]  # as in SentencePiece; the third is a special token
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [detokenizer.add(i) for i in range(4)] == ["Hello", " world", "", " !"]


def test_a_token_with_logit_minus_infinity_stays_excluded():
    """A penalty that float32 rounds to 0 would turn minus infinity into NaN."""
    logits = np.array([0, -np.inf, 1], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=1e-50), [0, 1]).choose(logits) == 2
