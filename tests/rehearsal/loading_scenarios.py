"""What the ranks of test_loading.py load, and what they refuse: a function for each scenario, do_NAME(folder, plan, ...)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from loading_checks import PLANS, build, check, configuration, expect_failure, load_and_check, two_nodes
from loading_folders import values, write

FILES = ("paddle", "hugging_face", "shards", "bfloat16")
SCENARIOS = [
    *(f"files/{files}/{plan}" for files in FILES for plan in PLANS),
    *(f"{change}/{plan}" for change in ("tied", "same_heads") for plan in ("tensor", "both")),
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


def do_files(folder: Path, plan: str, form: str) -> None:
    import ml_dtypes

    load_and_check(folder, plan, form, ml_dtypes.bfloat16 if form == "bfloat16" else np.float32)


def do_tied(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "hugging_face", tie_word_embeddings=True)


def do_same_heads(folder: Path, plan: str) -> None:
    load_and_check(folder, plan, "paddle", num_key_value_heads=4)


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
    """Load tensors whose memory NumPy can't access."""
    from unittest import mock

    from oarlock.weights.copy_into_params import ParameterBuffer

    really = ParameterBuffer.__init__

    def without_array(target, tensor):
        really(target, tensor)
        target.array = None

    with mock.patch.object(ParameterBuffer, "__init__", without_array):
        load_and_check(folder, plan, "hugging_face")


def do_random(folder: Path, plan: str, **changes) -> None:
    """The random values are those of one process."""
    from oarlock.model_config.load import find_model_class
    from oarlock.models.init_weights import RandomWeights

    config = configuration(plan, **changes)
    whole = RandomWeights(find_model_class(config), config, seed=11)
    check(build(folder, config, plan, random=True), lambda name, shape: whole.read(name))


def do_random_tied(folder: Path, plan: str) -> None:
    do_random(folder, plan, tie_word_embeddings=True)


def do_virtual_stages(folder: Path, plan: str) -> None:
    config = configuration(plan, num_hidden_layers=8)
    config.virtual_pp_degree = 2
    write(folder, config)
    check(build(folder, config, plan), values)


def family_configuration(family: str, plan: str):
    from support import family_configs

    config = family_configs.configuration(family)
    config.tensor_parallel_degree = 2
    config.tensor_parallel_rank = configuration(plan).tensor_parallel_rank
    config.tensor_parallel_output = False
    return config


def do_family(folder: Path, plan: str, family: str) -> None:
    from oarlock.model_config.load import find_model_class
    from oarlock.models.init_weights import RandomWeights

    config = family_configuration(family, plan)
    whole = RandomWeights(find_model_class(config), config, seed=11)
    check(build(folder, config, plan, random=True), lambda name, shape: whole.read(name), buffers=False)


def do_no_pipeline(folder: Path, plan: str) -> None:
    config = family_configuration("Bloom", plan)
    expect_failure(lambda: build(folder, config, plan, random=True), "no pipeline class for BloomForCausalLM")


def do_as_paddlenlp(folder: Path, plan: str) -> None:
    """PaddleNLP's own loading gives the same weights (it does not know our layout)."""
    from paddlenlp.transformers import LlamaForCausalLM, LlamaForCausalLMPipe

    config = configuration(plan)
    write(folder, config)
    ours = build(folder, config, plan).state_dict()
    theirs_class = LlamaForCausalLMPipe if PLANS[plan][1] else LlamaForCausalLM
    theirs = theirs_class.from_pretrained(str(folder), config=config, dtype="float32").state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name].numpy(), tensor.numpy()), name


def do_two_nodes(folder: Path, plan: str) -> None:
    from oarlock.environment.ranks import rank
    from oarlock.parallel.nodes import find_node

    with two_nodes():
        assert find_node().ranks == ((0, 1) if rank() < 2 else (2, 3))
        load_and_check(folder, plan, "hugging_face")


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


def make_unreadable_at(position: int, readers: tuple[int, ...] = (0,)):
    """Make the tensor at a position unreadable after the check."""
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
    with make_unreadable_at(position):
        expect_failure(lambda: build(folder, config, plan), "the disk is gone")
    check(build(folder, config, plan), values)  # nothing is left in the groups


def do_broken_at_the_end(folder: Path, plan: str) -> None:
    do_broken_on_the_way(folder, plan, -1)


def do_one_of_two_nodes_broken(folder: Path, plan: str) -> None:
    config = configuration(plan)
    write(folder, config)
    with two_nodes(), make_unreadable_at(14, readers=(2,)):  # a tensor of the last stage
        expect_failure(lambda: build(folder, config, plan), "the disk is gone", first=2)
