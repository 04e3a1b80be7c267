"""An output layer stored in addition to its tied embedding: one matrix if they are equal, two if not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from families import FAMILIES, family_config, family_model
from helpers import logits_of, make_flags, make_tiny_tokenizer
from oarlock.config import FinetuneConfig, load_config
from oarlock.errors import CheckpointError, ModelError
from oarlock.export.convert import ConvertOptions, convert
from oarlock.model_config.load import read_config
from oarlock.model_config.tied_head import has_untied_head
from oarlock.models.build import ModelSource, build_model, count_parameters
from oarlock.models.load_finetuned import load_finetuned
from oarlock.train.finetune import finetune
from oarlock.weights.layout import parameter_shards

BOTH = ("llama", "qwen2", "gemma", "opt")
IDS = [[9, 30, 41, 100, 7, 88], [400, 5, 17, 23, 310, 6]]
HEAD, EMBEDDING = "lm_head.decoder_weight", "opt.embeddings.word_embeddings.weight"


def compute_logits(model) -> np.ndarray:
    return logits_of(model, IDS)


def loaded(folder: Path):
    return build_model(ModelSource(folder, read_config(folder), from_weights=True))


def set_tied(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    """A trained OPT as PaddleNLP saves it: two matrices, and a configuration that does not mention tying."""
    folder = tmp_path_factory.mktemp("opt") / "model"
    family_model("opt", tie_word_embeddings=False).save_pretrained(str(folder), safe_serialization=True)
    set_tied(folder)
    make_tiny_tokenizer(folder)
    return folder


def test_different_matrices_stay_untied_as_in_transformers(tmp_path, parity_python, capsys):
    jobs = []
    for family in BOTH:
        family_model(family, tie_word_embeddings=False).save_pretrained(
            str(tmp_path / "paddle" / family), safe_serialization=True
        )
        convert(tmp_path / "paddle" / family, tmp_path / family, "hf", ConvertOptions(proof=False))
        set_tied(tmp_path / family)
        jobs.append({"folder": str(tmp_path / family), "out": str(tmp_path / f"{family} out"), "ids": IDS})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    peer = Path(__file__).with_name("transformers_peer.py")
    subprocess.run([parity_python, str(peer), str(tmp_path / "jobs.json")], check=True, timeout=300)
    capsys.readouterr()
    for family in BOTH:
        found = compute_logits(loaded(tmp_path / family))
        assert f"{tmp_path / family}: config.json ties the output layer" in capsys.readouterr().out
        np.testing.assert_allclose(found, np.load(tmp_path / f"{family} out.npz")["scores"], atol=1e-4, rtol=0)


def test_paddlenlps_own_opt_keeps_its_output_layer(opt, tmp_path):
    from paddlenlp.transformers import AutoModelForCausalLM

    model = loaded(opt)
    assert np.array_equal(
        compute_logits(model), compute_logits(AutoModelForCausalLM.from_pretrained(str(opt), dtype="float32"))
    )
    assert {HEAD, EMBEDDING} <= {parameter.name for parameter in parameter_shards(model)}
    convert(opt, tmp_path / "there", "hf")
    assert not json.loads((tmp_path / "there" / "config.json").read_text())["tie_word_embeddings"]


def test_equal_matrices_are_tied(opt, tmp_path):
    folder = shutil.copytree(opt, tmp_path / "equal")
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays | {HEAD: arrays[EMBEDDING]}, folder / "model.safetensors", {"format": "np"})
    assert has_untied_head(opt, "opt") and not has_untied_head(folder, "opt") and not has_untied_head(opt, "bloom")
    model = loaded(folder)
    assert model.lm_head.decoder_weight is model.opt.embeddings.word_embeddings.weight
    assert count_parameters(loaded(opt))[0] - count_parameters(model)[0] == arrays[HEAD].size


def test_a_pickled_head_that_differs_is_refused(opt, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(opt / "config.json", folder)
    arrays = load_file(opt / "model.safetensors")
    paddle.save({name: paddle.to_tensor(array) for name, array in arrays.items()}, str(folder / "model_state.pdparams"))
    source = ModelSource(folder, read_config(folder), from_weights=True)
    with pytest.raises(ModelError, match=rf'{HEAD} in the files has other values: set "tie_word_embeddings": false'):
        build_model(source, allow_pickle=True)
    source.config.tie_word_embeddings = False
    assert np.array_equal(compute_logits(build_model(source, allow_pickle=True)), compute_logits(loaded(opt)))


def test_a_tied_opt_stays_tied_in_training_saving_and_inference(tmp_path):
    model = family_model("opt")
    before = model.lm_head.decoder_weight.numpy()
    model.save_pretrained(str(tmp_path / "model"), safe_serialization=True)
    make_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"src": f"{n}", "tgt": "yes"}) for n in range(8)))
    words = make_flags(
        do_train=1, model_name_or_path=tmp_path / "model", dataset_name_or_path=tmp_path / "train.jsonl",
        output_dir=tmp_path / "out", max_steps=2, learning_rate=1e-2, report_to="none", device="cpu", src_length=8,
        tgt_length=8, warmup_ratio=0, per_device_train_batch_size=4,
    )  # fmt: skip
    assert finetune(load_config(FinetuneConfig, words)) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert HEAD not in stored and np.abs(stored[EMBEDDING] - before).max() > 1e-3
    found = compute_logits(load_finetuned(str(tmp_path / "out")).model)
    convert(tmp_path / "out", tmp_path / "there", "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "there" / "model.safetensors")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["tie_word_embeddings"]
    assert np.array_equal(compute_logits(loaded(tmp_path / "there")), found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", BOTH)
def test_the_configuration_decides_tying_of_random_weights(family, tied):
    assert "tie_word_embeddings" not in FAMILIES[family]
    config = family_config(family, tie_word_embeddings=tied)
    model = build_model(ModelSource(Path(family), config, from_weights=False))
    names = [parameter.name for parameter in parameter_shards(model) if "lm_head" in parameter.name]
    assert bool(names) is not tied


def test_a_checkpoint_with_more_weights_than_the_model_is_refused(opt, tmp_path):
    """A checkpoint with an untied output layer, which would be lost."""
    folder = shutil.copytree(opt, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"src": f"{n}", "tgt": "yes"}) for n in range(8)))
    options = {
        "do_train": 1, "model_name_or_path": folder, "dataset_name_or_path": tmp_path / "train.jsonl",
        "output_dir": tmp_path / "out", "save_steps": 1, "report_to": "none", "device": "cpu", "src_length": 8,
        "tgt_length": 8, "per_device_train_batch_size": 4,
    }  # fmt: skip
    assert finetune(load_config(FinetuneConfig, make_flags(**options, max_steps=1))) == 0
    arrays = load_file(folder / "model.safetensors")
    del arrays[HEAD]
    save_file(arrays, folder / "model.safetensors", {"format": "np"})
    with pytest.raises(CheckpointError, match=rf"checkpoint-1: this run's model has no {HEAD};"):
        resumed = {"max_steps": 2, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"}
        finetune(load_config(FinetuneConfig, make_flags(**options, **resumed)))
