"""Weights and random starts on four ranks (tensor 2 x pipeline 2, and smaller plans), from every kind of file.

This file is also the program that the test starts once: it imports Paddle, forks the ranks, and every rank goes through
all scenarios and writes down how each went.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest

LLM = Path(__file__).resolve().parents[2] / "llm"
TESTS = Path(__file__).resolve().parents[1]
RANKS = 4
PLANS = {"plain": (1, False), "tensor": (2, False), "pipeline": (1, True), "both": (2, True)}
FILES = ("paddle", "hugging_face", "shards", "bfloat16")
SCENARIOS = [
    *(f"files/{files}/{plan}" for files in FILES for plan in PLANS),
    *(f"{change}/{plan}" for change in ("tied", "same_heads", "uneven_vocabulary") for plan in ("tensor", "both")),
    *(f"random/{plan}" for plan in PLANS),
    "random_tied/both",
    "virtual_stages/both",
    *(f"family/{family}/tensor" for family in ("Qwen2", "Mixtral", "Gemma", "OPT", "Bloom", "ChatGLM", "ChatGLMv2")),
    *(f"family/{family}/both" for family in ("Qwen2 tied", "Gemma", "ChatGLMv2")),
    "no_pipeline/both",
    "as_paddlenlp/tensor",
    "as_paddlenlp/both",
    "two_nodes/both",
    "half_precision/both",
    "as_on_a_device/plain",
    "as_on_a_device/both",
    "pickle/both",
    "torch_pickle/both",
    "torch_pickle_shards/tensor",
    "missing/both",
    "wrong_shape/both",
    "no_folder/both",
    "pickle_not_allowed/both",
    "broken_on_the_way/plain",
    "broken_on_the_way/both",
    "broken_at_the_end/both",
    "one_of_two_nodes_broken/both",
]
BEFORE_CONNECTING = [
    *("hub/one", "hub/fails", "hub/two_nodes", "hub/gone_folder"),
    *("data/one", "data/two_nodes", "data/wrong", "data/gone"),
]


# The tests.


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    environment = {**os.environ, "PYTHONPATH": f"{LLM}:{TESTS}:{TESTS / 'unit'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", [*BEFORE_CONNECTING, *SCENARIOS])
def test_loading(results, scenario):
    for rank, result in enumerate(results):
        assert result.get(scenario, "not reached") == "", f"rank {rank}: {result.get(scenario)}"


def test_the_reader_reads_and_the_others_do_not(results):
    opened = [result["opened"] for result in results]
    assert opened[0] > 0 and opened[1:] == [0, opened[2], 0]
    assert opened[2] == 2, "only where ranks 2 and 3 were a node of their own"


# The program.


def main(folder: Path) -> int:
    """In the parent: import, fork, wait."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(1)
    import paddlenlp.transformers  # noqa: F401

    from oarlock.cpu_ranks.fork_launch import launch

    set_paddlenlp_log_level("error")
    codes = launch(RANKS, lambda: all_scenarios(folder), folder / "log", timeout_s=200, quiet=True)
    if any(codes):
        for log in sorted((folder / "log").iterdir()):
            print(f"== {log.name}\n{log.read_text()[-2000:]}")
    return int(any(codes))


def all_scenarios(folder: Path) -> int:
    """In a rank."""
    from oarlock.cpu_ranks import process_group
    from oarlock.environment.ranks import rank
    from oarlock.models import build
    from oarlock.parallel.object_collectives import barrier

    process_group.install(60.0)  # as a run does at its start
    result: dict[str, object] = {}
    for scenario in BEFORE_CONNECTING:
        try:
            kind, case = scenario.split("/")
            {"hub": do_hub, "data": do_data}[kind](folder, case)
            result[scenario] = ""
        except BaseException:
            result[scenario] = traceback.format_exc()
    connect()
    opened = 0
    really_open = build._open_source

    def counted(*args):
        nonlocal opened
        opened += 1
        return really_open(*args)

    build._open_source = counted
    for scenario in SCENARIOS:
        kind, *middle, plan = scenario.split("/")
        try:
            globals()[f"do_{kind}"](folder / scenario.replace("/", "-"), plan, *middle)
            result[scenario] = ""
        except BaseException:
            result[scenario] = traceback.format_exc()
        barrier()
    result["opened"] = opened
    (folder / f"rank-{rank()}.json").write_text(json.dumps(result))
    return 0


