"""Transformers' mixture-of-experts layers on random weights: python moe_peer.py OUT.npz

OUT holds for every layer KIND the input "KIND/x", the output "KIND/y", the gradients for `upstream` of the output, and
the weights by their names on disk. Knows nothing of oarlock.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import (
    MixtralConfig,
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 8, 3
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
LAYERS = {
    "mixtral": MixtralSparseMoeBlock(MixtralConfig(**SIZES, intermediate_size=INNER, num_local_experts=EXPERTS)),
    "qwen2_moe": Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=INNER, num_experts=EXPERTS, shared_expert_intermediate_size=20,
            norm_topk_prob=False,
        )
    ),
    "qwen3_moe": Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=True)
    ),
    "deepseek_v3": DeepseekV3MoE(
        DeepseekV3Config(
            **SIZES, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, n_shared_experts=2, n_group=4, topk_group=2,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        )
    ),
}  # fmt: skip


def split_experts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One matrix of all experts -> theirs, with the names of files."""
    if name == "experts.gate_up_proj":
        halves = {"gate_proj": tensor[:, : tensor.shape[1] // 2], "up_proj": tensor[:, tensor.shape[1] // 2 :]}
    elif name == "experts.down_proj":
        halves = {"down_proj": tensor}
    else:
        return {name: tensor}
    return {f"experts.{i}.{part}.weight": one[i] for part, one in halves.items() for i in range(len(tensor))}


out: dict[str, np.ndarray] = {}
torch.manual_seed(5)
for kind, layer in LAYERS.items():
    state = layer.state_dict()
    for tensor in state.values():
        tensor.copy_(torch.randn_like(tensor) * 0.3)
    x = torch.randn(3, 7, HIDDEN, requires_grad=True)
    upstream = torch.randn(3, 7, HIDDEN)
    y = layer(x)
    y.backward(upstream)
    arrays = {"x": x, "y": y, "upstream": upstream, "gradient/x": x.grad}
    for name, tensor in state.items():
        arrays |= {f"weight/{part}": one for part, one in split_experts(name, tensor).items()}
    for name, parameter in layer.named_parameters():
        arrays |= {f"gradient/{part}": one for part, one in split_experts(name, parameter.grad).items()}
    # The load balancing loss of this one layer, and its gradient for the router's weights. The last 2 tokens of the
    # first row are padding.
    weight = state["gate.weight"].clone().requires_grad_()
    mask = torch.ones(3, 7)
    mask[0, 5:] = 0
    loss = load_balancing_loss_func((x.detach().reshape(-1, HIDDEN) @ weight.T,), EXPERTS, TOP_K, mask)
    loss.backward()
    arrays |= {"loss": loss, "loss_gradient": weight.grad, "mask": mask}
    out |= {f"{kind}/{name}": tensor.detach().numpy() for name, tensor in arrays.items()}
np.savez(sys.argv[1], **out)
