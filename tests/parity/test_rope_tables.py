"""Frequencies and tables of rotary embeddings are those of transformers, for every kind of scaling."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.decoder.frequencies import compute_frequencies
from oarlock.decoder.rotary import make_rotary_tables
from oarlock.families.rope import SCALED_ROTARY, read_rope
from oarlock.model_config.load import make_config

LENGTH = "original_max_position_embeddings"
LISTS = {"short_factor": np.linspace(1, 1.3, 8).tolist(), "long_factor": np.linspace(1, 6, 8).tolist()}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5e5},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "rope_theta": 1e6},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 64, "rope_theta": 5e5},
    "yarn": {"factor": 4.0, LENGTH: 32, "rope_theta": 1e6},
    "yarn of all numbers": {
        "factor": 4.0, LENGTH: 32, "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False,
    },
    "yarn with a factor": {"factor": 4.0, LENGTH: 32, "attention_factor": 1.7},
    "longrope": {**LISTS, LENGTH: 32},
    "longrope with factors": {**LISTS, LENGTH: 32, "factor": 3.0, "attention_factor": 1.2},
}  # fmt: skip
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64,
         "vocab_size": 64, "max_position_embeddings": 128}  # fmt: skip
LENGTHS = [16, 100, 200]


def config_of(name: str) -> dict[str, Any]:
    parameters = {"rope_type": name.split()[0], "rope_theta": 1e4, **PARAMETERS[name]}
    return {**SIZES, "model_type": "llama", "rope_parameters": parameters}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, parity_python) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rope")
    job = {name: {"config": config_of(name), "lengths": LENGTHS} for name in PARAMETERS}
    (folder / "job.json").write_text(json.dumps(job))
    peer = Path(__file__).with_name("rope_peer.py")
    command = [parity_python, str(peer), str(folder / "job.json"), str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def test_every_kind_is_compared():
    assert {name.split()[0] for name in PARAMETERS} == SCALED_ROTARY | {"default"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_factor_and_table(theirs, name):
    rope = read_rope(make_config(config_of(name), "x"), 16)
    assert rope.kind == name.split()[0]
    for length, (inverse, factor, cos) in zip(LENGTHS, theirs[name], strict=True):
        ours, our_factor = compute_frequencies(rope, length)
        np.testing.assert_allclose(ours, np.asarray(inverse, np.float32), rtol=4e-7)
        assert our_factor == pytest.approx(factor, abs=1e-12)
        np.testing.assert_allclose(make_rotary_tables(rope, length)[0][-1].numpy(), cos, atol=2e-5)