def connect() -> None:
    import paddle
    import paddle.distributed.fleet as fleet

    from oarlock.cpu_ranks import fleet_patches, process_group

    paddle.set_device("cpu")
    process_group.install(60)
    fleet_patches.install()
    paddle.distributed.init_parallel_env()
    strategy = fleet.DistributedStrategy()
    order = ["dp", "pp", "sharding", "sep", "mp"]
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 2, "sharding_degree": 1, "order": order}
    fleet.init(is_collective=True, strategy=strategy)


def configuration(plan: str, **changes):
    import paddle.distributed.fleet as fleet
    from paddlenlp.transformers import LlamaConfig

    from helpers import TINY_LLAMA

    config = LlamaConfig(**(TINY_LLAMA | changes))
    config.tensor_parallel_degree = PLANS[plan][0]
    if config.tensor_parallel_degree > 1:
        config.tensor_parallel_rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()
        config.tensor_parallel_output = False
    return config


def whole_shapes(config) -> dict[str, tuple[int, ...]]:
    """Of the model on one card."""
    from paddlenlp.transformers import LlamaForCausalLM

    from oarlock.models.init_weights import on_one_card, without_values
    from oarlock.weights.layout import holdings

    with without_values():
        model = LlamaForCausalLM(on_one_card(config))
    return {holding.name: holding.block.shape for holding in holdings(model)}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def write(folder: Path, config, form: str = "paddle", leave_out: str = "", **other_shapes) -> None:
    """A folder of weights, by rank 0."""
    from oarlock.environment.ranks import is_first_rank
    from oarlock.parallel.object_collectives import barrier

    if is_first_rank():
        shapes = {name: shape for name, shape in whole_shapes(config).items() if name != leave_out}
        arrays = {name: values(name, shape) for name, shape in shapes.items()}
        write_arrays(folder, arrays | {n: values(n, s) for n, s in other_shapes.items()}, form)
    barrier()


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], form: str) -> None:
    import ml_dtypes
    import paddle
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    if form in ("hugging_face", "shards", "bfloat16", "torch_pickle", "torch_pickle_shards"):
        turned = {n: np.ascontiguousarray(a.T) if "proj" in n or "lm_head" in n else a for n, a in arrays.items()}
        arrays = {name.replace("llama.", "model."): array for name, array in turned.items()}
    if form == "bfloat16":
        arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    parts = 3 if "shards" in form else 1
    suffix = "bin" if "torch" in form else "safetensors"
    stem = "pytorch_model" if "torch" in form else "model"
    names, weight_map = sorted(arrays), {}
    for i in range(parts):
        part = {name: arrays[name] for name in names[i::parts]}
        file = f"{stem}.{suffix}" if parts == 1 else f"{stem}-{i + 1:05d}-of-{parts:05d}.{suffix}"
        if form == "pickle":
            paddle.save({n: paddle.to_tensor(a) for n, a in part.items()}, str(folder / "model_state.pdparams"))
        elif "torch" in form:
            save_torch(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "np" if form == "paddle" else "pt"})
        weight_map |= dict.fromkeys(part, file)
    if parts > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_torch(arrays: dict[str, np.ndarray], path: Path) -> None:
    """What torch.save writes for a state dict of float32 tensors, without torch."""
    import io
    import pickle
    import types
    import zipfile

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage: ...

    def _rebuild_tensor_v2(*args): ...

    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2

    class Storage:
        def __init__(self, key, size):
            self.key, self.size = key, size

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(s // self.array.itemsize for s in self.array.strides)
            return _rebuild_tensor_v2, (Storage(self.key, self.array.size), 0, self.array.shape, strides, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", FloatStorage, value.key, "cpu", value.size) if isinstance(value, Storage) else None

    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        text = io.BytesIO()
        Pickler(text, 2).dump({name: Tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())})
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", text.getvalue())
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"{path.stem}/data/{i}", array.tobytes())


