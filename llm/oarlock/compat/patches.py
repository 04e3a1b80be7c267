"""Everything that Oarlock changes in Paddle and PaddleNLP, in one table.

Written for Paddle 3.3.1 and PaddleNLP 3.0.0b4. tests/rehearsal/test_patches.py walks the table: a test shows that an
entry is needed, or a sentence says why no test on a CPU can. Replacements are defined next to their subject; nothing
here imports Paddle.
"""

from __future__ import annotations

from oarlock.compat.model_patches import MODEL_PATCHES
from oarlock.compat.patch import Machine, Patch

_FLEET = "paddle.distributed.fleet."

# What every process that imports Paddle changes.
_PROCESS = (
    Patch(
        "paddlenlp",
        "oarlock.compat.lazy_imports:_PaddlenlpFinder",
        "also imports a demo server, task pipelines and metrics: 1.8 of 2.5 s, and 160 of 230 MB per process",
        "paddlenlp imports these parts on demand",
        "process",
        "oarlock.compat.lazy_imports",
    ),
    Patch(
        "libphi_core.so:phi::dynload::mklml_dso_handle",
        "oarlock.environment.matmul_library:use_library",
        "Paddle's MKL of 2019 runs its slowest code on processors that are not Intel's",
        "Paddle's wheel brings a newer MKL, or multiplies with oneDNN",
        "process",
        "oarlock.environment.matmul_library",
        Machine.uses_onednn,
    ),
    Patch(
        "glibc:mallopt",
        "oarlock.ops.malloc:keep_freed_memory",
        "freed tensors go back to the system and are faulted in again, ten times as slow as an RMSNorm in them",
        "Paddle's CPU allocator keeps freed memory",
        "process",
        "oarlock.ops.malloc",
        Machine.uses_fused_ops,
    ),
)


def _fleet(target: str, replacement: str, why: str, until: str, *also: str) -> Patch:
    return Patch(
        target,
        f"oarlock.cpu_ranks.{replacement}",
        why,
        until,
        "process",
        "oarlock.cpu_ranks.fleet_patches",
        Machine.is_cpu,
        also=also,
    )


_MP_OPS, _COLLECTIVE = f"{_FLEET}layers.mpu.mp_ops", "paddle.distributed.collective"
_UTILS = f"{_FLEET}utils.hybrid_parallel_util"
# What Fleet's tensor, pipeline and sharding layers lack on a CPU.
_CPU_RANKS = (
    Patch(
        f"{_COLLECTIVE}:_new_process_group_impl",
        "oarlock.cpu_ranks.process_group:new_group",
        "Gloo groups read stale addresses of each other, and lack operations of tensor, pipeline and sharded training",
        "Paddle's Gloo groups work with all of Fleet",
        "process",
        "oarlock.cpu_ranks.process_group",
        Machine.is_cpu,
        also=("paddle.distributed.parallel",),
    ),
    Patch(
        "paddle.base.core:create_or_get_global_tcp_store",
        "oarlock.cpu_ranks.process_group:current_run",
        "rank 0 would listen on every address of the machine",
        "Paddle's store can be bound to one address",
        "process",
        "oarlock.cpu_ranks.process_group",
        Machine.is_cpu,
    ),
    Patch(
        "paddle.distributed.parallel:_global_parallel_env",
        "oarlock.cpu_ranks.fork_launch:launch",
        "forked ranks would take the rank that PaddleNLP read from their parent's environment when it was imported",
        "PaddleNLP does not read the environment at import time",
        "process",
        "oarlock.cpu_ranks.fork_launch",
        Machine.is_cpu,
    ),
    _fleet(
        f"{_UTILS}:broadcast_input_data",
        "fleet_patches:broadcast_input_data",
        "asserts that the device is a GPU, an XPU or a custom one",
        "Paddle drops the assertion",
        f"{_FLEET}meta_parallel.tensor_parallel",
    ),
    _fleet(
        "paddle.distributed.parallel:ParallelEnv._device_id",
        "fleet_patches:DEVICE_ID",
        "is only set in builds for a device, but PipelineLayer reads it",
        "Paddle sets it in CPU builds",
    ),
    _fleet(
        "paddle._C_ops:c_identity",
        "tensor_parallel_ops:identity",
        "has no CPU kernel; mp_ops calls it for an identity whose backward pass is an all-reduce",
        "Paddle has a CPU kernel",
    ),
    _fleet(
        "paddle._legacy_C_ops:c_identity",
        "tensor_parallel_ops:identity",
        "has no CPU kernel; ColumnParallelLinear calls it with enable_mp_async_allreduce",
        "Paddle has a CPU kernel",
    ),
    _fleet(
        "paddle.device.cuda:synchronize",
        "fleet_patches:synchronize",
        "raises in builds without CUDA; Fleet's timers call it (enable_timer)",
        "Paddle's timers support CPUs",
    ),
    _fleet(
        "paddle.device:synchronize",
        "fleet_patches:synchronize",
        "does not support CPUs; PaddleNLP's Trainer calls it (enable_delay_scale_loss)",
        "Paddle's synchronize supports CPUs",
    ),
    *(
        _fleet(
            f"{_MP_OPS}:_c_{operator}",
            f"tensor_parallel_ops:{operator}",
            f"the operator c_{operator} has no CPU kernel",
            "Paddle has a CPU kernel",
            _COLLECTIVE,
        )
        for operator in ("concat", "split", "softmax_with_cross_entropy")
    ),
)


def _sharding(target: str, replacement: str, why: str, wraps: bool = True) -> Patch:
    return Patch(
        target,
        f"oarlock.cpu_ranks.fleet_patches:{replacement}",
        why,
        "Paddle builds GroupShardedStage2 and GroupShardedStage3 on CPUs",
        "while_building",
        "oarlock.cpu_ranks.fleet_patches",
        Machine.is_cpu,
        wraps,
    )


# For the constructors of Fleet's stage 2 and 3 wrappers only.
_GROUP_SHARDING = (
    _sharding("paddle.base.core:is_compiled_with_cuda", "return_true", "they assert a build for GPUs", wraps=False),
    _sharding("paddle:get_device", "numbered_device", "stage 2 reads the number of the device, as in gpu:0"),
    _sharding(
        f"{_FLEET}meta_parallel.sharding.group_sharded_storage:ParamStorage.add_rank_params",
        "add_rank_params_in_place",
        "copies parameters to the device by way of the host, which on a CPU frees them before they are read",
    ),
)


_FUSED_OPS = (
    Patch(
        "paddle.optimizer:AdamW._create_optimization_pass",
        "oarlock.ops.install:replace_adamw",
        "updates one parameter after the other on one thread",
        "always: speed",
        "process",
        "oarlock.ops.install",
        Machine.uses_fused_ops,
        wraps=True,
    ),
)

_CORRECTIONS = (
    Patch(
        "paddle._C_ops:layer_norm",
        "oarlock.ops.corrections:correct_layer_norm",
        "the CPU kernel leaves the weight out of the input's gradient if the weight is frozen",
        "Paddle corrects phi/kernels/cpu/layer_norm_grad_kernel.cc",
        "process",
        "oarlock.ops.corrections",
        Machine.is_cpu,
        wraps=True,
    ),
)

PATCHES: tuple[Patch, ...] = (*_PROCESS, *_CPU_RANKS, *_GROUP_SHARDING, *_FUSED_OPS, *_CORRECTIONS, *MODEL_PATCHES)


def list_patches(module: str, scope: str = "process") -> list[Patch]:
    """The patches of one scope that a module applies."""
    return [patch for patch in PATCHES if patch.installed_by == module and patch.scope == scope]
