"""attend() beside float64 with every mask, window, cap and sink, through each of its backends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exact_attention import KINDS, exact_attention, make_ends, make_seen
from oarlock.environment import console
from oarlock.environment.paddle_import import import_paddle
from oarlock.ops import attention, library, patch
from oarlock.ops.attention import AttentionMask, attend, make_mask

import_paddle()
import paddle  # noqa: E402

from oarlock.ops.attention_backends import flash, masks, reference  # noqa: E402

SCALE = 0.3
FEATURES = list(itertools.product([None, 5, 70], [None, 3.0], [False, True]))  # windows, caps, sinks


@pytest.fixture(params=["fused", "reference"])
def backend(request, monkeypatch):
    """Has attend() use one, and no other."""
    is_fused = request.param == "fused"
    if is_fused and library.why_missing():
        pytest.skip(library.why_missing())
    monkeypatch.setattr(patch, "_is_enabled", is_fused)
    others = ("reference_attention", "attend_in_blocks") if is_fused else ("fused_attention",)
    for name in others:
        monkeypatch.setattr(attention, name, None)
    return request.param


def make_arrays(random, batch, queries, keys, kv_heads=2, groups=2, dim=16, value_dim=16):
    """query, key, value and the gradient of the output."""
    heads = kv_heads * groups
    shapes = (queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim), (queries, heads, value_dim)
    return [random.normal(0, 1, (batch, *shape)).astype(np.float32) for shape in shapes]


def run(arrays, mask, sinks=None, **features):
    """The output and the gradients of query, key, value and sinks."""
    given = [*arrays[:3], *([] if sinks is None else [sinks])]
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in given]
    sinks = None if sinks is None else tensors[3]
    output = attend(*tensors[:3], mask=mask, scale=SCALE, sinks=sinks, **features)
    return [output, *paddle.grad([output], tensors, [paddle.to_tensor(arrays[3])])]


def require_close(found, expected, tolerance=1e-5):
    for tensor, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize(("window", "soft_cap", "has_sinks"), FEATURES)
@pytest.mark.parametrize("kind", [*KINDS, "a mask of its own"])
def test_everything_together(backend, kind, window, soft_cap, has_sinks):
    random = np.random.default_rng(window)
    for queries, keys, dim, value_dim in ((150, 150, 16, 16), (3, 130, 24, 20), (70, 81, 8, 33)):
        arrays = make_arrays(random, 2, queries, keys, dim=dim, value_dim=value_dim)
        sinks = random.normal(0, 1, 4).astype(np.float32) if has_sinks else None
        if kind == "a mask of its own":
            of_window = make_seen(queries, keys, window=window) | ~make_seen(queries, keys)
            seen = random.random((2, 1, queries, keys)) < 0.5
            seen[0, 0, 1] = False
            mask, seen = make_mask(paddle.to_tensor(seen)), seen & of_window
        else:
            ends = make_ends(random, kind, 2, keys)
            mask = make_mask(ends=None if kind == "causal" else paddle.to_tensor(ends))
            seen = make_seen(queries, keys, ends, window)
        found = run(arrays, mask, sinks, window=window, soft_cap=soft_cap)
        require_close(found, exact_attention(*arrays, seen, SCALE, soft_cap=soft_cap, sinks=sinks))


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 1), (1, 4), (3, 1), (5, 3)])
def test_groups_of_heads(backend, kv_heads, groups):
    random = np.random.default_rng(0)
    arrays = make_arrays(random, 1, 90, 90, kv_heads, groups)
    sinks = random.normal(0, 1, kv_heads * groups).astype(np.float32)
    found = run(arrays, AttentionMask(), sinks, window=40, soft_cap=2.0)
    seen = make_seen(90, 90, window=40)
    require_close(found, exact_attention(*arrays, seen, SCALE, soft_cap=2.0, sinks=sinks))


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_query_without_keys_gives_0(backend, has_sinks):
    random = np.random.default_rng(0)
    arrays = make_arrays(random, 2, 9, 9)
    text = np.ones((2, 9), np.int64)
    text[1, :4] = 0
    sinks = np.zeros(4, np.float32) if has_sinks else None
    for mask in (text, make_seen(9, 9, text.astype(np.int32) * 9)):
        output, of_query, *_ = run(arrays, make_mask(paddle.to_tensor(mask)), sinks)
        assert not output[1, :4].any() and not of_query[1, :4].any()
        assert output[0].any(axis=[1, 2]).all() and output[1, 4:].any(axis=[1, 2]).all()


def test_blocks_of_packed_rows_and_windows_are_small():
    """No block holds more scores than a row of 128 queries with what they see."""
    ends = np.concatenate([make_ends(np.random.default_rng(1), "packed", 2, 2000), np.full((1, 2000), 2000, np.int32)])
    for window in (None, 64, 300):
        blocks = masks.make_query_blocks(2, 2000, paddle.to_tensor(ends[:2]), window)
        assert sum(block.stop - block.start for block in blocks) == 4000
        assert max(block.stop - block.first_key for block in blocks) <= 700
    in_windows = masks.make_query_blocks(1, 2000, None, 300)
    assert max(block.mask.shape[-1] for block in in_windows) == 599


@pytest.fixture
def flash_calls(monkeypatch):
    """FlashAttention and FlashMask in Paddle's ops, by their definition: rows from an index on do not see a key."""

    def attend_to_rows(query, key, value, rows, causal):
        calls.append(rows)
        assert causal and rows.dtype == paddle.int32 and query.shape[-1] == value.shape[-1]
        places = paddle.arange(key.shape[1], dtype="int32").unsqueeze(1)
        seen = (places.t() <= places) & (places < rows.squeeze(-1).unsqueeze(2))
        return reference.reference_attention(query, key, value, seen, query.shape[-1] ** -0.5)

    def attend_to_all(query, key, value, causal):
        calls.append(None)
        assert causal and query.shape[-1] == value.shape[-1]
        seen = masks.make_dense_mask(query.shape[1], key.shape[1]).unsqueeze(1)
        return reference.reference_attention(query, key, value, seen, query.shape[-1] ** -0.5), None

    calls = []
    monkeypatch.setattr(flash.functional, "flashmask_attention", attend_to_rows)
    monkeypatch.setattr(flash.functional.flash_attention, "flash_attention", attend_to_all)
    monkeypatch.setattr(attention, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "can_fuse", lambda *tensors: False)  # an earlier test may have enabled the operators
    return calls


