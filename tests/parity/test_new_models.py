"""transformers loads new models of every family after `oarlock convert`, with the same number of parameters."""

from __future__ import annotations

import json
import subprocess

import pytest

from oarlock import convert_model, new_model
from oarlock.families.published_sizes import read_published_sizes

PARAMETERS = 900_000
PEER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for folder in sorted(Path(sys.argv[1]).glob("*-hf")):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    count = sum(p.numel() for p in model.parameters())
    count += sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    finite = bool(model(torch.arange(8)[None]).logits.isfinite().all())
    found[folder.name] = [count, finite, [sorted(map(str, told[k])) for k in ("missing_keys", "unexpected_keys")]]
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory, parity_python):
    root, ours = tmp_path_factory.mktemp("new"), {}
    for family in read_published_sizes():
        experts = {"experts": 4} if "experts" in str(read_published_sizes()[family][0].fields) else {}
        chosen = new_model(family, PARAMETERS, root / family, vocab_size=512, max_length=64, **experts)
        ours[family] = chosen.parameters
        convert_model(root / family, root / f"{family}-hf", "hf", proof=False)
    done = subprocess.run(
        [parity_python, "-c", PEER, str(root), str(root / "found.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((root / "found.json").read_text())
    return {family: (count, theirs[f"{family}-hf"]) for family, count in ours.items()}


@pytest.mark.parametrize("family", read_published_sizes())
def test_transformers_loads_it_whole(counts, family):
    ours, (theirs, finite, differing) = counts[family]
    assert ours == theirs == pytest.approx(PARAMETERS, rel=0.05)
    assert finite and differing == [[], []]
