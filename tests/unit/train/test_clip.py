"""Clipping by the global norm."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from oarlock.train.optim.clip import GlobalNormClip

# clipping


def test_small_gradients_are_not_clipped():
    random = np.random.default_rng(0).standard_normal((8, 8)).astype("float32")
    for limit, expected in ((1e-3, 1e-3), (float(np.linalg.norm(random)) * 1.01, None)):
        parameter, gradient = paddle.create_parameter([8, 8], "float32"), paddle.to_tensor(random)
        clip = GlobalNormClip(limit)
        ((_, found),) = clip._dygraph_clip([(parameter, gradient)])
        assert clip.last_norm() == pytest.approx(np.linalg.norm(random), rel=1e-6)
        if expected is None:
            np.testing.assert_array_equal(found.numpy(), random)
        else:
            assert np.linalg.norm(found.numpy()) == pytest.approx(expected, rel=1e-5)
