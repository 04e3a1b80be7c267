"""Published model folders: which files hold the weights, their headers and tensors, and what is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from oarlock.errors import ModelError
from oarlock.export.convert import ConvertOptions, convert
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import ask_model
from oarlock.weights.weight_folder import INDEX_NAME, find_weights
from support.model_files import weights


def put(folder: Path, name: str, arrays: dict[str, np.ndarray], layout: str | None = "pt") -> None:
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(arrays, folder / name, metadata={"format": layout} if layout else None)


def cut(arrays: dict[str, np.ndarray], parts: int) -> list[dict[str, np.ndarray]]:
    names = sorted(arrays)
    return [{name: arrays[name] for name in names[i::parts]} for i in range(parts)]


def put_shards(folder: Path, arrays: dict[str, np.ndarray], parts: int, index: bool) -> None:
    weight_map = {}
    for i, part in enumerate(cut(arrays, parts), 1):
        name = f"model-{i:05d}-of-{parts:05d}.safetensors"
        put(folder, name, part)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the parts of a torch.save archive that are visible without unpickling."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"never read")
        for i, values in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", values.tobytes())


# which files


def test_shards_load_with_and_without_an_index(folder):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 3, index=False)
    files, layout = find_weights(folder)
    assert set(files) == set(arrays) and layout == "pt" and len(set(files.values())) == 3
    put_shards(folder, arrays, 3, index=True)
    assert find_weights(folder) == (files, layout)


def test_two_sets_of_weight_files_are_refused_with_both_names(folder):
    arrays = weights(folder)
    put_shards(folder, arrays, 2, index=True)
    with pytest.raises(
        ModelError, match=r"two sets of weights: model.safetensors.index.json \(.*00002-of-00002.* and model.safe"
    ):
        find_weights(folder)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(
        ModelError, match=r"two sets of weights: model.safetensors and model-00001-of-00002.safetensors"
    ):
        find_weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 3, index=False)
    with pytest.raises(ModelError, match=r"two sets of weights: model-00001-of-00002.* and model-00001-of-00003"):
        find_weights(folder)
    for path in folder.glob("model-*-of-00002*"):
        path.unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="is one of 3 files, but 2 exist"):
        find_weights(folder)


def test_a_wrong_index_is_refused(folder):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    put_shards(folder, arrays, 2, index=True)
    content = json.loads((folder / INDEX_NAME).read_text())
    names = sorted(content["weight_map"])

    def changed(**changes) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": content["weight_map"] | changes}))
        find_weights(folder)

    with pytest.raises(ModelError, match="is missing from this file"):
        changed(**{names[0]: content["weight_map"][names[1]]})
    with pytest.raises(ModelError, match=r"the name of a file next to it"):
        changed(**{names[0]: "../model.safetensors"})
    with pytest.raises(ModelError, match=r"names gone.safetensors, which does not exist"):
        changed(**{names[0]: "gone.safetensors"})
    del content["weight_map"][names[0]]
    with pytest.raises(ModelError, match=f"it holds {names[0]}, which .* does not list there"):
        changed()
    changed_arrays = arrays | {names[0]: arrays[names[0]] + 1}
    (folder / INDEX_NAME).unlink()
    put(folder, "model-00002-of-00002.safetensors", {names[0]: changed_arrays[names[0]]})
    with pytest.raises(ModelError, match=f"{names[0]} is in model-00001.* and in model-00002.*no index says which"):
        find_weights(folder)


def test_pickles_next_to_safetensors_are_ignored(folder, capsys):
    arrays = weights(folder)
    put_torch(folder / "pytorch_model.bin", arrays | {"inv_freq": np.zeros(4, "f4")})
    for name in ("consolidated.00.safetensors", "model.fp16.safetensors"):
        put(folder, name, {"tok_embeddings.weight": np.zeros([2, 2], "f4")})
    (folder / "original").mkdir()
    assert set(find_weights(folder)[0].values()) == {folder / "model.safetensors"}
    said = capsys.readouterr().out
    assert "model.safetensors is read; not read: consolidated.00.safetensors, model.fp16.safetensors, original" in said
    assert "pytorch_model.bin" in said
    put_torch(folder / "pytorch_model.bin", arrays | {"lm_head.weight": arrays["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and pytorch_model.bin"):
        find_weights(folder)
    put_torch(folder / "pytorch_model.bin", {name: values.astype("f2") for name, values in arrays.items()})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and pytorch_model.bin"):
        find_weights(folder)
    (folder / "pytorch_model.bin").unlink()
    size = sum(values.nbytes for values in arrays.values())
    (folder / "model_state.pdparams").write_bytes(b"\x80" * (size + 2000))  # only its sizes are visible
    find_weights(folder)
    (folder / "model_state.pdparams").write_bytes(b"\x80" * (3 * size + (4 << 20)))
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and model_state.pdparams"):
        find_weights(folder)


@given(data=st.data())
def test_an_archive_with_other_values_is_detected_by_its_checksums(data, tmp_path_factory):
    from oarlock.weights.pickle_duplicates import find_differing_pickle

    folder = tmp_path_factory.mktemp("twins")
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    random = np.random.default_rng(0)
    arrays = {f"t{i}": random.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    put(folder, "model.safetensors", arrays)
    put_torch(folder / "pytorch_model.bin", arrays)
    files = [folder / "model.safetensors"], [folder / "pytorch_model.bin"]
    assert find_differing_pickle(*files) is None
    name = data.draw(st.sampled_from(sorted(arrays)))
    put_torch(folder / "pytorch_model.bin", arrays | {name: np.nextafter(arrays[name], np.float32(9))})
    assert find_differing_pickle(*files) == "pytorch_model.bin"
    assert zlib.crc32(arrays[name].tobytes()) != 0


def test_a_pickle_of_two_formats_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "model_state.pdparams").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"two sets of weights: model_state.pdparams and pytorch_model.bin"):
        build_model(ModelSource(folder, read_config(folder), True), allow_pickle=True)


def test_a_full_model_next_to_an_adapter_is_refused(folder):
    put(folder, "adapter_model.safetensors", {"x": np.zeros(1, "f4")})
    with pytest.raises(ModelError, match=r"two sets of weights: model.safetensors and adapter_model.safetensors"):
        find_weights(folder)


# headers of other programs


@pytest.mark.parametrize("said", [None, "pt", "mlx"])
def test_supported_layouts(folder, paddle_model, said):
    put(folder, "model.safetensors", weights(folder), said)
    found = build_model(ModelSource(folder, read_config(folder), True)).state_dict()
    wanted = build_model(ModelSource(paddle_model, read_config(paddle_model), True)).state_dict()
    assert all(np.array_equal(found[name].numpy(), value.numpy()) for name, value in wanted.items())


def test_paddle_layout_without_metadata_is_detected_by_names(paddle_model, tmp_path):
    folder = shutil.copytree(paddle_model, tmp_path / "m")
    put(folder, "model.safetensors", weights(folder), None)
    assert find_weights(folder)[1] == "np"
    build_model(ModelSource(folder, read_config(folder), True))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("tf", "another framework .format 'tf'"),
        ("flax", "format 'flax'"),
        ("np", "says format 'np', .* names or shapes of the other"),
    ],
)
def test_invalid_headers_are_refused(folder, said, words):
    put(folder, "model.safetensors", weights(folder), said)
    with pytest.raises(ModelError, match=words):
        find_weights(folder)


def test_integers_and_pointers_are_not_weights(folder):
    arrays = load_file(folder / "model.safetensors")
    name = next(name for name in arrays if name.endswith("down_proj.weight"))
    put(folder, "model.safetensors", {**arrays, name: arrays[name].astype(np.int8)})
    with pytest.raises(ModelError, match=rf"{name} is stored in int8: quantized weights"):
        list(ask_model(str(folder), ["a"], 2))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="a Git LFS pointer"):
        find_weights(folder)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf is not read"):
        find_weights(folder)


def test_files_of_both_layouts_are_refused(folder, paddle_model):
    arrays, own = cut(weights(folder), 2)[0], cut(weights(paddle_model), 2)[1]
    (folder / "model.safetensors").unlink()
    put(folder, "model-00001-of-00002.safetensors", arrays)
    put(folder, "model-00002-of-00002.safetensors", own, "np")
    with pytest.raises(
        ModelError, match=r"00001-of-00002.*00002-of-00002.*Paddle's layout, the other in Hugging Face's"
    ):
        find_weights(folder)


# tensors


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
        ("model.layers.1.self_attn.q_norm.weight", (8,)),
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", (4, 32)),
        ("model.layers.2.mlp.up_proj.weight", (64, 32)),
        ("model.layers.0.self_attn.q_proj.scales", (32, 4)),
        ("score.weight", (2, 32)),
    ],
)
def test_an_unused_tensor_is_refused_by_every_loader(folder, name, shape, tmp_path):
    put(folder, "model.safetensors", weights(folder) | {name: np.ones(shape, "f4")})
    source = ModelSource(folder, read_config(folder), True)
    roads = {
        "training, serving": lambda: build_model(source),
        "ask": lambda: list(ask_model(str(folder), ["a"], 2)),
        "convert": lambda: convert(folder, tmp_path / "out", "paddle", ConvertOptions(proof=False)),
    }
    for road, go in roads.items():
        with pytest.raises(ModelError, match=f"{name}. is left over"):
            go()
        assert not (tmp_path / "out").exists(), road


def test_computed_buffers_are_not_weights(folder):
    arrays = weights(folder)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, "f4") for i in range(2)}
    put(folder, "model.safetensors", arrays | tables)
    model = build_model(ModelSource(folder, read_config(folder), True))
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), arrays["lm_head.weight"].T)


def test_missing_tensors_and_wrong_shapes_are_refused(folder):
    arrays = weights(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    put(folder, "model.safetensors", {key: value for key, value in arrays.items() if key != name})
    with pytest.raises(ModelError, match=r"no weights for 1 of 21 parameters .llama.layers.1.mlp.down_proj.weight"):
        build_model(ModelSource(folder, read_config(folder), True))
    put(folder, "model.safetensors", arrays | {name: arrays[name].T})
    with pytest.raises(ModelError, match=r"down_proj.weight is \[32, 64\], the model expects \[64, 32\]"):
        build_model(ModelSource(folder, read_config(folder), True))


def test_bfloat16_files_with_a_float32_configuration_are_accepted(folder):
    rounded = {name: values.astype(ml_dtypes.bfloat16) for name, values in weights(folder).items()}
    put(folder, "model.safetensors", rounded)
    model = build_model(ModelSource(folder, read_config(folder), True))
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), rounded["lm_head.weight"].astype("float32").T)
