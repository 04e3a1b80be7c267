"""One rank of a rehearsal: a few real steps on synthetic data, whose weights are compared with a single process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp.trainer import TrainerCallback

from oarlock.config.load import LoadedConfig
from oarlock.config.run_config import RunConfig
from oarlock.data.corpus.order import SampleOrder
from oarlock.data.examples.collate import FinetuneCollator, PackCollator, PretrainCollator
from oarlock.data.examples.labels import IGNORE_INDEX, Example
from oarlock.data.examples.packing import PackedDataset
from oarlock.environment.ranks import rank, world_size
from oarlock.models.build import build_model, find_model
from oarlock.models.packing import check_packing
from oarlock.peft.adapter_folder import read_base_once
from oarlock.peft.method import choose_method
from oarlock.train.checkpoint.local_shards import LocalShards
from oarlock.train.checkpoint.resume import find_resume_point
from oarlock.train.optim.clip import GlobalNormClip
from oarlock.train.run_training import make_trainer, run_training
from oarlock.train.setup import connect_ranks, start_run
from oarlock.train.stop_signals import StopRequest

NUM_SAMPLES = 4096


@dataclass
class RankReport:
    """The results of a rank.

    Attributes:
        steps_before: step of the checkpoint that this run resumed from.
        losses, grad_norms: values of each step.
        eval_loss: evaluation loss after the last step.
        parameter_bytes, gradient_bytes, optimizer_bytes: sizes before the last optimizer step.
        collectives: "operation over group" -> [calls, bytes] of one step.
        difference: largest |weight - reference|.
        first_difference: step and tensor of the first difference above the tolerance.
    """

    steps_before: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    eval_loss: float | None = None
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    collectives: dict[str, list[int]] = field(default_factory=dict)
    difference: float = 0.0
    first_difference: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankReport:
        """Read the report of a rank."""
        return cls(**json.loads((folder / f"rank-{rank}.json").read_text()))

    def write(self, folder: Path) -> None:
        """Write the report of this rank."""
        (folder / f"rank-{rank()}.json").write_text(json.dumps(asdict(self)))


def run_rank(
    config: RunConfig, folder: Path, reference: Path | None, tolerance: float, stop_after: int | None = None
) -> int:
    """Train with the code of a real run; resumes from a checkpoint if there is one.

    Args:
        config: configuration of a small model, for a few steps in float32.
        folder: for the reports.
        reference: folder of the single-process run; None if this is that run.
        tolerance: largest absolute difference of weights.
        stop_after: write a checkpoint after this step and stop, as SIGTERM does.
    """
    run = start_run(LoadedConfig(config))
    config = run.config
    source = find_model(config, from_weights=True)
    tuning, length = config.is_finetuning, config.data.sample_length
    connect_ranks(run, source, config.sequence_length)
    method = choose_method(config.method_section) if config.method_section is not None else None
    base = read_base_once(config.model.model_name_or_path, source.folder) if method is not None else None
    model = build_model(source, run.dtype, False, config.runtime.seed, run.plan.pipeline > 1, method)
    vocab = source.config.vocab_size
    data: Any = RandomExamples(vocab, length) if tuning else RandomText(vocab, length)
    packing = config.data.is_packed
    train_set: Any = data
    collator: Any = PretrainCollator(vocab)
    if tuning:
        collator = (PackCollator if packing else FinetuneCollator)(vocab, 0, run.plan.length_multiple)
    if packing:
        check_packing(source.config)
        train_set = PackedDataset(data, config.data.row_length, config.runtime.seed)
    resume = find_resume_point(config, "made up")
    trainer = make_trainer(
        run,
        model,
        resume,
        method=method,
        base=base,
        order=SampleOrder(len(train_set), config.runtime.seed),
        template=None,
        tokenizer=None,
        flops=None,
        data_fingerprint="made up",
        train_dataset=train_set,
        eval_dataset=FirstSamples(data, 2 * config.batch.per_device_eval_batch_size + 1),
        data_collator=collator,
    )
    report = RankReport(steps_before=resume.manifest.step if resume else 0)
    recorder = _Recorder(report, model, trainer.shards, trainer.clip, folder, reference, tolerance)
    trainer.add_callback(recorder)
    if stop_after is not None:
        trainer.add_callback(_StopAfter(run.stop, stop_after))
    run_training(run, trainer)
    report.write(folder)
    return 0


class RandomText:
    """Random sequences of length + 1 tokens; sample i is the same in every process."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"text": np.random.RandomState(index).randint(0, self.vocab_size, self.length + 1).astype(np.int64)}


