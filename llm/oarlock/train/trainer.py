"""The PaddleNLP Trainer with token-weighted loss, exact resume, and checkpoints that are complete or absent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddlenlp.trainer import Trainer
from paddlenlp.trainer.trainer_utils import EvalLoopOutput

from oarlock.data.corpus.order import SampleOrder
from oarlock.data.corpus.sampler import EvaluationBatchSampler, ResumableBatchSampler
from oarlock.decoder.model import defer_logits
from oarlock.environment.ranks import rank
from oarlock.models.packing import adapt_attention_mask
from oarlock.train.checkpoint.load_shards import load_training_state, load_weights
from oarlock.train.checkpoint.local_shards import LocalShards
from oarlock.train.checkpoint.model_files import ModelFiles
from oarlock.train.checkpoint.resume import ResumePoint
from oarlock.train.checkpoint.writer import CheckpointWriter
from oarlock.train.data_loading import make_checked_loader, make_evaluation_sampler, make_training_sampler
from oarlock.train.data_parallel import DataParallelRanks
from oarlock.train.evaluation.best import BestEvaluation, judge_evaluation
from oarlock.train.evaluation.evaluate import EvaluationStopped, ModelLoss, PipelineLoss, evaluate
from oarlock.train.evaluation.prompt_evaluation import PromptEvaluation
from oarlock.train.group_sharding import shard_pipeline_gradients, wrap_group_sharded
from oarlock.train.intervals import Progress, choose_due_actions
from oarlock.train.on_train_begin import CallOnTrainBegin, EndedBeforeFirstStep
from oarlock.train.optim.clip import GlobalNormClip
from oarlock.train.optim.divided_experts import DividedExperts
from oarlock.train.optim.optimizer import configure_optimizer
from oarlock.train.optim.schedule import make_scheduler
from oarlock.train.optim.seeds import seed_step
from oarlock.train.run_length import count_samples_per_step
from oarlock.train.step.expert_balance import ExpertBalance
from oarlock.train.step.finite_check import check_finite
from oarlock.train.step.forward_context import Batch, ForwardContext
from oarlock.train.step.gradient_accumulation import accumulate_gradients
from oarlock.train.step.loss import TokenCrossEntropy, count_trained_tokens
from oarlock.train.step.pipeline_step import run_pipeline_step, wrap_pipeline
from oarlock.train.stop_signals import StopRequest
from oarlock.train.throughput import Meter, TokenFlops, find_device_peak

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.parallel.plan import ParallelPlan
    from oarlock.parallel.sharded_gradients import ShardedGradients


class OarlockTrainer(Trainer):
    """PaddleNLP's Trainer, whose hooks delegate to the modules of oarlock.train.

    Three things differ from PaddleNLP:

    - The micro-batches of a step are collected first, so that the loss can be divided by the trained tokens of all.
    - Random numbers are seeded in every step from (seed, step), so that no generator state has to be kept.
    - The data position is the number of samples consumed (see oarlock.data.corpus.order).
    """

    control: Any  # set by the Trainer, whose types are not known
    lr_scheduler: Any
    optimizer: Any
    model_wrapped: Any

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: ParallelPlan,
        steps: int,
        order: SampleOrder | None,
        resume: ResumePoint | None,
        best: BestEvaluation,
        files: ModelFiles,
        prompts: PromptEvaluation,
        flops: TokenFlops | None,
        data_fingerprint: str,
        stop: StopRequest,
        **kwargs: Any,
    ) -> None:
        super().__init__(criterion=TokenCrossEntropy(split_vocabulary=plan.tensor > 1), **kwargs)
        if plan.sharding_strategy != "parameters":  # frees the output layer's weight after its forward
            defer_logits(self.model)
        if plan.pipeline > 1:
            self.model._loss_fn = [self.criterion]
        self.config, self.plan, self.steps, self.order, self.resume = config, plan, steps, order, resume
        self.stop, self.best, self.files, self.prompts = stop, best, files, prompts
        self.forward_context = ForwardContext(self._prepare_inputs, self.autocast_smart_context_manager)
        self.data_ranks = DataParallelRanks.from_args(self.args)
        self.shards = LocalShards(self.model, plan, trainable_only=files.method is not None)
        self.checkpoints = CheckpointWriter(self.shards, files, config, plan, data_fingerprint)
        self.grad_scaler = self.scaler if self.do_grad_scaling else None  # of fp16 loss scaling
        self.progress = Progress.from_manifest(resume.manifest) if resume else Progress()
        self.meter = Meter(flops, self.args.world_size, find_device_peak())
        self.clip = GlobalNormClip(config.optimizer.max_grad_norm)
        self.expert_balance, self.experts = ExpertBalance(self.model, plan), DividedExperts(self.model, plan)
        self.sharded_gradients: ShardedGradients | None = None  # stage 2 under a pipeline
        self._micro_batches: list[Batch] = []
        self._handled_step, self._step_lr, self._stopping = -1, 0.0, False
        if config.evaluation.do_eval:
            self.add_callback(CallOnTrainBegin(self._evaluate_before_training))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. There are no steps if the evaluation before training ends the run."""
        try:
            return super().train(*args, **kwargs)
        except EndedBeforeFirstStep:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None

    # optimizer and wrappers

    def create_scheduler(self, num_training_steps: int) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(self.config.schedule, num_training_steps)
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """The Trainer's AdamW, with settings of oarlock.train.optim.optimizer."""
        optimizer, adapter = super().create_optimizer(lr_scheduler), self.files.method is not None
        return configure_optimizer(optimizer, self.model, self.clip, trainable_only=adapter)

    def _wrap_model(self, model: nn.Layer, training: bool = True) -> nn.Layer:
        wrapped = model
        if training and not self.data_ranks.reduces_gradients:
            if self.args.use_hybrid_parallel:
                self.clip.follow_plan(model, fleet.get_hybrid_communicate_group())
            if self.plan.sharding_strategy in ("gradients", "parameters"):
                wrapped, self.optimizer = wrap_group_sharded(model, self.optimizer, self.plan, self.config)
            else:
                wrapped = super()._wrap_model(model)
                self.experts.leave_out_of(self.optimizer)
            if self.plan.sharding_strategy == "gradients_hooked":
                self.sharded_gradients = shard_pipeline_gradients(model, self.optimizer)
        self.shards.bind(wrapped, self.optimizer)
        return wrapped

    # data

    def get_train_dataloader(self) -> Any:
        return make_checked_loader(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return make_checked_loader(super().get_eval_dataloader(eval_dataset))

    def _get_train_sampler(self) -> ResumableBatchSampler:
        assert self.order is not None
        done = self.resume.manifest.step if self.resume else 0
        return make_training_sampler(self.order, self.args, self.data_ranks, self.progress.samples, done, self.steps)

    def _get_eval_sampler(self, eval_dataset: Any) -> EvaluationBatchSampler:
        batch_size, limit = self.args.per_device_eval_batch_size, self.args.max_evaluate_steps
        return make_evaluation_sampler(eval_dataset, batch_size, limit, self.data_ranks)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return adapt_attention_mask(super()._prepare_inputs(inputs), self.model)

    # a step

    def training_step(self, model: nn.Layer, inputs: Batch, step_control: int = 0) -> paddle.Tensor:
        """Collect a micro-batch. The last one of a step runs them all, and returns the loss; the others return 0."""
        self._micro_batches.append(inputs)
        if len(self._micro_batches) < self.args.gradient_accumulation_steps:
            return paddle.zeros([])
        micro_batches, self._micro_batches = self._micro_batches, []
        # Agree with all ranks on the loss normalizer and on stopping, and seed the generators.
        lengths = [batch.pop("num_tokens") for batch in micro_batches]
        tokens = sum(int(of_batch.sum()) for of_batch in lengths)
        trained = sum(count_trained_tokens(batch["labels"]) for batch in micro_batches)
        *numbers, stopping = self.data_ranks.sum([trained, tokens, self.stop.requested])
        trained, tokens = (round(number) for number in numbers)
        self._stopping = stopping > 0  # SIGTERM may reach ranks in different steps; they must stop together
        self._step_lr = float(self.optimizer.get_lr())
        # Gradients are averaged over data-parallel ranks, so each rank's share is weighted by their number.
        self.criterion.normalizer = max(1, trained) / self.data_ranks.replicas
        if self.plan.pipeline > 1 or self._enable_delay_scale_loss():  # Fleet divides by the number of micro-batches
            self.criterion.normalizer /= len(micro_batches)
        scaler, delayed = self.grad_scaler, self._enable_delay_scale_loss()
        self.expert_balance.begin_step(micro_batches, lengths, tokens / self.data_ranks.replicas, scaler, delayed)
        self.meter.count(tokens)
        at = self.plan.coordinates(rank())
        seed_step(self.config.runtime.seed, self.state.global_step, self.data_ranks.replica, at.tensor, at.pipeline)
        model.train()
        if self.plan.pipeline > 1:
            schedule, scaler = self.lr_scheduler, self.grad_scaler
            loss = run_pipeline_step(model, micro_batches, self.forward_context, self.optimizer, schedule, scaler)
        else:
            loss = accumulate_gradients(model, micro_batches, self._forward_backward)
        if self.sharded_gradients is not None:
            self.sharded_gradients.finish()
        self.data_ranks.reduce_gradients(model)
        self.experts.reduce_gradients()
        return loss

    def _forward_backward(self, model: nn.Layer, batch: Batch) -> paddle.Tensor:
        with self.autocast_smart_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return loss.detach()

    def _any_rank_stopping(self) -> bool:
        """True on all ranks if SIGTERM came to any of them, so that they leave a loop together."""
        self._stopping = self._stopping or self.data_ranks.sum([self.stop.requested])[0] > 0
        return self._stopping

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        check_finite("loss", loss.item(), self.state.global_step + 1, self.args)

    # logging and evaluation

    def _maybe_log_save_evaluate(
        self, tr_loss: paddle.Tensor, model: nn.Layer, epoch: int, ignore_keys_for_eval: Any, **kwargs: Any
    ) -> None:
        if self._handled_step == self.state.global_step:  # the Trainer calls once more at the end of an epoch
            return
        self._handled_step = self.state.global_step
        # Paddle's CPU kernel returns a finite cross entropy for NaN logits, but the gradient is NaN.
        check_finite("gradient", self.clip.last_norm(), self.state.global_step, self.args)
        assert self.order is not None
        state, progress, before, epoch = self.state, self.progress, self.progress.samples, self.order.num_samples
        progress.samples += count_samples_per_step(self.args)
        progress.window_loss += tr_loss.item()
        progress.window_steps += 1
        tr_loss.zero_()
        state.consumed_samples, state.epoch = progress.samples, progress.samples / epoch
        due = choose_due_actions(
            self.config, state.global_step, state.max_steps, before, progress.samples, epoch, self._stopping
        )
        due.apply(self.control)
        progress.owes_evaluation = due.owed
        self.control.should_training_stop = self.control.should_training_stop or self._stopping
        if self.control.should_log:
            loss = self.data_ranks.mean(self.progress.window_loss) / self.progress.window_steps
            row = {"loss": loss, "learning_rate": self._step_lr, "grad_norm": self.clip.last_norm()}
            self.progress.window_loss, self.progress.window_steps = 0.0, 0
            self.log(row | self.expert_balance.read() | self.meter.read() | {"samples": self.progress.samples})
        started = time.perf_counter()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            if self._stopping:
                self.control.should_save = self.control.should_training_stop = True
            else:
                judge_evaluation(self.best, metrics, self.state, self.control, self.config)
        if self.control.should_save:
            self._save_checkpoint(model)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.meter.exclude(time.perf_counter() - started)

    def log(self, logs: dict[str, float], **_: Any) -> None:
        """Hand a row to the callbacks (console, metrics.jsonl, VisualDL)."""
        if "train_runtime" in logs:  # the Trainer's summary, whose train_loss is wrong after a resume
            return
        self.state.log_history = []
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the result is empty if SIGTERM interrupts the evaluation."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_evaluate = False
            self.progress.owes_evaluation = True
            return {}

    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **kwargs: Any) -> EvalLoopOutput:
        """Compute the held-out loss, and answer the prompts."""
        self.callback_handler.eval_dataloader = dataloader
        pipeline = None
        if self.plan.pipeline > 1:
            if self.model_wrapped is self.model:  # an evaluation without training
                self.model_wrapped = wrap_pipeline(self.model)
            pipeline = self.model_wrapped
        kind, model = (ModelLoss, self.model) if pipeline is None else (PipelineLoss, pipeline)
        loss = kind(model, self.criterion, self.forward_context)
        stop, on_batch = self._any_rank_stopping, self._on_prediction_step
        metrics, samples = evaluate(loss, dataloader, reduce=self.data_ranks.sum, should_stop=stop, on_batch=on_batch)
        metrics |= self.prompts.run(self.model, pipeline, self.state.global_step, self.state.epoch or 0.0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)

    def _on_prediction_step(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _evaluate_before_training(self) -> None:
        """Run the evaluation of --eval_on_start, or in a resumed run the one that SIGTERM interrupted."""
        if self.state.global_step == 0:
            if self.config.evaluation.eval_on_start:
                self.evaluate()
        elif self.progress.owes_evaluation:
            metrics = self.evaluate()
            if metrics:
                self.progress.owes_evaluation = False
                judge_evaluation(self.best, metrics, self.state, self.control, self.config)
                self._save_checkpoint(self.model)  # replaces the one that owes the evaluation
            if not metrics or self.control.should_training_stop:
                raise EndedBeforeFirstStep

    # checkpoints

    def _save_checkpoint(self, model: nn.Layer, metrics: dict[str, float] | None = None) -> None:
        loss, best = self.data_ranks.mean(self.progress.window_loss), self.best.state()
        self.checkpoints.save(self.state, self.progress, loss, self.lr_scheduler, self.grad_scaler, best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        if self.resume:
            load_weights(self.shards, self.resume.folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resume:
            load_training_state(self.shards, self.resume, self.lr_scheduler, self.grad_scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: every step seeds its own random numbers."""