def build(folder: Path, config, plan: str, dtype: str = "float32", allow_pickle: bool = False, random: bool = False):
    from oarlock.models.build import ModelSource, build_model

    source = ModelSource(folder, config, from_weights=not random)
    return build_model(source, dtype, allow_pickle, seed=11, pipeline=PLANS[plan][1])


def check(model, expected, dtype=np.float32, buffers: bool = True) -> None:
    """Every parameter of this rank is its part of the whole one."""
    from oarlock.weights.layout import holdings

    for holding in holdings(model):
        if not buffers and not hasattr(holding.tensor, "trainable"):
            continue
        found = holding.tensor.astype("float32").numpy()
        part = holding.block.cut(expected(holding.name, holding.block.shape))
        assert np.array_equal(found, part.astype(dtype).astype(np.float32)), holding.name
    assert all(parameter._is_initialized() for parameter in model.parameters())


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())


def load_and_check(folder: Path, plan: str, form: str, dtype=np.float32, allow_pickle=False, **changes) -> None:
    config = configuration(plan, **changes)
    write(folder, config, form)
    before = listing(folder)
    model = build(folder, config, plan, allow_pickle=allow_pickle)
    check(model, values, dtype)
    assert listing(folder) == before, "something was written into the source folder"


def do_files(folder: Path, plan: str, form: str) -> None:
    import ml_dtypes

    load_and_check(folder, plan, form, ml_dtypes.bfloat16 if form == "bfloat16" else np.float32)


def do_tied(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "hugging_face", tie_word_embeddings=True)


def do_same_heads(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "paddle", num_key_value_heads=4)


def do_uneven_vocabulary(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "paddle", vocab_size=511)


def do_pickle(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "pickle", allow_pickle=True)


def do_torch_pickle(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "torch_pickle", allow_pickle=True)


def do_torch_pickle_shards(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "torch_pickle_shards", allow_pickle=True)


def do_half_precision(folder: Path, plan: str) -> None:
    import ml_dtypes

    config = configuration(plan)
    write(folder, config, "hugging_face")
    check(build(folder, config, plan, dtype="bfloat16"), values, ml_dtypes.bfloat16)


def do_as_on_a_device(folder: Path, plan: str) -> None:
    """The road of tensors whose memory NumPy does not see."""
    from unittest import mock

    from oarlock.weights.copy_into_params import Target

    really = Target.__init__

    def without_array(target, tensor):
        really(target, tensor)
        target.array = None

    with mock.patch.object(Target, "__init__", without_array):
        load_and_check(folder, plan, "hugging_face")


def do_random(folder: Path, plan: str, **changes) -> None:
    """The same as what one process draws."""
    from paddlenlp.transformers import LlamaForCausalLM

    from oarlock.models.init_weights import RandomWeights

    config = configuration(plan, **changes)
    whole = RandomWeights(LlamaForCausalLM, config, seed=11)
    check(build(folder, config, plan, random=True), lambda name, shape: whole.read(name))


def do_random_tied(folder: Path, plan: str) -> None:
    do_random(folder, plan, tie_word_embeddings=True)


def do_virtual_stages(folder: Path, plan: str) -> None:
    config = configuration(plan, num_hidden_layers=8)
    config.virtual_pp_degree = 2
    write(folder, config)
    check(build(folder, config, plan), values)


def family_configuration(family: str, plan: str):
    import test_initial

    config = test_initial.configuration(family)
    config.tensor_parallel_degree = 2
    config.tensor_parallel_rank = configuration(plan).tensor_parallel_rank
    config.tensor_parallel_output = False
    return config


def do_family(folder: Path, plan: str, family: str) -> None:
    from oarlock.models.build import model_class
    from oarlock.models.init_weights import RandomWeights

    config = family_configuration(family, plan)
    whole = RandomWeights(model_class(config), config, seed=11)
    check(build(folder, config, plan, random=True), lambda name, shape: whole.read(name), buffers=False)


