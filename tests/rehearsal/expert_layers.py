"""A mixture of experts on 2 and 4 ranks beside the same layer in one process: python expert_layers.py FOLDER."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "llm"))

HIDDEN, EXPERTS, TOKENS = 16, 8, 12
# (ranks, tensor, experts over, sequence parallel)
PLANS = [(2, 1, 2, False), (2, 2, 1, False), (2, 2, 1, True), (4, 1, 2, False), (4, 1, 4, False), (4, 2, 2, True)]


def run_rank(ranks: int, tensor: int, expert: int, sequence: bool, folder: Path) -> int:
    import paddle
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp, ScatterOp

    from oarlock.decoder.moe import MixtureOfExperts
    from oarlock.environment.ranks import rank
    from oarlock.families.architecture import MLP, MoE
    from oarlock.parallel.expert_groups import make_expert_groups
    from oarlock.parallel.plan import ParallelPlan
    from oarlock.train.setup import install_cpu_groups

    paddle.set_device("cpu")
    plan = ParallelPlan(ranks, ranks // tensor, tensor=tensor, expert=expert, sequence_parallel=sequence)
    install_cpu_groups(30.0)
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": plan.data, "mp_degree": tensor}
    fleet.init(is_collective=True, strategy=strategy)
    make_expert_groups(plan)
    at = plan.coordinates(rank())
    alone: dict[str, Any] = {
        "tensor_parallel_degree": 1, "tensor_parallel_rank": 0, "expert_parallel_degree": 1, "expert_parallel_rank": 0,
        "sequence_parallel": False,
    }  # fmt: skip
    split = {
        "tensor_parallel_degree": tensor, "tensor_parallel_rank": at.tensor, "expert_parallel_degree": expert,
        "expert_parallel_rank": plan.expert_rank(rank()), "sequence_parallel": sequence,
    }  # fmt: skip
    spec = MoE(EXPERTS, 2, MLP(24), shared=MLP(8), shared_gate=True)
    for uneven in (False, True):
        paddle.seed(3)
        whole = MixtureOfExperts(spec, HIDDEN, SimpleNamespace(**alone))
        weight = np.random.default_rng(1).standard_normal((HIDDEN, EXPERTS), np.float32)
        if uneven:  # nearly everything goes to the experts of the first rank
            weight[:, 0] += 4.0
        whole.gate.weight.set_value(weight)
        part = MixtureOfExperts(spec, HIDDEN, SimpleNamespace(**split))
        whole_weights = dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            piece = getattr(parameter, "tensor_slice", None)
            values = whole_weights[name].numpy()
            parameter.set_value(np.ascontiguousarray(values if piece is None else piece.cut(values)))
        random = np.random.default_rng(2)
        inputs, upstream = (np.abs(random.standard_normal((plan.data, TOKENS, HIDDEN), np.float32)) for _ in range(2))
        everything = paddle.to_tensor(inputs, stop_gradient=False)
        expected = whole(everything)
        expected.backward(paddle.to_tensor(upstream))
        x = paddle.to_tensor(inputs[at.data], stop_gradient=False)
        out = GatherOp.apply(part(ScatterOp.apply(x))) if sequence else part(x)
        out.backward(paddle.to_tensor(upstream[at.data]))
        np.testing.assert_allclose(out.numpy(), expected[at.data].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x.grad.numpy(), everything.grad[at.data].numpy(), rtol=1e-4, atol=1e-5)
        from oarlock.parallel.expert_groups import find_expert_groups

        groups, hcg = find_expert_groups(), fleet.get_hybrid_communicate_group()
        for name, parameter in part.named_parameters():
            gradient = parameter.grad
            if name.startswith("experts.") and groups is not None:
                if groups.copies is not None:
                    paddle.distributed.all_reduce(gradient, group=groups.copies)
            elif plan.data > 1:
                paddle.distributed.all_reduce(gradient, group=hcg.get_data_parallel_group())
            if sequence and name == "shared_experts_gate.weight":
                paddle.distributed.all_reduce(gradient, group=hcg.get_model_parallel_group())
            piece = getattr(parameter, "tensor_slice", None)
            found = whole_weights[name].grad.numpy()
            found = found if piece is None else piece.cut(found)
            np.testing.assert_allclose(gradient.numpy(), found, rtol=1e-4, atol=1e-4, err_msg=name)
    (folder / f"{ranks}-{tensor}-{expert}-{sequence}-{rank()}").touch()
    return 0


def main(folder: Path) -> int:
    from oarlock.environment.paddle_import import import_paddle

    import_paddle(1)
    import paddlenlp.transformers  # noqa: F401

    import oarlock.decoder.moe
    import oarlock.train.setup  # noqa: F401
    from oarlock.cpu_ranks.fork_launch import launch

    for plan in PLANS:
        codes = launch(plan[0], partial(run_rank, *plan, folder), folder / "log", 100, quiet=True)
        if any(codes):
            print(plan, codes, *(log.read_text()[-3000:] for log in sorted((folder / "log").iterdir())))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