@pytest.mark.parametrize("kind", ["causal", "packed", "left padding"])
@pytest.mark.parametrize("window", [None, 5, 70, 500])
def test_flash_gets_the_rows_of_the_mask(kind, window, flash_calls, monkeypatch):
    monkeypatch.setattr(attention, "find_flash_limits", lambda *tensors: {})  # float32, to compare
    random = np.random.default_rng(0)
    arrays = make_arrays(random, 2, 150, 150, dim=24, value_dim=16)
    ends = None if kind == "causal" else make_ends(random, kind, 2, 150)
    mask = make_mask(ends=None if ends is None else paddle.to_tensor(ends), flash=True)
    found = run(arrays, mask, window=window)
    require_close(found, exact_attention(*arrays, make_seen(150, 150, ends, window), SCALE))
    assert len(flash_calls) == 1 and (flash_calls[0] is None) == (ends is None and window in (None, 500))


def test_why_flash_is_not_used_is_logged_once(flash_calls, capsys, monkeypatch):
    monkeypatch.setattr(console, "_logged", set())
    random = np.random.default_rng(0)
    arrays = make_arrays(random, 1, 9, 9)
    sinks = np.zeros(4, np.float32)
    for _ in range(2):
        run(arrays, make_mask(flash=True), sinks, soft_cap=2.0)
    run(arrays, make_mask(flash=False), sinks, soft_cap=2.0)
    said = [line for line in capsys.readouterr().out.splitlines() if "flash attention" in line]
    reason = "attention with float32 tensors, soft caps, sinks uses Paddle's ops in place of flash attention"
    assert said == [f"oarlock: {reason}"] and not flash_calls


def test_what_flash_does_not_take_is_named():
    def limits(dtype, queries=4, dim=64, value_dim=64):
        query, key, value = (
            paddle.zeros([1, *shape], dtype) for shape in ((queries, 2, dim), (4, 2, dim), (4, 2, value_dim))
        )
        return [name for name, is_so in flash.find_flash_limits(query, key, value).items() if is_so]

    assert limits("bfloat16") == limits("float16", value_dim=32) == []
    assert limits("float32") == ["float32 tensors"]
    assert limits("float16", dim=260) == ["heads of 260"] and limits("float16", dim=20, value_dim=20) == ["heads of 20"]
    assert limits("float16", value_dim=128) == ["heads of values that are larger than those of keys"]
    assert limits("float16", queries=1) == ["keys of earlier tokens"]


class Attending(paddle.nn.Layer):
    """A model of attention alone."""

    def __init__(self, has_sinks, **features):
        super().__init__()
        self.sinks = paddle.to_tensor([0.1, -1.0, 2.0, 0.5]) if has_sinks else None
        self.features = features

    def forward(self, query, key, value, mask):
        """Computes it."""
        mask = make_mask(mask)
        return attend(query, key, value, mask=mask, scale=SCALE, sinks=self.sinks, **self.features)


