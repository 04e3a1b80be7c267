"""The next token of one row from its scores, in NumPy: rows of a batch may each want something else."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from oarlock.serve.engine.sampling_params import Sampling

_LEAST = 40.0  # exp(-40) is less than what rounding makes of the largest mass
_CANDIDATES = 1024  # of which top_p is looked for first, before all tokens are sorted


class Sampler:
    """Chooses the tokens of one answer. Its random numbers are its own, so that the batch around it has no say."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], ends: Iterable[int] = ()) -> None:
        """Of a request.

        Args:
            ends: tokens that are not chosen before min_tokens are there.
        """
        self._sampling = sampling
        self._ends = np.array(sorted(ends), np.int64)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}
        self._chosen = 0
        seed = None if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))

    def choose(self, scores: np.ndarray) -> int:
        """The next token.

        Args:
            scores: of all tokens, float32 [vocabulary]; left as they are.

        Raises:
            ArithmeticError: when none of them is finite, or one is NaN.
        """
        token = self._choose(self._penalised(scores))
        self._chosen += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _penalised(self, scores: np.ndarray) -> np.ndarray:
        how = self._sampling
        hides_ends = self._chosen < how.min_tokens and self._ends.size
        if not (hides_ends or self._seen or how.frequency_penalty or how.presence_penalty):
            return scores
        scores = scores.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.int64)
            seen = seen[seen < scores.size]
            scores = _repetition_penalised(scores, seen, how.repetition_penalty)
        if self._counts and (how.frequency_penalty or how.presence_penalty):
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            scores[tokens] -= np.float32(how.frequency_penalty) * counts + np.float32(how.presence_penalty)
        if hides_ends:
            scores[self._ends] = -np.inf
        return scores

    def _choose(self, scores: np.ndarray) -> int:
        best = int(scores.argmax())  # the place of a NaN, where there is one
        if not np.isfinite(scores[best]):
            raise ArithmeticError("the model's scores are not finite numbers")
        if self._sampling.temperature == 0 or self._sampling.top_k == 1:
            return best
        tokens, masses = kept(scores, self._sampling)
        sums = masses.cumsum()
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def _repetition_penalised(scores: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """The scores of all tokens, those of `seen` divided (where above 0) or multiplied by a penalty above 0."""
    values = scores[seen]
    with np.errstate(all="ignore"):
        changed = np.where(values > 0, values / penalty, values * penalty)
    if not np.isfinite(changed[np.isfinite(values)]).all():  # a penalty near 0: beyond float32, perhaps beyond float64
        scores = scores.astype(np.float64)
        with np.errstate(all="ignore"):
            changed = np.where(values > 0, scores[seen] / penalty, scores[seen] * penalty)
        limit = np.finfo(np.float64).max / 4  # differences of two have to be finite too
        changed = np.where(np.isfinite(values), changed.clip(-limit, limit), values)
    scores[seen] = changed
    return scores


def kept(scores: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top_k and top_p leave, and their masses, float64.

    With top_p they come likeliest first (of equals the smaller id). Masses are relative: they sum to what top_p left
    of 1 (after top_k).
    """
    largest = scores.max()
    # Of 150,000 tokens mostly few. A temperature near 0 leaves those that are as likely as the likeliest.
    places = np.flatnonzero(scores >= largest - _LEAST * how.temperature)
    with np.errstate(all="ignore"):
        masses = np.exp((scores[places].astype(np.float64) - float(largest)) / how.temperature)
    if 0 < how.top_k < len(masses):
        chosen = _likeliest(masses, how.top_k)
        places, masses = places[chosen], masses[chosen]
    masses /= masses.sum()
    if how.top_p >= 1:
        return places, masses
    chosen = _likeliest(masses, min(_CANDIDATES, len(masses)))
    if masses[chosen].sum() < how.top_p:
        chosen = _likeliest(masses, len(masses))
    shares = masses[chosen]
    before = shares.cumsum() - shares  # a token is kept when those before it do not make up top_p
    count = max(1, int((before < how.top_p).sum()))
    return places[chosen[:count]], shares[:count]


def _likeliest(masses: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest, in order; of equals the first ones."""
    if count < len(masses):
        least = np.partition(masses, len(masses) - count)[len(masses) - count]
        above, equal = np.flatnonzero(masses > least), np.flatnonzero(masses == least)
        places = np.concatenate([above, equal[: count - len(above)]])
        places.sort()
    else:
        places = np.arange(len(masses))
    return places[np.argsort(-masses[places], kind="stable")]
