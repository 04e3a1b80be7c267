"""Options that both entrypoints have, in typed sections. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.config.options import at_least, between, degree, more_than, option
from oarlock.families.registry import FAMILIES


@dataclass(frozen=True)
class ModelSection:
    """The model"""

    model_name_or_path: str = option("facebook/llama-7b")
    """A built-in or hub name, or a folder with config.json and safetensors weights."""

    tokenizer_name_or_path: str | None = option(None)
    """The tokenizer, where it is not the model's own."""

    model_type: str | None = option(None, choices=tuple(FAMILIES))
    """The family; checked against the model's config.json, needed only where that names none."""

    allow_pickle_weights: bool = option(False, may_change=True)
    """Also read *.pdparams and pytorch_model.bin, which can run code when opened. Only for files you trust."""


@dataclass(frozen=True)
class KernelSection:
    """Kernels and memory"""

    use_flash_attention: bool = option(False, may_change=True)
    """Flash attention (an A100-class card or newer; elsewhere the plain attention is used, and the log says so)."""

    use_fused_rms_norm: bool = option(False, may_change=True)
    """The fused RMSNorm (of custom_ops/, built by scripts/setup.sh; without it the plain one, said once)."""

    fused_ops: bool = option(True, may_change=True)
    """On a CPU: the fused operators of custom_ops/ in place of Paddle's own, where they are built (the same losses)."""

    recompute: bool = option(False, may_change=True)
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""

    recompute_granularity: str = option("full", choices=("full", "full_attn", "core_attn"), may_change=True)
    """What recompute covers: whole layers, attention blocks, or the core of attention."""


@dataclass(frozen=True)
class BatchSection:
    """Batch"""

    per_device_train_batch_size: int = option(8, at_least(1), unit="samples", may_change=True)
    """Samples in one forward pass on one data-parallel rank."""

    per_device_eval_batch_size: int = option(8, at_least(1), unit="samples", may_change=True)
    """The same in evaluation."""

    gradient_accumulation_steps: int = option(1, at_least(1), may_change=True)
    """Micro-batches per step; the real batch is per_device_train_batch_size x this x data-parallel ranks."""

    dataloader_num_workers: int = option(0, at_least(0), may_change=True)
    """Processes that load data beside each rank; 0 loads in the rank itself."""


@dataclass(frozen=True)
class ScheduleSection:
    """How long, and the learning rate"""

    num_train_epochs: float = option(1.0, more_than(0), unit="epochs")
    """Passes over the training data; may be a fraction. The last step is filled up from the next pass. max_steps goes
    first."""

    max_steps: int = option(-1, unit="steps")
    """Optimizer steps; above 0 it overrides num_train_epochs."""

    learning_rate: float = option(5e-5, more_than(0))
    """Highest learning rate, reached after the warm-up."""

    min_learning_rate: float = option(0.0, at_least(0))
    """Where cosine and linear schedules end."""

    lr_scheduler_type: str = option("linear", choices=("linear", "cosine", "constant", "constant_with_warmup"))
    """Shape of the learning rate after the warm-up. constant warms up too where a warm-up is given."""

    warmup_steps: int = option(0, at_least(0), unit="steps")
    """Linear rise from 0; above 0 it overrides warmup_ratio."""

    warmup_ratio: float = option(0.0, between(0, 1))
    """The same as a share of all steps, rounded up."""

    decay_steps: int | None = option(None, at_least(1), unit="steps")
    """Steps until min_learning_rate is reached; default: all steps."""


@dataclass(frozen=True)
class OptimizerSection:
    """Optimizer (AdamW)"""

    weight_decay: float = option(0.0, at_least(0))
    """Decoupled weight decay; not applied to biases and norms."""

    max_grad_norm: float = option(1.0, at_least(0))
    """Gradients are clipped to this global norm; 0 switches clipping off."""

    adam_beta1: float = option(0.9, between(0, 1))
    """Decay of the first moment."""

    adam_beta2: float = option(0.999, between(0, 1))
    """Decay of the second moment."""

    adam_epsilon: float = option(1e-8, more_than(0))
    """Added to the denominator."""


@dataclass(frozen=True)
class PrecisionSection:
    """Precision"""

    fp16: bool = option(False, may_change=True)
    """Train in float16 with loss scaling (GPU; on a CPU float32 is used, and the log says so)."""

    bf16: bool = option(False, may_change=True)
    """Train in bfloat16 (GPU of the A100 class or newer; on a CPU float32 is used, and the log says so)."""

    fp16_opt_level: str = option("O1", choices=("O0", "O1", "O2"), may_change=True)
    """O1 casts per operator, O2 is pure half precision with float32 master weights."""

    scale_loss: float = option(32768.0, more_than(0), may_change=True)
    """First loss scale for fp16."""

    amp_master_grad: bool = option(False, may_change=True)
    """Keep gradients in float32 under O2."""


