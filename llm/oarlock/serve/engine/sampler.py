"""The next token of one request from its logits, in NumPy: each row of a batch may have other sampling parameters."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from oarlock.sampling.params import SamplingParams

_LEAST = 40.0  # exp(-40) is less than the rounding error of the largest probability
_CANDIDATES = 1024  # most likely tokens, among which top_p is tried before all tokens are sorted


class Sampler:
    """Chooses the tokens of one answer. It has random numbers of its own, so that the batch does not affect them."""

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int], ends: Iterable[int] = ()) -> None:
        """Make the sampler of a request.

        Args:
            ends: tokens that are not chosen before the answer has min_tokens.
        """
        self._sampling = sampling
        self._ends = np.array(sorted(ends), np.int64)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}
        self._num_chosen = 0
        seed = None if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))

    def choose(self, logits: np.ndarray) -> int:
        """Choose the next token.

        Args:
            logits: of all tokens, float32 [vocabulary]; they are not changed.

        Raises:
            ArithmeticError: when none of them is finite, or one is NaN.
        """
        token = self._draw(self._penalize(logits))
        self._num_chosen += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _penalize(self, logits: np.ndarray) -> np.ndarray:
        params = self._sampling
        hides_ends = self._num_chosen < params.min_tokens and self._ends.size
        if not (hides_ends or self._seen or params.frequency_penalty or params.presence_penalty):
            return logits
        logits = logits.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.int64)
            seen = seen[seen < logits.size]
            values, penalty = logits[seen], params.repetition_penalty
            with np.errstate(all="ignore"):
                changed = np.where(values > 0, values / penalty, values * penalty)
            # With a penalty near 0 they are beyond float32, perhaps beyond float64.
            if not np.isfinite(changed[np.isfinite(values)]).all():
                logits = logits.astype(np.float64)
                with np.errstate(all="ignore"):
                    changed = np.where(values > 0, logits[seen] / penalty, logits[seen] * penalty)
                limit = np.finfo(np.float64).max / 4  # differences of two must be finite too
                changed = changed.clip(-limit, limit)
            # -inf times a penalty that rounds to 0 is NaN.
            logits[seen] = np.where(np.isfinite(values), changed, values)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[tokens] -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty)
        if hides_ends:
            logits[self._ends] = -np.inf
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        best = int(logits.argmax())  # the index of a NaN, if there is one
        if not np.isfinite(logits[best]):
            raise ArithmeticError("the model's logits are not finite numbers")
        if self._sampling.temperature == 0 or self._sampling.top_k == 1:
            return best
        tokens, probabilities = filter_tokens(logits, self._sampling)
        sums = probabilities.cumsum()
        index = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def filter_tokens(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top_k and top_p leave, and their probabilities, float64.

    With top_p the most likely come first (of equals the smaller id). The probabilities are relative to all tokens that
    top_k leaves, so that after top_p they add up to less than 1.
    """
    largest = logits.max()
    # Of 150,000 tokens mostly few. A temperature near 0 leaves those that are as likely as the first.
    tokens = np.flatnonzero(logits >= largest - _LEAST * params.temperature)
    with np.errstate(all="ignore"):
        weights = np.exp((logits[tokens].astype(np.float64) - float(largest)) / params.temperature)
    if 0 < params.top_k < len(weights):
        chosen = _likeliest(weights, params.top_k)
        tokens, weights = tokens[chosen], weights[chosen]
    probabilities = weights / weights.sum()
    if params.top_p >= 1:
        return tokens, probabilities
    chosen = _likeliest(probabilities, min(_CANDIDATES, len(probabilities)))
    if probabilities[chosen].sum() < params.top_p:
        chosen = _likeliest(probabilities, len(probabilities))
    sorted_probabilities = probabilities[chosen]
    before = sorted_probabilities.cumsum() - sorted_probabilities
    count = max(1, int((before < params.top_p).sum()))  # a token is kept if those before it do not reach top_p
    return tokens[chosen[:count]], sorted_probabilities[:count]


def _likeliest(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest weights, in order; of equals the first ones."""
    if count < len(weights):
        least = np.partition(weights, len(weights) - count)[len(weights) - count]
        above, equal = np.flatnonzero(weights > least), np.flatnonzero(weights == least)
        indices = np.concatenate([above, equal[: count - len(above)]])
        indices.sort()
    else:
        indices = np.arange(len(weights))
    return indices[np.argsort(-weights[indices], kind="stable")]
