"""Rotary embeddings: frequencies by their formulas, tables with PaddleNLP's bits, and rotation in all its ways."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddlenlp.transformers.llama import modeling as llama
from paddlenlp.transformers.qwen2.modeling import Qwen2RotaryEmbedding

from oarlock.decoder import rotary
from oarlock.decoder.frequencies import compute_frequencies
from oarlock.decoder.rotary import make_rotary_tables, rotate
from oarlock.families.architecture import Rope
from oarlock.ops import library, patch

LENGTH = "original_max_position_embeddings"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 64}
LONGROPE = {"short_factor": [1.0, 1.2, 1.3, 1.4], "long_factor": [1.0, 2.2, 3.3, 4.4], LENGTH: 12}
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 2.5},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 4.0, LENGTH: 16},
    "llama3": LLAMA3 | {LENGTH: 16},
    "longrope": LONGROPE,
}
ROPES = [Rope(1e4, 8, 16, kind, scaling) for kind, scaling in KINDS.items()]


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(rotary, "_tables", ())


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request, monkeypatch):
    if request.param and (reason := library.why_missing()):
        pytest.skip(reason)
    monkeypatch.setattr(patch, "_is_enabled", request.param)


# frequencies


def powers(theta: float, dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2) / dim)


def test_unscaled_and_by_one_number():
    def found(kind: str, length: int = 1, **scaling: float) -> np.ndarray:
        return compute_frequencies(Rope(5e5, 96, 64, kind, scaling), length)[0]

    plain = powers(5e5, 96)
    assert found("default").dtype == np.float32
    np.testing.assert_allclose(found("default"), plain, 1e-6)
    np.testing.assert_allclose(found("linear", factor=3.0), plain / 3, 1e-6)
    np.testing.assert_allclose(found("ntk", factor=3.0), powers(5e5 * 3 ** (96 / 94), 96), 1e-6)
    np.testing.assert_array_equal(found("dynamic", 64, factor=3.0), found("default"))
    np.testing.assert_allclose(found("dynamic", 160, factor=3.0), powers(5e5 * 5.5 ** (96 / 94), 96), 1e-6)


def test_llama3_divides_long_waves_and_blends_between():
    found, factor = compute_frequencies(Rope(1e4, 64, 512, "llama3", LLAMA3), 1)
    plain, wanted = powers(1e4, 64), []
    for frequency in plain:
        turns = 64 * frequency / (2 * math.pi)  # in the original length
        share = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        wanted.append(frequency * (share + (1 - share) / 8.0))
    np.testing.assert_allclose(found, wanted, 2e-6)
    assert factor == 1 and found[0] == 1 and np.sum((found < plain * 0.999) & (found > plain / 7.99)) > 2


def test_yarn_by_the_papers_ramp_and_its_attention_factors():
    def find(**more: float | bool) -> tuple[np.ndarray, float]:
        return compute_frequencies(Rope(1e4, 64, 512, "yarn", {"factor": 8.0, LENGTH: 64, **more}), 1)

    def component(turns: float) -> float:
        return 64 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    def wanted(start: float, end: float) -> np.ndarray:
        ramp = np.clip((np.arange(32) - start) / (end - start), 0, 1)
        return powers(1e4, 64) * (1 - ramp) + powers(1e4, 64) / 8 * ramp

    start, end = component(4), component(1)
    np.testing.assert_allclose(find(beta_fast=4)[0], wanted(math.floor(start), math.ceil(end)), 2e-6)
    np.testing.assert_allclose(find(beta_fast=4, truncate=False)[0], wanted(start, end), 2e-6)
    np.testing.assert_allclose(find()[0], wanted(0, math.ceil(end)), 2e-6)  # 32 turns are before the first component
    assert find()[1] == pytest.approx(0.1 * math.log(8) + 1)
    assert find(attention_factor=1.5)[1] == 1.5
    assert find(mscale=0.5, mscale_all_dim=2.0)[1] == pytest.approx((0.05 * math.log(8) + 1) / (0.2 * math.log(8) + 1))
    assert find(mscale=0.5, mscale_all_dim=0)[1] == find()[1]


def test_longrope_by_length():
    rope = Rope(1e4, 8, 48, "longrope", LONGROPE)
    for length, name in ((12, "short_factor"), (13, "long_factor")):
        found, factor = compute_frequencies(rope, length)
        np.testing.assert_allclose(found, powers(1e4, 8) / LONGROPE[name], 1e-6)
        assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(12)))
    assert compute_frequencies(replace(rope, scaling=LONGROPE | {"factor": 0.5}), 1)[1] == 1
    assert compute_frequencies(replace(rope, scaling=LONGROPE | {"attention_factor": 3}), 1)[1] == 3


# tables


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 123456.7])
@pytest.mark.parametrize("dim", [8, 64, 96, 100, 128])
def test_tables_have_the_bits_of_paddlenlps(theta, dim):
    other = LLAMA3 | {"factor": 7.3, "low_freq_factor": 1.3}
    cases = {
        ("default", ()): Qwen2RotaryEmbedding(dim, 256, theta),
        ("linear", (("factor", 3.7),)): llama.LlamaLinearScalingRotaryEmbedding(dim, 256, theta, 3.7),
        ("ntk", (("factor", 2.5),)): llama.LlamaNTKScalingRotaryEmbedding(dim, 256, theta, 2.5),
        ("dynamic", (("factor", 2.5),)): llama.LlamaDynamicNTKScalingRotaryEmbedding(dim, 64, theta, 2.5),
        ("llama3", tuple(LLAMA3.items())): llama.Llama3RotaryEmbedding(dim, 256, theta, **LLAMA3),
        ("llama3", tuple(other.items())): llama.Llama3RotaryEmbedding(dim, 256, theta, **other),
    }
    for (kind, scaling), theirs in cases.items():
        rope = Rope(theta, dim, 64 if kind == "dynamic" else 256, kind, dict(scaling))
        for length in (60, 200):
            wanted = theirs(paddle.zeros([1]), seq_len=length)
            for ours, table in zip(make_rotary_tables(rope, length), wanted, strict=True):
                assert np.array_equal(ours.numpy(), table[0, :, 0].numpy()), (kind, length)


def test_layers_share_a_table_that_doubles_and_old_ones_go():
    rope = Rope(1e4, 8, 2048)
    first = rotary._get_table(rope, 5)
    assert len(first[0]) == 256 and rotary._get_table(replace(rope), 256)[0] is first[0]
    grown = rotary._get_table(rope, 257)
    assert len(grown[0]) == 512 and np.array_equal(grown[1][:256].numpy(), first[1].numpy())
    assert len(rotary._get_table(rope, 1500)[0]) == 2048 and len(rotary._get_table(rope, 3000)[0]) == 4096
    assert len(rotary._tables) == 1 and rotary._tables[0].cos.stop_gradient
    assert make_rotary_tables(rope, 7)[0].shape == [7, 8]
    for theta in range(2, 40):
        rotary._get_table(Rope(theta, 8, 64), 5)
    assert len(rotary._tables) == 8 and all(len(table.cos) == 64 for table in rotary._tables)


def test_tables_that_depend_on_the_length():
    for kind in ("dynamic", "longrope"):
        rope = Rope(1e4, 8, 16, kind, KINDS[kind])
        short, long, longer = (make_rotary_tables(rope, length)[0][5].numpy() for length in (10, 20, 30))
        assert not np.array_equal(short, long) and np.array_equal(long, longer) == (kind == "longrope")
        assert np.array_equal(make_rotary_tables(rope, 10)[0][5].numpy(), short)
    assert len(rotary._tables) == 4  # both kinds: one for short texts, one for long ones


# rotation


def draw(rope: Rope, length: int, head_dim: int = 8) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    paddle.seed(length)
    positions = np.stack([np.arange(length), -np.arange(length) % length])  # of one text each: 0 comes once
    query, key = paddle.randn([2, length, 4, head_dim]), paddle.randn([2, length, 1, head_dim])
    query.stop_gradient = key.stop_gradient = False
    return query, key, paddle.to_tensor(positions)


def expected(x: np.ndarray, rope: Rope, positions: np.ndarray, length: int) -> np.ndarray:
    """Pairs of components as complex numbers, in float64."""
    inverse, factor = compute_frequencies(rope, length)
    half = rope.dim // 2
    firsts, seconds = (
        (slice(0, rope.dim, 2), slice(1, rope.dim, 2)) if rope.interleaved else (slice(half), slice(half, rope.dim))
    )
    turned = (
        (x[..., firsts] + 1j * x[..., seconds])
        * factor
        * np.exp(1j * positions[..., None, None] * inverse.astype(float))
    )
    result = x.astype(float)
    result[..., firsts], result[..., seconds] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("rope", ROPES, ids=KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_pairs_turn_like_complex_numbers(fused, rope, interleaved, head_dim):
    rope = replace(rope, interleaved=interleaved)
    for length in (7, 30):
        query, key, positions = draw(rope, length, head_dim)
        for given in (positions, None):
            places = np.tile(np.arange(length), (2, 1)) if given is None else positions.numpy()
            for before, after in zip((query, key), rotate(query, key, rope, given, length), strict=True):
                np.testing.assert_allclose(after.numpy(), expected(before.numpy(), rope, places, length), atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_longest_text_counts_and_not_the_row_it_is_packed_in(kind):
    rope = Rope(1e4, 8, 16, kind, KINDS[kind])
    query, key, _ = draw(rope, 30)
    positions = paddle.to_tensor(np.tile(np.arange(10), (2, 3)))
    packed = rotate(query, key, rope, positions, 30)[0]
    for part in (slice(0, 10), slice(20, 30)):
        alone = rotate(query[:, part], key[:, part], rope, None, 10)[0]
        assert np.array_equal(packed[:, part].numpy(), alone.numpy())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_packed_and_padded_texts_turn_as_they_do_alone(fused, kind):
    rope = Rope(1e4, 8, 16, kind, KINDS[kind])
    lengths = (5, 25, 16, 17, 3, 30)
    rows = [lengths[:4], lengths[4:]]
    query, key, _ = draw(rope, 63)
    places = [np.concatenate([np.arange(length) for length in (*row, *[1] * (63 - sum(row)))]) for row in rows]
    packed = rotate(query, key, rope, paddle.to_tensor(np.stack(places)), 63)
    for i, row in enumerate(rows):
        for length, end in zip(row, np.cumsum(row), strict=True):
            part = slice(i, i + 1), slice(end - length, end)
            for found, alone in zip(packed, rotate(query[part], key[part], rope, None, length), strict=True):
                assert np.array_equal(found[part].numpy(), alone.numpy())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_gradients_turn_back(fused, interleaved, head_dim):
    rope = replace(ROPES[0], interleaved=interleaved)
    query, key, positions = draw(rope, 9, head_dim)
    before = paddle.randn(query.shape), paddle.randn(key.shape)
    found = paddle.grad(rotate(query, key, rope, positions, 9), [query, key], list(before))
    for grad, wanted in zip(found, before, strict=True):
        back = expected(wanted.numpy(), rope, -positions.numpy(), 9)
        np.testing.assert_allclose(grad.numpy(), back, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES, ids=KINDS)
def test_a_static_graph_computes_the_same(rope):
    rope = replace(rope, interleaved=rope.kind == "yarn")

    class Turn(paddle.nn.Layer):
        def forward(self, query, key, positions):
            return *rotate(query, key, rope, positions, -1), *rotate(query, key, rope, None, -1)

    spec = [paddle.static.InputSpec([None, None, heads, 12], "float32") for heads in (4, 1)]
    graph = paddle.jit.to_static(
        Turn(), input_spec=[*spec, paddle.static.InputSpec([None, None], "int64")], full_graph=True
    )
    for length in (7, 30):
        query, key, positions = draw(rope, length, 12)
        positions[1] = (paddle.arange(length) - length // 3).clip(min=0)  # padding on the left
        wanted = *rotate(query, key, rope, positions, length), *rotate(query, key, rope, None, length)
        for ours, theirs in zip(graph(query, key, positions), wanted, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=3e-6)


def test_types_stay_and_autocast_leaves_angles_alone(fused):
    query, key, positions = draw(ROPES[0], 9)
    wide = [x.astype("float64") for x in (query, key)]
    wanted = rotate(query, key, ROPES[0], positions, 9)
    for found, exact in zip(rotate(*wide, ROPES[0], positions, 9), wanted, strict=True):
        assert found.dtype == paddle.float64
        np.testing.assert_allclose(found.numpy(), exact.numpy(), atol=1e-6)
    rotary._tables = ()
    with paddle.amp.auto_cast(level="O2", dtype="bfloat16"):
        cos, _ = make_rotary_tables(ROPES[0], 300)
    rotary._tables = ()
    assert cos.dtype == paddle.float32 and np.array_equal(cos.numpy(), make_rotary_tables(ROPES[0], 300)[0].numpy())


def test_a_position_outside_the_tables_is_refused(fused):
    query, key, positions = draw(ROPES[0], 9)
    with pytest.raises((ValueError, IndexError, OSError)):
        rotate(query, key, ROPES[0], positions + 300, 9)
