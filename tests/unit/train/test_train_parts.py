"""Schedules, FLOPs, meters, manifests, checkpoints' choice, weights: the parts of a run."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from helpers import TINY_LLAMA, flags, ordinary, write_checkpoint
from oarlock.config import FinetuneConfig, load_config
from oarlock.config.load import flatten
from oarlock.config.sections import ScheduleSection
from oarlock.environment.cpu import _cgroup_quota, available_cores, thread_share
from oarlock.errors import CheckpointError, ConfigError, ModelError
from oarlock.models.build import build_model, num_parameters, set_parameter
from oarlock.train.checkpoint import resume as checkpoints
from oarlock.train.checkpoint.manifest import list_checkpoints, newest_whole, read_manifest, verify
from oarlock.train.checkpoint.row_file import cut_rows_after
from oarlock.train.optim.clip import GlobalNormClip
from oarlock.train.throughput import peak_flops, token_flops
from oarlock.train.output.folder_guard import reason
from oarlock.train.optim.schedule import check_warmup, make_scheduler, rate_change, warmup_steps
from oarlock.train.run_length import total_steps
from oarlock.weights.weight_folder import WeightFolder

# schedule


def rates(steps: int, **options) -> list[float]:
    scheduler = make_scheduler(ScheduleSection(**options), steps)
    found = []
    for _ in range(steps + 1):
        found.append(scheduler())
        scheduler.step()
    return found


def test_cosine_ends_at_min_learning_rate():
    found = rates(100, learning_rate=1.0, min_learning_rate=0.1, lr_scheduler_type="cosine", warmup_steps=10)
    assert found[0] == 0 and found[10] == pytest.approx(1.0) and found[100] == pytest.approx(0.1)
    assert found[55] == pytest.approx(0.1 + 0.9 * 0.5) and all(a > b for a, b in itertools.pairwise(found[10:]))


def test_linear_and_constant():
    found = rates(10, learning_rate=1.0, lr_scheduler_type="linear", warmup_ratio=0.2)
    assert found[1] == pytest.approx(0.5) and found[6] == pytest.approx(0.5) and found[10] == pytest.approx(0.0)
    assert rates(3, learning_rate=2.0, lr_scheduler_type="constant") == [2.0] * 4
    assert rates(4, learning_rate=1.0, lr_scheduler_type="constant_with_warmup", warmup_steps=2) == [0, 0.5, 1, 1, 1]


@given(samples=st.integers(1, 1000), epochs=st.floats(0.1, 5), batch=st.integers(1, 64), steps=st.integers(0, 20))
def test_every_epoch_is_trained_whole(samples, epochs, batch, steps):
    total = total_steps(ScheduleSection(num_train_epochs=epochs), samples, batch, 0, 0)
    assert (total - 1) * batch < samples * epochs + 1e-3 <= total * batch + 2e-3
    done = min(steps, total)
    assert total_steps(ScheduleSection(num_train_epochs=epochs), samples, batch, done, done * batch) == total
    assert total_steps(ScheduleSection(max_steps=7), samples, batch, 3, 3) == 7


def test_a_share_of_the_steps_is_rounded_up():
    found = [warmup_steps(ScheduleSection(warmup_ratio=0.03), steps) for steps in (1, 33, 34, 100, 101)]
    assert found == [1, 1, 2, 3, 4]
    assert warmup_steps(ScheduleSection(warmup_ratio=0.03, warmup_steps=7), 100) == 7


def test_a_warm_up_without_a_step_after_it(capsys):
    """In steps it is refused, whatever the length of the run comes from; as a share it is said."""
    for steps in (5, 6):
        with pytest.raises(ConfigError, match=f"--warmup_steps 6 leaves no step of this run, which has {steps}"):
            check_warmup(ScheduleSection(warmup_steps=6), steps)
    check_warmup(ScheduleSection(warmup_steps=6), 7)
    check_warmup(ScheduleSection(warmup_steps=6), 5, done=5)  # a run that is complete has nothing to complain of
    with pytest.raises(ConfigError, match="--decay_steps 10 must be above the 20 steps"):
        check_warmup(ScheduleSection(warmup_ratio=0.2, decay_steps=10), 100)
    assert capsys.readouterr().out == ""
    check_warmup(ScheduleSection(warmup_ratio=0.03, learning_rate=2e-4), 1)
    assert "is 1 of this run's 1 step(s): the learning rate never reaches 0.0002" in capsys.readouterr().out


def test_an_extended_run_says_what_its_rate_becomes():
    before = ScheduleSection(learning_rate=1e-3, max_steps=10)
    said = rate_change(replace(before, max_steps=20), 20, vars(before), 10, 10)
    assert said.startswith("the learning rate changes from here: step 11 has 0.0005 in a run of 20 steps, and had 0 in")
    assert "the run of 10 steps" in said
    assert rate_change(before, 10, vars(before), 10, 5) == ""
    flat = replace(before, lr_scheduler_type="constant")
    assert rate_change(flat, 20, vars(flat), 10, 10) == ""
    fixed = replace(before, decay_steps=40)
    assert rate_change(fixed, 20, vars(fixed), 10, 10) == ""
    assert "had 0.0001" in rate_change(before, 10, {"learning_rate": 2e-4, "of a later version": 1}, 10, 5)


# clipping


def test_gradients_that_are_small_enough_are_left_as_they_are():
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


# flops


def test_flops_count_the_models_own_matrices():
    config = LlamaConfig(**TINY_LLAMA)
    model = LlamaForCausalLM(config)
    matrices = sum(int(np.prod(p.shape)) for n, p in model.named_parameters() if len(p.shape) == 2 and "embed" not in n)
    found = token_flops(config, 64)
    assert found.matmul_parameters == matrices
    assert found.training == 6 * matrices + 12 * 2 * 4 * 8 * 64
    assert found.recomputed == pytest.approx(found.training / 3)


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("Some New GPU") is None


# threads


def test_share_of_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "PADDLE_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert thread_share() == available_cores() and thread_share(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert thread_share() == 1
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    assert thread_share() == max(1, available_cores() // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert thread_share() == 5


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 1.5), ("max 100000", None)])
def test_container_quota(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert _cgroup_quota(tmp_path) == expected


def test_training_uses_the_threads(tmp_path):
    """Plain paddle leaves one thread in use; ours gives the process its share."""
    import subprocess
    import sys

    from helpers import LLM

    code = "from oarlock.environment.paddle_import import import_paddle; print(import_paddle(2)); import os; print(os.environ['OMP_NUM_THREADS'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(LLM)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert result.stdout.split() == ["2", "2"] and "OMP_NUM_THREADS" not in result.stderr


# manifests and checkpoints


def make_checkpoint(output: Path, step: int, **changes) -> Path:
    folder = output / f"checkpoint-{step}"
    config = flatten(load_config(FinetuneConfig, ["--do_train"]).config)
    return write_checkpoint(folder, step, samples=step * 8, loss_window=(1.5, 2), config=config, **changes)


def test_a_whole_checkpoint_verifies(tmp_path):
    manifest = verify(make_checkpoint(tmp_path, 5))
    assert manifest.step == 5 and manifest.samples == 40 and manifest.loss_window == (1.5, 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: flip(f / "rank-00000.safetensors"), "checksum differs"),
        (lambda f: (f / "rank-00000.safetensors").write_bytes(b"short"), "has 5 bytes, the manifest says"),
        (lambda f: (f / "rank-00000.safetensors").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "never finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2}'), "format 2, this version reads 3"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, capsys, damage, expected):
    make_checkpoint(tmp_path, 5)
    damage(make_checkpoint(tmp_path, 10))
    with pytest.raises(CheckpointError, match=expected):
        verify(tmp_path / "checkpoint-10")
    folder, manifest = newest_whole(tmp_path)
    assert folder.name == "checkpoint-5" and manifest.step == 5
    assert "checkpoint-10 is not used" in capsys.readouterr().out


def config_for(output: Path, **options) -> FinetuneConfig:
    return load_config(FinetuneConfig, flags(do_train=1, output_dir=output, **options)).config


def test_a_run_of_the_same_configuration_goes_on(tmp_path):
    make_checkpoint(tmp_path, 5)
    point = checkpoints.find_resume_point(config_for(tmp_path, logging_steps=3, per_device_train_batch_size=2), "data")
    assert point.manifest.step == 5
    assert checkpoints.find_resume_point(config_for(tmp_path / "empty"), "data") is None


def test_another_run_is_refused_with_what_differs(tmp_path):
    make_checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError) as error:
        checkpoints.find_resume_point(config_for(tmp_path, learning_rate=1e-2), "other")
    text = str(error.value)
    assert "learning_rate was 5e-05, is 0.01" in text and "the training data changed" in text
    assert "--overwrite_output_dir" in text and "--resume_from_checkpoint" in text


def test_an_explicit_resume_goes_on_all_the_same(tmp_path, capsys):
    folder = make_checkpoint(tmp_path, 5)
    config = config_for(tmp_path / "new", learning_rate=1e-2, resume_from_checkpoint=folder)
    assert checkpoints.find_resume_point(config, "data").folder == folder
    assert "learning_rate was" in capsys.readouterr().out


def test_overwrite_deletes_the_run_only(tmp_path):
    make_checkpoint(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.find_resume_point(config_for(tmp_path, overwrite_output_dir=1), "data") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_evaluation_alone_neither_resumes_nor_deletes(tmp_path):
    make_checkpoint(tmp_path, 5)
    config = load_config(FinetuneConfig, flags(do_eval=1, output_dir=tmp_path, overwrite_output_dir=1)).config
    assert checkpoints.find_resume_point(config, "data") is None
    assert list_checkpoints(tmp_path)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    make_checkpoint(tmp_path, 5)
    for name in (".checkpoint-10.partial", ".checkpoint-2.deleted"):
        (tmp_path / name).mkdir()
    checkpoints.find_resume_point(config_for(tmp_path), "data")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [40, 30]),
        (1, None, [40]),
        (2, "checkpoint-10", [40, 10]),
        (1, "checkpoint-10", [40, 10]),
        (None, None, [40, 30, 20, 10]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    checkpoints.rotate(tmp_path, keep, best)
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == left


def test_reasons_of_a_failed_save(tmp_path):
    assert "no space left on the disk" in reason(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert "no space left" in reason(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert reason(ValueError("odd"), tmp_path) == "odd"


def test_rows_behind_a_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 1')
    cut_rows_after(path, 10)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
    cut_rows_after(path, 0)
    assert path.read_text() == ""


# weights


def save_as_hugging_face(model, folder: Path, shards: int = 1, bf16: bool = False) -> None:
    """The same weights as transformers would write them: [out, in], model.* names, format pt."""
    import ml_dtypes
    from safetensors.numpy import save_file

    tensors = {}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.endswith("proj.weight") or name == "lm_head.weight":
            array = np.ascontiguousarray(array.T)
        tensors[name.replace("llama.", "model.")] = array.astype(ml_dtypes.bfloat16) if bf16 else array
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        part = {n: tensors[n] for n in names[i::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def source(folder: Path, config: LlamaConfig):
    from oarlock.models.build import ModelSource

    return ModelSource(folder, config, from_weights=True)


@pytest.mark.parametrize(
    ("layout", "shards", "bf16"), [("np", 1, False), ("pt", 1, False), ("pt", 3, False), ("pt", 1, True)]
)
def test_weights_load_from_either_layout(tmp_path, layout, shards, bf16):
    config = LlamaConfig(**TINY_LLAMA)
    model = ordinary(LlamaForCausalLM(config))
    if layout == "np":
        model.save_pretrained(str(tmp_path), safe_serialization=True)
    else:
        save_as_hugging_face(model, tmp_path, shards, bf16)
    before = sorted(p.name for p in tmp_path.iterdir())
    loaded = build_model(source(tmp_path, config))
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing is written into the source folder
    for name, value in model.state_dict().items():
        expected = value.numpy()
        if bf16:
            import ml_dtypes

            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(loaded.state_dict()[name].numpy(), expected), name


def test_half_precision_parameters_take_any_array():
    import paddle

    values = np.asarray([[1.5, -2.25]], np.float32)
    for dtype in ("bfloat16", "float16", "float32"):
        parameter = paddle.zeros([1, 2], dtype)
        set_parameter(parameter, values)
        assert parameter.astype("float32").tolist() == values.tolist()
        number = paddle.zeros([], dtype)  # GPT-J keeps its scale so
        set_parameter(number, np.asarray(1.5, np.float32))
        assert number.astype("float32").item() == 1.5


def test_wrong_weight_folders(tmp_path):
    config = LlamaConfig(**TINY_LLAMA)
    with pytest.raises(ModelError, match=r"no model.safetensors"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model_state.pdparams").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickle format that can run code.*--allow_pickle_weights"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a safetensors file, or not all of one"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"names gone.safetensors, which is not there"):
        WeightFolder.open(tmp_path)
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | {"num_hidden_layers": 1}))).save_pretrained(
        str(other), safe_serialization=True
    )
    with pytest.raises(ModelError, match=r"says 2 layers, and the weights beside it have 1"):
        build_model(source(other, config))
    with pytest.raises(ModelError, match=r"vocabulary of 600 .* has 512 rows of 32"):
        build_model(source(other, LlamaConfig(**(TINY_LLAMA | {"num_hidden_layers": 1, "vocab_size": 600}))))


def test_tied_embeddings_count_once():
    model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | {"tie_word_embeddings": True})))
    untied = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    assert num_parameters(untied)[0] - num_parameters(model)[0] == 512 * 32
    assert math.prod(model.lm_head.weight.shape) == 512 * 32


def test_read_manifest_refuses_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_manifest(tmp_path)