@dataclass(frozen=True)
class ParallelSection:
    """Parallelism"""

    sharding: str = option("", choices=("", "stage1", "stage2", "stage3"), may_change=True)
    """Shard optimizer states (stage1), gradients too (stage2), weights too (stage3) over data-parallel ranks."""

    sharding_parallel_degree: int = option(-1, degree, aliases=("sharding_degree",), unit="ranks", may_change=True)
    """Ranks that share one copy of the states; -1: all that tensor and pipeline parallel leave."""

    tensor_parallel_degree: int = option(-1, degree, unit="ranks", may_change=True)
    """Ranks that split each layer."""

    pipeline_parallel_degree: int = option(-1, degree, unit="ranks", may_change=True)
    """Ranks that split the layers into stages."""

    virtual_pp_degree: int = option(1, at_least(1), may_change=True)
    """Chunks of layers per pipeline stage (interleaved schedule)."""

    sequence_parallel: bool = option(False, may_change=True)
    """Split the sequence among the tensor-parallel ranks outside the matrix products."""

    tensor_parallel_config: str = option("", may_change=True)
    """Switches for tensor parallel, separated by spaces, as in PaddleNLP."""

    pipeline_parallel_config: str = option("", may_change=True)
    """Switches for pipeline parallel, separated by spaces, for example disable_p2p_cache_shape."""

    sharding_parallel_config: str = option("", may_change=True)
    """Switches for sharding, separated by spaces."""

    stage3_min_elements: int | None = option(None, at_least(1), may_change=True)
    """Stage 3 leaves parameters with fewer elements whole on every rank; default: 1,048,576, as Paddle does."""


@dataclass(frozen=True)
class CheckpointSection:
    """Output and checkpoints"""

    output_dir: str = option("output", may_change=True)
    """Folder for checkpoints, logs and the final model."""

    overwrite_output_dir: bool = option(False, may_change=True)
    """Start anew although output_dir holds a run: its checkpoints and logs are deleted."""

    save_strategy: str = option("steps", choices=("steps", "epoch", "no"), may_change=True)
    """When checkpoints are written, besides at the end: every save_steps, every epoch, or never."""

    save_steps: int = option(500, at_least(1), unit="steps", may_change=True)
    """Steps between checkpoints."""

    save_total_limit: int | None = option(None, at_least(1), may_change=True)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""

    load_best_model_at_end: bool = option(False, may_change=True)
    """Make the final model from the best evaluation's weights (see metric_for_best_model). Every new best is saved,
    whatever save_steps says, and kept, whatever save_total_limit says."""

    async_save: bool = option(False, may_change=True)
    """Train on while a checkpoint is written: training waits only for the copy in memory."""

    resume_from_checkpoint: str | None = option(None, may_change=True)
    """Go on from this checkpoint folder, even of another configuration. Default: the newest whole one in
    output_dir."""


@dataclass(frozen=True)
class LoggingSection:
    """Logging"""

    logging_steps: int = option(10, at_least(1), unit="steps", may_change=True)
    """Steps between log rows (console, metrics.jsonl, VisualDL)."""

    logging_dir: str | None = option(None, may_change=True)
    """VisualDL folder; default: output_dir/visualdl."""

    report_to: str = option("visualdl", choices=("visualdl", "none"), may_change=True)
    """Where scalars go besides metrics.jsonl."""

    disable_tqdm: bool = option(False, may_change=True)
    """Log lines in place of a progress bar."""

    log_level: str = option("warning", choices=("debug", "info", "warning", "error"), may_change=True)
    """How much of PaddleNLP's own log is shown."""


@dataclass(frozen=True)
class EvaluationSection:
    """What to do, and evaluation"""

    do_train: bool = option(False, may_change=True)
    """Train (without it the named model is only evaluated)."""

    do_eval: bool = option(False, may_change=True)
    """Evaluate: every eval_steps during training, and at the end."""

    eval_steps: int | None = option(None, at_least(1), unit="steps", may_change=True)
    """Steps between evaluations; default: at the end of every epoch."""

    eval_on_start: bool = option(False, may_change=True)
    """Evaluate before the first step too."""

    max_evaluate_steps: int = option(-1, unit="batches", may_change=True)
    """Evaluate at most this many batches of each held-out set; -1: all."""

    eval_prompts: str | None = option(None, may_change=True)
    """File of prompts that the model answers at every evaluation, for samples.jsonl and VisualDL: lines of text, or of
    .jsonl records (src, instruction, messages or text; a right answer may be there)."""

    metric_for_best_model: str = option("eval_loss", may_change=True)
    """Figure by which evaluations are compared: eval_loss, eval_perplexity, and with do_generation eval_exact_match,
    eval_bleu, eval_rouge_1, eval_rouge_2, eval_rouge_l. "eval_" may be left out."""

    greater_is_better: bool | None = option(None, may_change=True)
    """Whether more of metric_for_best_model is better. It is known for every figure: only a check."""

    early_stopping_patience: int | None = option(None, at_least(1), unit="evaluations", may_change=True)
    """Stop after so many evaluations in a row without an improvement. Default: train to the end."""

    early_stopping_threshold: float = option(0.0, at_least(0), may_change=True)
    """What metric_for_best_model must change by, from the best so far, to count as an improvement for
    early_stopping_patience."""


@dataclass(frozen=True)
class RuntimeSection:
    """Machine"""

    device: str | None = option(None, choices=("cpu", "gpu"), may_change=True)
    """cpu or gpu; default: gpu where there is one."""

    num_threads: int | None = option(None, at_least(1), unit="threads", may_change=True)
    """Threads of one process on a CPU; default: its share of the cores."""

    collective_timeout: float = option(600.0, more_than(0), unit="seconds", may_change=True)
    """How long a rank waits for the others in one operation before it gives up, on a CPU."""

    seed: int = option(42, between(0, (1 << 32) - 1))
    """Seeds the weights, the data order and dropout."""
