"""The PaddleNLP Trainer with token-weighted loss, exact resume and checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients
from paddlenlp.peft import LoRAModel
from paddlenlp.trainer.trainer_utils import EvalLoopOutput

from oarlock.data.corpus.order import SampleOrder
from oarlock.environment.ranks import rank
from oarlock.errors import TrainingError
from oarlock.families.packing import with_attention
from oarlock.ops.install import hold_scores
from oarlock.parallel.sharded_gradients import ShardedGradients
from oarlock.train.checkpoint import resume as checkpoints
from oarlock.train.checkpoint.local_shards import Held
from oarlock.train.checkpoint.trainer_checkpoints import CheckpointingTrainer
from oarlock.train.clip import GlobalNormClip
from oarlock.train.evaluation.best import BestEvaluation
from oarlock.train.evaluation.evaluate import EvaluationStopped, evaluate_tokens, judge
from oarlock.train.group_sharding import BUCKET_ELEMENTS, wrap_group_sharded
from oarlock.train.intervals import Progress, what_is_due
from oarlock.train.loss import TokenCrossEntropy, trained_tokens
from oarlock.train.pipeline_step import pipeline_step
from oarlock.train.schedule import make_scheduler
from oarlock.train.seeds import seed_step
from oarlock.train.stop_signals import StopRequest
from oarlock.train.throughput import Meter, device_peak
from oarlock.train.weight_decay import apply_decay_param_fun
from oarlock.weights.layout import shared_between_stages

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.parallel.plan import ParallelPlan
    from oarlock.peft.adapter_folder import Base
    from oarlock.peft.method import Method
    from oarlock.train.flops import TokenFlops
    from oarlock.train.reporters.reporters import SampleLog


class OarlockTrainer(CheckpointingTrainer):
    """See the module. Three things differ from the Trainer's own way:

    - the micro-batches of a step are collected first, so that the loss can be divided by the trained tokens of all
      of them; then they are run one after the other;
    - random numbers are seeded anew in every step from (seed, step), so that no generator state has to be kept;
    - the data position is the number of samples consumed (see oarlock.data.corpus.order).
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: ParallelPlan,
        order: SampleOrder | None,
        resume: checkpoints.ResumePoint | None,
        template: ChatTemplate | None,
        flops: TokenFlops | None,
        data_fingerprint: str,
        stop: StopRequest,
        method: Method | None = None,
        base: Base | None = None,
        generation: Mapping[str, Any] | None = None,
        generation_metrics: Callable[[OarlockTrainer], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(criterion=TokenCrossEntropy(split_vocabulary=plan.tensor > 1), **kwargs)
        if plan.sharding_strategy != "parameters":  # takes the head's weight away after its forward
            hold_scores(self.model)
        self.plan, self.method, self.base = plan, method, base
        self.generation = generation or {}
        self.sharded_gradients: ShardedGradients | None = None
        self.held = Held(self)
        if plan.pipeline > 1:
            self.model._loss_fn = [self.criterion]
        self.stop, self.generation_metrics = stop, generation_metrics
        self.config, self.order, self.resume, self.template = config, order, resume, template
        self.data_fingerprint = data_fingerprint
        self.progress = Progress(samples=resume.manifest.samples) if resume else Progress()
        if resume:
            self.progress.owes_evaluation = resume.manifest.owes_evaluation
            loss, self.progress.window_steps = resume.manifest.loss_window
            self.progress.window_loss = math.nan if loss is None else loss
        self.meter = Meter(flops, self.args.world_size, device_peak())
        self.best = BestEvaluation.of(config, resume)
        self._collected: list[dict[str, paddle.Tensor]] = []
        self._collected_tokens = 0
        self._handled_step = -1
        self.samples: SampleLog | None = None
        self._step_lr = 0.0
        self._stopping = False
        self.clip = GlobalNormClip(config.optimizer.max_grad_norm)

    # optimizer

    def create_scheduler(self, num_training_steps: int) -> Any:
        """Warm-up and decay of oarlock.train.schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(self.config.schedule, num_training_steps)
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """AdamW as the Trainer makes it, with a clip that remembers the norm and a decay of our own choice."""
        optimizer = super().create_optimizer(lr_scheduler)
        optimizer._grad_clip = self.clip
        optimizer._apply_decay_param_fun = apply_decay_param_fun(self.model)
        if self.method is not None:  # sharding would deal the frozen ones out too, and send them around every step
            trained = [parameter for parameter in optimizer._parameter_list if not parameter.stop_gradient]
            optimizer._parameter_list = optimizer._param_groups = trained
        return optimizer

    @property
    def _reduces_itself(self) -> bool:
        """Data parallel alone, on a CPU: paddle.DataParallel's reducer is C++ over Paddle's own process groups."""
        return self.args.world_size > 1 and not self.args.use_hybrid_parallel and self.args.device == "cpu"

    def _wrap_model(self, model: nn.Layer, training: bool = True) -> nn.Layer:
        """Fleet's wrappers; see oarlock.train.group_sharding for those that are not the Trainer's."""
        if not training or self._reduces_itself:
            return model
        if not self.args.use_hybrid_parallel:
            return super()._wrap_model(model, training)
        hcg = fleet.get_hybrid_communicate_group()
        self.clip.follow_plan(model, hcg)
        if self.plan.sharding_strategy in ("gradients", "parameters"):
            return wrap_group_sharded(self, model)
        wrapped = super()._wrap_model(model, training)
        if self.plan.sharding_strategy == "gradients_hooked":
            shared = shared_between_stages(model)
            self.sharded_gradients = ShardedGradients(self.optimizer._inner_opt, hcg, BUCKET_ELEMENTS, shared)
        return wrapped

    # a step

    def training_step(self, model: nn.Layer, inputs: dict[str, Any], step_control: int = 0) -> paddle.Tensor:
        """Collect a micro-batch; with the last of a step, run them all. Returns the step's loss, or 0 before."""
        self._collected_tokens += int(inputs.pop("num_tokens").sum())
        self._collected.append(inputs)
        if len(self._collected) < self.args.gradient_accumulation_steps:
            return paddle.zeros([])
        micro_batches, self._collected = self._collected, []
        replicas = max(1, self.args.dataset_world_size)
        trained = sum(trained_tokens(batch["labels"]) for batch in micro_batches)
        *numbers, stopping = self.sum_over_data_ranks([trained, self._collected_tokens, self.stop.requested])
        counts = [round(number) for number in numbers]
        self._stopping = stopping > 0  # SIGTERM may reach the ranks in different steps; they must stop in the same one
        self._collected_tokens = 0
        self._step_lr = float(self.optimizer.get_lr())
        if self._handled_step < 0:
            self.meter.read()  # start-up is no training
            self._handled_step = self.state.global_step
        # Gradients are averaged over data-parallel ranks, so each rank's share is weighed up by their number.
        self.criterion.normalizer = max(1, counts[0]) / replicas
        if self.plan.pipeline > 1 or self._enable_delay_scale_loss():  # Fleet divides by the number of micro-batches
            self.criterion.normalizer /= len(micro_batches)
        self.meter.count(counts[1])
        at = self.plan.coordinates(rank())
        seed_step(self.config.runtime.seed, self.state.global_step, self.args.dataset_rank, at.tensor, at.pipeline)
        model.train()
        if self.plan.pipeline > 1:
            return pipeline_step(self, model, micro_batches)
        loss = paddle.zeros([])
        no_sync = getattr(model, "no_sync", None)
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            local = contextlib.nullcontext() if last or no_sync is None else no_sync()
            with local:
                loss += self._run_micro_batch(model, batch)
        if self._reduces_itself:
            fused_allreduce_gradients(list(model.parameters()), None)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The Trainer's, with the masks of packed rows."""
        return with_attention(super()._prepare_inputs(inputs), self.model)

    def _run_micro_batch(self, model: nn.Layer, batch: dict[str, paddle.Tensor]) -> paddle.Tensor:
        with self.autocast_smart_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        (self.scaler.scale(loss) if self.do_grad_scaling else loss).backward()
        return loss.detach()

    def any_rank_stopping(self) -> bool:
        """Whether SIGTERM came to any rank: all must leave the same loop at the same place."""
        self._stopping = self._stopping or self.sum_over_data_ranks([self.stop.requested])[0] > 0
        return self._stopping

    def pipeline_model(self) -> Any:
        """The model in its PipelineParallel wrapper, for an evaluation without training too."""
        if self.model_wrapped is self.model:  # as the Trainer's _wrap_model does
            stages = self.model.model if isinstance(self.model, LoRAModel) else self.model
            self.model_wrapped = fleet.distributed_model(stages)
            self.model_wrapped._prepare_pipeline_inputs_func = stages._prepare_pipeline_inputs_func
        return self.model_wrapped

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        self._refuse_nan("loss", loss.item(), self.state.global_step + 1)

    def _refuse_nan(self, what: str, value: float, step: int) -> None:
        """Stop before a checkpoint is written. (fp16 skips such steps by itself and lowers the loss scale.)"""
        if not math.isfinite(value) and not self.args.fp16:
            kept = next(iter(checkpoints.list_checkpoints(self.args.output_dir)), None)
            raise TrainingError(
                f"the {what} of step {step} is {value}. Earlier checkpoints are intact"
                + (f" (newest: {kept}). " if kept else " (none was written yet). ")
                + "Usual causes: --learning_rate too high, no warm-up, or a damaged sample; lower the rate and go on "
                "from a checkpoint with --resume_from_checkpoint."
            )

    # logging, evaluation, saving

    def _maybe_log_save_evaluate(
        self, tr_loss: paddle.Tensor, model: nn.Layer, epoch: int, ignore_keys_for_eval: Any, **kwargs: Any
    ) -> None:
        if self._handled_step == self.state.global_step:  # the Trainer calls once more at the end of its epoch
            return
        self._handled_step = self.state.global_step
        # Paddle's CPU kernel gives a finite cross entropy for NaN scores; the gradient tells the truth.
        self._refuse_nan("gradient", self.clip.last_norm(), self.state.global_step)
        before = self.progress.samples
        self.progress.samples += self.global_batch
        self.progress.window_loss += tr_loss.item()
        self.progress.window_steps += 1
        tr_loss.zero_()
        self._decide(before)
        if self.control.should_log:
            self.log(self._log_row())
        metrics: dict[str, float] | None = None
        started = time.perf_counter()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            if self._stopping:
                self.control.should_save = self.control.should_training_stop = True
            else:
                judge(self, metrics)
        if self.control.should_save:
            self._save_checkpoint(model, metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.meter.leave_out(time.perf_counter() - started)

    def _decide(self, samples_before: int) -> None:
        assert self.order is not None
        state, control, epoch_size = self.state, self.control, self.order.num_samples
        samples, stopping = self.progress.samples, self._stopping
        due = what_is_due(
            self.config, state.global_step, state.max_steps, samples_before, samples, epoch_size, stopping
        )
        state.consumed_samples, state.epoch = samples, samples / epoch_size
        control.should_log, control.should_evaluate, control.should_save = due.log, due.evaluate, due.save
        self.progress.owes_evaluation = due.owed
        control.should_training_stop = control.should_training_stop or stopping

    def _log_row(self) -> dict[str, float]:
        row = {
            "loss": self._mean_loss() / self.progress.window_steps,
            "learning_rate": self._step_lr,
            "grad_norm": self.clip.last_norm(),
        }
        self.progress.window_loss, self.progress.window_steps = 0.0, 0
        return row | self.meter.read() | {"samples": self.progress.samples}

    def log(self, logs: dict[str, float], **_: Any) -> None:
        """Hand a row to the callbacks (console, metrics.jsonl, VisualDL)."""
        if "train_runtime" in logs:  # the Trainer's closing summary; its train_loss is wrong after a resume
            return
        self.state.log_history = []
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, but given up without a result when SIGTERM comes."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_evaluate = False
            self.progress.owes_evaluation = True
            return {}

    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **kwargs: Any) -> EvalLoopOutput:
        """See oarlock.train.evaluation.evaluate."""
        return evaluate_tokens(self, dataloader, kwargs.get("metric_key_prefix", "eval"))