def do_no_pipeline(folder: Path, plan: str) -> None:
    config = family_configuration("Bloom", plan)
    expect_failure(lambda: build(folder, config, plan, random=True), "no pipeline form of BloomForCausalLM")


def do_as_paddlenlp(folder: Path, plan: str) -> None:
    """PaddleNLP's own loading gives the same (it knows nothing of our layout)."""
    from paddlenlp.transformers import LlamaForCausalLM, LlamaForCausalLMPipe

    config = configuration(plan)
    write(folder, config)
    ours = build(folder, config, plan).state_dict()
    theirs_class = LlamaForCausalLMPipe if PLANS[plan][1] else LlamaForCausalLM
    theirs = theirs_class.from_pretrained(str(folder), config=config, dtype="float32").state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name].numpy(), tensor.numpy()), name


@contextlib.contextmanager
def two_nodes():
    """Two ranks a node, as two launchers on this host would have it."""
    from oarlock.environment.ranks import rank
    from oarlock.parallel.nodes import this_node

    before = os.environ["PADDLE_RANK_IN_NODE"]
    os.environ["PADDLE_RANK_IN_NODE"] = str(rank() % 2)
    this_node.cache_clear()
    try:
        yield
    finally:
        os.environ["PADDLE_RANK_IN_NODE"] = before
        this_node.cache_clear()


def do_two_nodes(folder: Path, plan: str) -> None:
    from oarlock.environment.ranks import rank
    from oarlock.parallel.nodes import this_node

    with two_nodes():
        assert this_node().ranks == ((0, 1) if rank() < 2 else (2, 3))
        load_and_check(folder, plan, "hugging_face")


def expect_failure(action, message: str, first: int = 0) -> None:
    """The first rank that fails tells why, the others stop without a word."""
    from oarlock.environment.ranks import rank
    from oarlock.errors import OarlockError, StoppedWithOthers

    with pytest.raises(OarlockError) as caught:
        action()
    assert isinstance(caught.value, StoppedWithOthers) == (rank() != first)
    assert (message if rank() == first else f"rank {first} ") in str(caught.value)


def do_missing(folder: Path, plan: str) -> None:
    config = configuration(plan)
    write(folder, config, leave_out="llama.layers.1.mlp.up_proj.weight")
    text = "no weights for 1 of 21 parameters (llama.layers.1.mlp.up_proj.weight)"
    expect_failure(lambda: build(folder, config, plan), text)


def do_wrong_shape(folder: Path, plan: str) -> None:
    config = configuration(plan)
    write(folder, config, **{"llama.layers.1.mlp.up_proj.weight": (32, 60)})
    expect_failure(lambda: build(folder, config, plan), "up_proj.weight is [32, 60], the model expects [32, 64]")


def do_no_folder(folder: Path, plan: str) -> None:
    expect_failure(lambda: build(folder, configuration(plan), plan), "no such folder")


def do_pickle_not_allowed(folder: Path, plan: str) -> None:
    config = configuration(plan)
    write(folder, config, "pickle")
    expect_failure(lambda: build(folder, config, plan), "add --allow_pickle_weights")


def break_at(position: int, readers: tuple[int, ...] = (0,)):
    """The tensor at a position can't be read any more after the check."""
    from unittest import mock

    from oarlock.environment.ranks import rank
    from oarlock.errors import ModelError
    from oarlock.weights.sources import SafetensorsSource

    really_read = SafetensorsSource.read

    def read(self, name, into=None):
        if name == list(self.shapes)[position] and rank() in readers:
            raise ModelError(f"{name}: the disk is gone")
        return really_read(self, name, into)

    return mock.patch.object(SafetensorsSource, "read", read)


def do_broken_on_the_way(folder: Path, plan: str, position: int = 7) -> None:
    config = configuration(plan)
    write(folder, config)
    with break_at(position):
        expect_failure(lambda: build(folder, config, plan), "the disk is gone")
    check(build(folder, config, plan), values)  # nothing is left in the groups


def do_broken_at_the_end(folder: Path, plan: str) -> None:
    do_broken_on_the_way(folder, plan, -1)


