"""The embedded tasks, text and tokenizer, and tokenizer folders."""

from __future__ import annotations

import json

import pytest

from oarlock.data.embedded.instructions import TASKS, make_instruction_records
from oarlock.data.embedded.stdlib_text import MIN_BYTES, find_stdlib_sources
from oarlock.data.embedded.tokenizer import EOS
from oarlock.data.tokenizers.load import load_encoder, load_tokenizer
from oarlock.errors import ModelError

# the embedded default


def test_embedded_tasks_have_one_answer_and_disjoint_splits():
    train, dev = make_instruction_records("train"), make_instruction_records("dev")
    assert len(TASKS) >= 8 and {r["task"] for r in train} == {r["task"] for r in dev} == {t.name for t in TASKS}
    prompts = [{(r["instruction"], r["input"]) for r in side} for side in (train, dev)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) == len(train) and len(prompts[1]) == len(dev)
    answers = [r["output"] for r in train + dev]
    assert any(a.isascii() for a in answers) and any(not a.isascii() for a in answers)
    assert make_instruction_records("train") == train


def test_embedded_text_is_large_and_real():
    sources = find_stdlib_sources()
    assert sum(source.size for source in sources) >= MIN_BYTES
    assert any(source.path.name == "argparse.py" for source in sources)


def test_auto_tokenizer_loads_the_embedded_tokenizer(tiny_tokenizer):
    from paddlenlp.transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    text = "Repeat the words.\n星期一"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == load_encoder(str(tiny_tokenizer)).encode([text])[0].tolist()
    assert tokenizer.eos_token == EOS


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "SomethingNewTokenizerFast", None])
def test_common_tokenizer_folders_load(tiny_tokenizer, tmp_path, name):
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    config |= {"tokenizer_class": name} if name else {}
    for file in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / file).write_bytes((tiny_tokenizer / file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = "Repeat the words."
    expected = load_encoder(str(tiny_tokenizer)).encode([text])[0].tolist()
    assert load_tokenizer(str(tmp_path))(text, add_special_tokens=False)["input_ids"] == expected


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))
