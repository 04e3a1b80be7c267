"""transformers reads the configurations that we write, as those that it makes itself."""

from __future__ import annotations

import json
import subprocess

import pytest

from oarlock.families.registry import FAMILIES
from oarlock.model_config.load import make_config
from oarlock.weights.save import save_config
from support.tiny_configs import TINY_CONFIGS

OWN = [name for name, fields in TINY_CONFIGS.items() if FAMILIES[fields["model_type"]].own_config]
# Without effect: notes, and fields that a family's model does not read.
NOTES = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "_name_or_path"}
PEER = """
import json, sys
from pathlib import Path
from transformers import AutoConfig
root = Path(sys.argv[1])
tiny = json.loads((root / "tiny.json").read_text())
pairs = {}
for name, fields in tiny.items():
    written, own = AutoConfig.from_pretrained(root / name), AutoConfig.for_model(**fields)
    pairs[name] = [config.to_dict() for config in (written, own)]
(root / "pairs.json").write_text(json.dumps(pairs))
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, parity_python):
    root = tmp_path_factory.mktemp("written")
    for name in OWN:
        (root / name).mkdir()
        save_config(make_config(TINY_CONFIGS[name], "x"), root / name)
    (root / "tiny.json").write_text(json.dumps({name: TINY_CONFIGS[name] for name in OWN}))
    done = subprocess.run(
        [parity_python, "-c", PEER, str(root)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "pairs.json").read_text())


@pytest.mark.parametrize("name", OWN)
def test_transformers_reads_what_is_written(pairs, name):
    written, own = ({k: v for k, v in content.items() if k not in NOTES} for content in pairs[name])
    assert {key: written.get(key) for key in own} == own