@pytest.mark.parametrize("features", [(None, None, False), (5, 3.0, True)])
@pytest.mark.parametrize("is_dense", [False, True])
def test_static_graph(tmp_path, features, is_dense):
    """Sizes of batch, queries and keys are not known when it is made."""
    layer = Attending(features[2], window=features[0], soft_cap=features[1])
    layer.eval()
    sizes = [[None, None, heads, dim] for heads, dim in ((4, 16), (2, 16), (2, 8))]
    specs = [paddle.static.InputSpec(size, "float32") for size in sizes]
    specs.append(paddle.static.InputSpec([None, 1, None, None] if is_dense else [None, None], "int64"))
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=specs, full_graph=True), str(tmp_path / "graph"))
    graph, layer = paddle.jit.load(str(tmp_path / "graph")), Attending(features[2], **layer.features)
    for batch, queries, keys in ((1, 1, 1), (2, 7, 7), (3, 20, 20), (2, 3, 9)):
        arrays = make_arrays(np.random.default_rng(1), batch, queries, keys, value_dim=8)
        mask = paddle.ones([batch, keys], "int64")
        mask[1:, : keys // 4] = 0
        mask = (paddle.rand([batch, 1, queries, keys]) < 0.6).astype("int64") if is_dense else mask
        tensors = [*map(paddle.to_tensor, arrays[:3]), mask]
        assert float((graph(*tensors) - layer(*tensors)).abs().max()) <= 1e-6


def test_masks_that_models_get():
    text = paddle.to_tensor([[0, 1, 1], [1, 1, 1]])
    assert make_mask(text).ends.tolist() == [[0, 3, 3], [3, 3, 3]]
    assert make_mask(text.astype("float32")).ends.dtype == paddle.int32
    ends = paddle.to_tensor([[2, 2, 3], [3, 3, 3]], dtype="int32")
    for form in (ends, ends.unsqueeze(1), ends.reshape([2, 1, 3, 1])):
        assert make_mask(ends=form).ends.tolist() == ends.tolist()
    assert make_mask(text, ends).ends.tolist() == [[0, 2, 3], [3, 3, 3]]
    seen = paddle.to_tensor(make_seen(3, 3))
    lowest = paddle.finfo(paddle.float32).min
    for form in (
        seen,
        seen[0],
        seen.astype("int64"),
        paddle.where(seen, 0.0, lowest),
        paddle.where(seen, 0.0, -np.inf),
    ):
        made = make_mask(form)
        assert made.ends is None and made.dense.dtype == paddle.bool and (made.dense == seen).all()
    assert make_mask() == AttentionMask()


def test_refusals():
    query, key, value = (paddle.zeros([2, 5, heads, 8]) for heads in (4, 2, 2))
    mask = AttentionMask()
    ends = paddle.full([2, 4], 4, "int32")
    wrong = {
        "a multiple of the key's; got 3 and 2": (query[:, :, :3], key, value, mask, {}),
        r"key has to be \[2, 5, 2, 8\]; got \[1, 5, 2, 8\]": (query, key[:1], value, mask, {}),
        r"value has to be \[2, 5, 2, 8\]; got \[2, 4, 2, 8\]": (query, key, value[:, 1:], mask, {}),
        "got 5 queries and 3 keys": (query, key[:, :3], value[:, :3], mask, {}),
        r"ends has to be \[2, 5\]; got \[2, 4\]": (query, key, value, AttentionMask(ends), {}),
        r"the mask has to be \[2, 1, 5, 5\]; got \[2, 1, 4, 4\]":
            (query, key, value, make_mask(paddle.ones([2, 4, 4], "bool")), {}),
        "a window has to be at least 1; got 0": (query, key, value, mask, {"window": 0}),
        r"sinks has to be \[4\]; got \[2\]": (query, key, value, mask, {"sinks": paddle.zeros([2])}),
        r"\[batch, tokens, heads, head_dim\]; got \[5, 4, 8\]": (query[0], key, value, mask, {}),
    }  # fmt: skip
    for text, (*tensors, given, features) in wrong.items():
        with pytest.raises(ValueError, match=text):
            attend(*tensors, mask=given, scale=1.0, **features)
    with pytest.raises(ValueError, match="0 or below -1e4"):
        make_mask(paddle.ones([2, 1, 5, 5]))
    with pytest.raises(ValueError, match="only the first together with the ends"):
        make_mask(paddle.ones([2, 5, 5], "bool"), ends)
