"""Two ways to make inputs: atheris (libFuzzer), which is guided by branches, and hypothesis, which is always installed."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import Judge
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

_LONGEST = 1 << 16  # bytes of an input


@st.composite
def mutate(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Change a seed: flip bits, drop, double or exchange pieces, insert tokens, replace numbers."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        kind = draw(st.integers(0, 6))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[at:end] = b""
        elif kind == 2:
            data[at:at] = data[at:end] * draw(st.integers(1, 300))
        elif kind == 3:
            other = draw(st.sampled_from(seeds))
            begin = draw(st.integers(0, len(other)))
            data[at:end] = other[begin : begin + draw(st.integers(0, 100))]
        elif kind == 4 and tokens:
            data[at:at] = draw(st.sampled_from(tokens))
        elif kind == 5:
            data[at:end] = draw(st.binary(max_size=20))
        elif kind == 6:
            data[at:end] = str(draw(st.integers(-(10 ** draw(st.integers(1, 30))), 10**25))).encode()
    return bytes(data[:_LONGEST])


def with_hypothesis(judge: Judge, seconds: float, fixed: bool = False, stop: Callable[[], bool] = bool) -> None:
    """Feed a judge for some time.

    Args:
        fixed: the same inputs every time, as far as the time reaches.
        stop: asked after each input, whether to end at once.
    """
    seeds = judge.seeds()
    end = time.monotonic() + seconds
    round_number = 0 if fixed else random.SystemRandom().randrange(1 << 60)
    while time.monotonic() < end and not stop():
        round_number += 1

        @seed(round_number)
        @settings(
            max_examples=300,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # the judge keeps the inputs of findings
            suppress_health_check=list(HealthCheck),
        )
        @given(mutate(seeds, judge.harness.tokens))
        def feed(data: bytes) -> None:
            if time.monotonic() < end:
                judge(data)

        feed()


def with_atheris(judge: Judge, seconds: float, corpus: Path, done: Callable[[], None]) -> None:
    """Feed a judge for some time in this process, which ends with it: libFuzzer does not return.

    Args:
        corpus: an empty folder, which gets the seeds and what turns out to reach new branches.
        done: called at the end.
    """
    import atheris

    for number, content in enumerate(judge.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    words = corpus.with_name(f"{corpus.name}.dict")
    words.write_text(
        "".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in word)}"\n' for word in judge.harness.tokens)
    )
    end = time.monotonic() + seconds

    def feed(data: bytes) -> None:
        if time.monotonic() > end:
            done()
            sys.stdout.flush()
            os._exit(0)
        judge(data)

    options = [f"-dict={words}", f"-max_len={_LONGEST}", "-timeout=60", "-rss_limit_mb=8000", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/crash-", str(corpus)], feed)
    atheris.Fuzz()