class RandomExamples:
    """Random prompts and answers of uneven lengths; prompts are not trained."""

    def __init__(self, vocab_size: int, longest: int) -> None:
        self.vocab_size, self.longest = vocab_size, longest

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Example:
        random = np.random.RandomState(index)
        length = int(random.randint(4, self.longest + 1))
        prompt = int(random.randint(1, length - 1))
        ids = random.randint(0, self.vocab_size, length + 1).tolist()
        return Example(ids[:-1], [IGNORE_INDEX] * prompt + ids[prompt + 1 :], False)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [examples]."""
        return np.asarray([len(self[index].input_ids) for index in range(len(self))], np.int64)


class FirstSamples:
    """The first samples of a dataset."""

    def __init__(self, data: Any, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class _Recorder(TrainerCallback):
    """Records losses, and saves or compares the weights after every step."""

    def __init__(
        self,
        report: RankReport,
        model: Any,
        shards: LocalShards,
        clip: GlobalNormClip,
        folder: Path,
        reference: Path | None,
        tolerance: float,
    ) -> None:
        self.report, self.model, self.shards, self.clip = report, model, shards, clip
        self.folder, self.reference, self.tolerance = folder, reference, tolerance

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._for_each_group(reset=True)

    def on_optimizer_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report.gradient_bytes = 0
        for parameter in self.model.parameters():
            sliced = getattr(parameter, "bw_storage", None)  # GroupShardedStage3
            grad = sliced if sliced is not None else parameter._grad_ivar()
            if grad is not None and grad._is_initialized():
                self.report.gradient_bytes += _count_bytes(grad)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        report = self.report
        self._for_each_group(reset=False)
        report.grad_norms.append(self.clip.last_norm())
        report.parameter_bytes = sum(_count_bytes(shard.data) for shard in self.shards)
        inner = self.shards.optimizer
        tables = [*inner._accumulators.values(), inner._master_weights]
        report.optimizer_bytes = sum(_count_bytes(tensor) for table in tables for tensor in table.values())
        if self.reference is None:
            arrays = {shard.parameter.name: shard.data.numpy() for shard in self.shards}
            np.savez(self.folder / f"step-{state.global_step}.npz", **arrays)
        else:
            self._compare(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.report.losses.append(logs["loss"])
        if logs and "eval_loss" in logs:
            self.report.eval_loss = logs["eval_loss"]

    def _for_each_group(self, *, reset: bool) -> None:
        """Reset the statistics of the process groups, or record them."""
        if world_size() <= 1:
            return
        from oarlock.cpu_ranks import process_group

        self.report.collectives = {}
        for group in process_group.groups():
            if reset:
                group.reset_statistics()
                continue
            for operation, (calls, num_bytes) in group.statistics().items():
                name = f"{operation} over {','.join(map(str, group.ranks))}"
                others = self.report.collectives.get(name, [0, 0])  # several groups may be of the same ranks
                self.report.collectives[name] = [others[0] + calls, others[1] + num_bytes]

    def _compare(self, step: int) -> None:
        assert self.reference is not None
        with np.load(self.reference / f"step-{step}.npz") as expected:
            for shard in self.shards:
                part = shard.parameter.slice.cut(expected[shard.parameter.name])
                if shard.flat is not None:
                    part = np.ascontiguousarray(part).reshape(-1)[shard.flat[0] : shard.flat[1]]
                if not part.size:
                    continue
                difference = float(np.abs(part - shard.data.numpy()).max())
                self.report.difference = max(self.report.difference, difference)
                if not difference <= self.tolerance and self.report.first_difference is None:
                    name = shard.parameter.name
                    self.report.first_difference = {"step": step, "tensor": name, "difference": difference}


class _StopAfter(TrainerCallback):
    """Ends a run after a step, as SIGTERM would."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self.stop, self.step = stop, step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:  # the request is noticed in the step after it
            self.stop.requested = True


def _count_bytes(tensor: paddle.Tensor) -> int:
    return int(tensor._numel() * tensor.element_size())
