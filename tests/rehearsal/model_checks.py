"""Dropout under tensor parallel and tied embeddings under a pipeline, on two ranks."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddle.distributed.fleet.recompute import recompute
from paddle.nn import functional as F
from paddlenlp.transformers import LlamaConfig, Qwen2Config
from paddlenlp.transformers.llama.modeling import LlamaLMHead
from paddlenlp.transformers.qwen2.modeling import Qwen2LMHead

from oarlock.decoder.model import defer_logits
from oarlock.environment.ranks import rank
from oarlock.ops import install, library
from oarlock.ops.linear_cross_entropy import DeferredLogits
from oarlock.parallel.object_collectives import all_gather_objects
from oarlock.train.optim.seeds import reseed_tracker, seed_step
from oarlock.train.step.loss import TokenCrossEntropy
from oarlock.weights.layout import shared_between_stages

NAMES = ("global_seed", "local_seed", "model_parallel_rng")


def draw(name: str = "") -> list[float]:
    """Draw from one of the tracker's generators, or from the default one."""
    with get_rng_state_tracker().rng_state(name) if name else contextlib.nullcontext():
        return paddle.rand([8]).tolist()


def tracker() -> None:
    """Its states exist and differ from each other and from the default one."""
    from paddlenlp.trainer.trainer_utils import set_seed

    set_seed(42)
    assert set(get_rng_state_tracker().states_) == set(NAMES)
    first, second = ({name: draw(name) for name in ("", *NAMES)} for _ in range(2))
    assert all(first[name] != second[name] for name in first)
    theirs = all_gather_objects(first)
    assert theirs[0][""] == theirs[1][""] and theirs[0]["global_seed"] == theirs[1]["global_seed"]
    assert theirs[0]["local_seed"] != theirs[1]["local_seed"]


def block(x, weight):
    """Dropout from three generators, as in sharded and replicated layers."""
    x = F.dropout(x, 0.3)
    with get_rng_state_tracker().rng_state("local_seed"):
        x = x * F.dropout(weight, 0.3)
    with get_rng_state_tracker().rng_state("global_seed"):
        return F.dropout(x, 0.3) + x


def recompute_draws_the_same_masks() -> None:
    def run(function) -> list[np.ndarray]:
        seed_step(1, 2)
        reseed_tracker(1, 2, tensor_rank=rank())
        x, weight = (paddle.full([400], value, "float32") for value in (1.0, 2.0))
        x.stop_gradient = weight.stop_gradient = False
        y = x
        for _ in range(3):
            y = function(block, y + 1, weight)
        y.sum().backward()
        return [y.numpy(), x.grad.numpy(), weight.grad.numpy(), *(np.array(draw(name)) for name in ("", *NAMES))]

    expected = run(lambda function, *inputs: function(*inputs))
    assert 0 < np.count_nonzero(expected[0] == 0) < 400
    for reentrant in (True, False):
        found = run(lambda function, *inputs, how=reentrant: recompute(function, *inputs, use_reentrant=how))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def reseeded_tracker() -> None:
    """A step draws the same numbers again, whatever was drawn before; see reseed_tracker."""

    def numbers(**where: int) -> dict[str, list[float]]:
        reseed_tracker(**({"seed": 1, "step": 5, "tensor_rank": rank()} | where))
        return {name: draw(name) for name in NAMES}

    first = numbers()
    assert numbers() == first
    for other in ({"step": 6}, {"seed": 2}, {"data_rank": 1}, {"pipeline_rank": 1}):
        assert not any(value == first[name] for name, value in numbers(**other).items()), other
    theirs = all_gather_objects(first)
    assert theirs[0]["global_seed"] == theirs[1]["global_seed"]
    assert theirs[0]["local_seed"] != theirs[1]["local_seed"]
    assert len({str(value) for value in first.values()}) == len(NAMES)
    seed_step(1, 5)
    expected = draw()
    seed_step(1, 5)
    numbers()
    assert draw() == expected  # the default one is unchanged


def tied_embeddings_on_two_stages() -> None:
    """Fleet does not mark them; Oarlock recognises them."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLMPipe
    from patched_layers import split

    from helpers import TINY_LLAMA

    split(pp_degree=2)
    model = LlamaForCausalLMPipe(LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True))
    marked = [p.name for p in model.parameters() if hasattr(p, "is_firstly_shared")]
    assert not marked, "Paddle marks shared parameters now: use is_firstly_shared in place of shared_between_stages"
    shared = [p for p in model.parameters() if p.shape == [TINY_LLAMA["vocab_size"], TINY_LLAMA["hidden_size"]]]
    assert len(shared) == 1
    assert shared_between_stages(model) == {shared[0].name: rank() == 0}
    assert shared_between_stages(LlamaForCausalLMPipe(LlamaConfig(**TINY_LLAMA))) == {}


def split_heads() -> None:
    """A marked head leaves its product to the loss; loss and gradients equal those of ParallelCrossEntropy."""
    if library.why_missing():
        return
    random = np.random.default_rng(4)
    values, labels = random.standard_normal((2, 6, 8), "float32"), paddle.to_tensor(random.integers(0, 16, (2, 6)))
    heads = ((LlamaLMHead, LlamaConfig), (Qwen2LMHead, Qwen2Config))
    for (head, config), sequence_parallel in itertools.product(heads, (False, True)):
        model = head(config(
            vocab_size=16, hidden_size=8, tensor_parallel_degree=2, tensor_parallel_output=True, seq_length=6,
            sequence_parallel=sequence_parallel,
        ))  # fmt: skip
        rows = values.reshape(-1, 8)[rank() * 6 : rank() * 6 + 6] if sequence_parallel else values
        results = []
        for is_fused in (False, True):
            install.use(is_fused)
            defer_logits(model)
            hidden = paddle.to_tensor(rows, stop_gradient=False)
            criterion = TokenCrossEntropy(split_vocabulary=True)
            criterion.normalizer = 5
            model.clear_gradients()
            output = model(hidden)
            assert isinstance(output, DeferredLogits) == is_fused
            loss = criterion(output, labels)
            loss.backward()
            results.append([loss.item(), hidden.grad.numpy(), model.weight.grad.numpy()])
            assert model(hidden, tensor_parallel_output=False).shape == [2, 6, 16]
            with paddle.no_grad():
                assert model(hidden).shape == [2, 6, 8]
        install.use(False)
        for plain, found in zip(*results, strict=True):
            np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