def do_one_of_two_nodes_broken(folder: Path, plan: str) -> None:
    config = configuration(plan)
    write(folder, config)
    with two_nodes(), break_at(14, readers=(2,)):  # a tensor of the last stage
        expect_failure(lambda: build(folder, config, plan), "the disk is gone", first=2)


def do_hub(folder: Path, case: str) -> None:
    """Names and folders of models, before there are groups."""
    import time
    from unittest import mock

    from oarlock.environment.ranks import rank
    from oarlock.errors import ModelError
    from oarlock.hub import downloads
    from oarlock.hub.model_names import local_folder

    calls = folder / f"calls-{case}"
    cache = folder / f"cache-{case}-{rank() // 2 if case == 'two_nodes' else 0}"

    def fake(name, files):
        if (cache / files[0]).is_file():  # where the others look after the reader
            return cache / files[0]
        with open(calls, "a") as file:
            file.write(f"{rank()} {files[0]}\n")
        time.sleep(0.2)
        if case == "fails":
            raise ModelError("no network here")
        cache.mkdir(exist_ok=True)
        (cache / files[0]).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
        return cache / files[0]

    nodes = two_nodes() if case == "two_nodes" else contextlib.nullcontext()
    with nodes, mock.patch.object(downloads, "fetch", fake), mock.patch.object(downloads, "fetch_all", fake):
        if case == "fails":
            expect_failure(lambda: local_folder("some/model", True), "could not be downloaded (no network here)")
        elif case == "gone_folder":
            expect_failure(lambda: local_folder("./gone", True), "no such folder")
        else:
            assert local_folder("some/model", True) == cache
    if rank() == 0 and case in ("one", "two_nodes"):
        readers = [int(line.split()[0]) for line in calls.read_text().splitlines()]
        assert sorted(readers) == ([0] * 4 if case == "one" else [0] * 4 + [2] * 4)


def do_data(folder: Path, case: str) -> None:
    """Fine-tuning data is tokenised by the first rank of each node; a wrong record stops all and is told by one."""
    from unittest import mock

    from helpers import make_tiny_tokenizer
    from oarlock.config.finetune import FinetuneDataSection
    from oarlock.data.examples import dataset
    from oarlock.data.tokenizers.load import load_tokenizer
    from oarlock.environment.ranks import rank

    place = folder / f"data-{case}"
    records = [{"src": f"q{i}", "tgt": f"a{i}"} for i in range(5)] + [{"src": "q"}] * (case == "wrong")
    text = "\n".join(map(json.dumps, records))
    (place / f"of-{rank()}").mkdir(parents=True)
    (place / f"of-{rank()}" / "train.jsonl").write_text(text)  # the content counts, not the place
    tokenizer = load_tokenizer(str(make_tiny_tokenizer(place / f"of-{rank()}")))
    cache = place / (f"cache-{rank() // 2}" if case == "two_nodes" else "cache")
    section = FinetuneDataSection(dataset_name_or_path=str(place / f"of-{rank()}"), data_cache_dir=str(cache))
    really = dataset._make

    def counted(*arguments):
        (place / f"made-by-{rank()}").touch()
        really(*arguments)

    with (
        two_nodes() if case == "two_nodes" else contextlib.nullcontext(),
        mock.patch.object(dataset, "_make", counted),
    ):
        if case == "gone":
            shutil.rmtree(place / f"of-{rank()}")
            expect_failure(lambda: dataset.load_finetune_data(section, tokenizer), "of-0: neither a file nor a folder")
        elif case == "wrong":
            expect_failure(lambda: dataset.load_finetune_data(section, tokenizer), "of-0/train.jsonl:6: field 'tgt'")
        else:
            train = dataset.load_finetune_data(section, tokenizer).train
            assert len(train) == 5 and train.examples.folder.parent == cache
            assert train.examples.where(4) == f"{place}/of-{rank()}/train.jsonl:5"
    if rank() == 0:
        makers = sorted(path.name for path in place.glob("made-by-*"))
        assert makers == {"two_nodes": ["made-by-0", "made-by-2"], "gone": []}.get(case, ["made-by-0"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
