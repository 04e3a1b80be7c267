"""Options that pretraining and fine-tuning share, in typed sections.

Names are the published ones of PaddleNLP's TrainingArguments and scripts, so existing commands keep their meaning. The
checks of one option are declared with it; rules that span several options are in rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oarlock.config.options import at_least, between, degree, more_than, option
from oarlock.families.registry import FAMILIES


@dataclass(frozen=True)
class ModelSection:
    """The model"""

    model_name_or_path: str = option("facebook/llama-7b")
    """A built-in or hub name, or a folder with config.json and safetensors weights."""

    tokenizer_name_or_path: str | None = option(None)
    """Tokenizer name or folder. Default: the model's own."""

    model_type: str | None = option(None, choices=tuple(FAMILIES))
    """Model family. Checked against the model's config.json; needed only if that file does not name one."""

    allow_pickle_weights: bool = option(False, may_change=True)
    """Also read *.pdparams and pytorch_model.bin. Opening them can run code, so use this only for files you trust."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that replace those of the model's configuration, by their names there."""
        return {}


@dataclass(frozen=True)
class DataSection:
    """Data"""

    LENGTH_OPTIONS: ClassVar[tuple[str, ...]]  # whose sum is the length of a sample

    @property
    def sample_length(self) -> int:
        """Maximum length of a sample, in tokens."""
        return sum(getattr(self, name) for name in self.LENGTH_OPTIONS)

    @property
    def row_length(self) -> int:
        """Maximum length of a row of a batch, in tokens, without the virtual tokens of p-tuning."""
        return self.sample_length

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples."""
        return False


@dataclass(frozen=True)
class KernelSection:
    """Kernels and memory"""

    use_flash_attention: bool = option(False, may_change=True)
    """Use flash attention. Needs a GPU of the A100 class or newer; elsewhere plain attention runs, with a log line."""

    use_fused_rms_norm: bool = option(False, may_change=True)
    """Use the fused RMSNorm from custom_ops/, built by scripts/setup.sh. If it is not built, the plain one runs, with a
    log line."""

    fused_ops: bool = option(True, may_change=True)
    """On a CPU, use the fused operators from custom_ops/ instead of Paddle's own, if built. Losses are the same."""

    recompute: bool = option(False, may_change=True)
    """Recompute activations in the backward pass. Saves memory, costs about a third more compute."""

    recompute_granularity: str = option("full", choices=("full", "full_attn", "core_attn"), may_change=True)
    """What to recompute: full layers, full attention blocks, or the core of attention only."""


@dataclass(frozen=True)
class BatchSection:
    """Batch"""

    per_device_train_batch_size: int = option(8, at_least(1), unit="samples", may_change=True)
    """Samples per micro-batch on each data-parallel rank."""

    per_device_eval_batch_size: int = option(8, at_least(1), unit="samples", may_change=True)
    """Samples per batch on each data-parallel rank in evaluation."""

    gradient_accumulation_steps: int = option(1, at_least(1), may_change=True)
    """Micro-batches per step. The global batch size is per_device_train_batch_size x this x data-parallel ranks."""

    dataloader_num_workers: int = option(0, at_least(0), may_change=True)
    """Data loading processes per rank; 0 loads in the rank's own process."""


@dataclass(frozen=True)
class ScheduleSection:
    """Length of training and learning rate"""

    num_train_epochs: float = option(1.0, more_than(0), unit="epochs")
    """Passes over the training data; may be a fraction. The last step is filled up from the next pass. Ignored if
    max_steps is set."""

    max_steps: int = option(-1, unit="steps")
    """Number of optimizer steps. Overrides num_train_epochs if above 0."""

    learning_rate: float = option(5e-5, more_than(0))
    """Peak learning rate, reached at the end of the warm-up."""

    min_learning_rate: float = option(0.0, at_least(0))
    """Final learning rate of the cosine and linear schedules."""

    lr_scheduler_type: str = option("linear", choices=("linear", "cosine", "constant", "constant_with_warmup"))
    """Learning rate schedule after the warm-up. constant also warms up if a warm-up is set."""

    warmup_steps: int = option(0, at_least(0), unit="steps")
    """Steps of linear warm-up from 0. Overrides warmup_ratio if above 0."""

    warmup_ratio: float = option(0.0, between(0, 1))
    """Warm-up steps as a fraction of all steps, rounded up."""

    decay_steps: int | None = option(None, at_least(1), unit="steps")
    """Step at which min_learning_rate is reached. Default: the last step."""


@dataclass(frozen=True)
class OptimizerSection:
    """Optimizer (AdamW)"""

    weight_decay: float = option(0.0, at_least(0))
    """Decoupled weight decay. Biases and norms are not decayed."""

    max_grad_norm: float = option(1.0, at_least(0))
    """Clip gradients to this global norm; 0 turns clipping off."""

    adam_beta1: float = option(0.9, between(0, 1))
    """Decay rate of the first moment."""

    adam_beta2: float = option(0.999, between(0, 1))
    """Decay rate of the second moment."""

    adam_epsilon: float = option(1e-8, more_than(0))
    """Added to the denominator of the update."""


@dataclass(frozen=True)
class PrecisionSection:
    """Precision"""

    fp16: bool = option(False, may_change=True)
    """Train in float16 with loss scaling. GPU only; a CPU trains in float32, with a log line."""

    bf16: bool = option(False, may_change=True)
    """Train in bfloat16. Needs a GPU of the A100 class or newer; a CPU trains in float32, with a log line."""

    fp16_opt_level: str = option("O1", choices=("O0", "O1", "O2"), may_change=True)
    """O1 casts per operator; O2 is pure half precision with float32 master weights."""

    scale_loss: float = option(32768.0, more_than(0), may_change=True)
    """Initial loss scale for fp16."""

    amp_master_grad: bool = option(False, may_change=True)
    """Accumulate gradients in float32 under O2."""


@dataclass(frozen=True)
class ParallelSection:
    """Parallelism"""

    sharding: str = option("", choices=("", "stage1", "stage2", "stage3"), may_change=True)
    """Shard optimizer states (stage1), also gradients (stage2), also parameters (stage3) over data-parallel ranks."""

    sharding_parallel_degree: int = option(-1, degree, aliases=("sharding_degree",), unit="ranks", may_change=True)
    """Ranks that share one copy of the training state; -1: all ranks that tensor and pipeline parallelism leave."""

    tensor_parallel_degree: int = option(-1, degree, unit="ranks", may_change=True)
    """Ranks that split each layer (tensor parallelism)."""

    pipeline_parallel_degree: int = option(-1, degree, unit="ranks", may_change=True)
    """Pipeline stages that split the stack of layers."""

    expert_parallel_degree: int = option(-1, degree, unit="ranks", may_change=True)
    """Ranks that divide the experts of a layer (mixtures of experts). They are among the data-parallel and sharding
    ranks, so the degree does not add to the number of ranks."""

    virtual_pp_degree: int = option(1, at_least(1), may_change=True)
    """Chunks of layers per pipeline stage (interleaved schedule)."""

    sequence_parallel: bool = option(False, may_change=True)
    """Split the sequence among the tensor-parallel ranks outside the matrix products (sequence parallelism)."""

    tensor_parallel_config: str = option("", may_change=True)
    """PaddleNLP switches for tensor parallelism, separated by spaces."""

    pipeline_parallel_config: str = option("", may_change=True)
    """PaddleNLP switches for pipeline parallelism, separated by spaces, for example disable_p2p_cache_shape."""

    sharding_parallel_config: str = option("", may_change=True)
    """PaddleNLP switches for sharding, separated by spaces."""

    stage3_min_elements: int | None = option(None, at_least(1), may_change=True)
    """Parameters with fewer elements are not sharded by stage 3. Default: 1,048,576, as in Paddle."""


@dataclass(frozen=True)
class CheckpointSection:
    """Output and checkpoints"""

    output_dir: str = option("output", may_change=True)
    """Folder for checkpoints, logs and the final model."""

    overwrite_output_dir: bool = option(False, may_change=True)
    """Start from scratch even if output_dir holds a run. Its checkpoints and logs are deleted."""

    save_strategy: str = option("steps", choices=("steps", "epoch", "no"), may_change=True)
    """When to write checkpoints, besides at the end: every save_steps, every epoch, or never."""

    save_steps: int = option(500, at_least(1), unit="steps", may_change=True)
    """Steps between checkpoints."""

    save_total_limit: int | None = option(None, at_least(1), may_change=True)
    """Checkpoints to keep. Older ones are deleted once a newer one is complete."""

    load_best_model_at_end: bool = option(False, may_change=True)
    """Make the final model from the weights of the best evaluation (see metric_for_best_model). Each new best is saved
    and kept, whatever save_steps and save_total_limit say."""

    async_save: bool = option(False, may_change=True)
    """Write checkpoints in the background. Training pauses only for the copy in memory."""

    resume_from_checkpoint: str | None = option(None, may_change=True)
    """Resume from this checkpoint folder, even if its configuration differs. Default: the newest complete one in
    output_dir."""


@dataclass(frozen=True)
class LoggingSection:
    """Logging"""

    logging_steps: int = option(10, at_least(1), unit="steps", may_change=True)
    """Steps between log entries (console, metrics.jsonl, VisualDL)."""

    logging_dir: str | None = option(None, may_change=True)
    """Folder for VisualDL. Default: output_dir/visualdl."""

    report_to: str = option("visualdl", choices=("visualdl", "none"), may_change=True)
    """Where to write metrics, besides metrics.jsonl."""

    disable_tqdm: bool = option(False, may_change=True)
    """Print log lines instead of a progress bar."""

    log_level: str = option("warning", choices=("debug", "info", "warning", "error"), may_change=True)
    """Level of PaddleNLP's own log."""


@dataclass(frozen=True)
class EvaluationSection:
    """Tasks and evaluation"""

    do_train: bool = option(False, may_change=True)
    """Train. Without it, the model is only evaluated."""

    do_eval: bool = option(False, may_change=True)
    """Evaluate every eval_steps during training, and at the end."""

    eval_steps: int | None = option(None, at_least(1), unit="steps", may_change=True)
    """Steps between evaluations. Default: evaluate at the end of every epoch."""

    eval_on_start: bool = option(False, may_change=True)
    """Also evaluate before the first step."""

    max_evaluate_steps: int = option(-1, unit="batches", may_change=True)
    """Evaluate at most this many batches of each evaluation set; -1: all."""

    eval_prompts: str | None = option(None, may_change=True)
    """File of prompts for the model to answer at every evaluation; answers go to samples.jsonl and VisualDL. One prompt
    per line of text, or .jsonl records (src, instruction, messages or text, optionally with a reference answer)."""

    metric_for_best_model: str = option("eval_loss", may_change=True)
    """Metric that decides which evaluation is best: eval_loss, eval_perplexity, or with do_generation eval_exact_match,
    eval_bleu, eval_rouge_1, eval_rouge_2, eval_rouge_l. The prefix "eval_" is optional."""

    greater_is_better: bool | None = option(None, may_change=True)
    """Whether a higher metric_for_best_model is better. This is known for every metric; the option is only checked."""

    early_stopping_patience: int | None = option(None, at_least(1), unit="evaluations", may_change=True)
    """Stop after this many evaluations in a row without improvement. Default: train to the end."""

    early_stopping_threshold: float = option(0.0, at_least(0), may_change=True)
    """Smallest change of metric_for_best_model, compared with the best so far, that counts as an improvement for
    early_stopping_patience."""


@dataclass(frozen=True)
class RuntimeSection:
    """Machine"""

    device: str | None = option(None, choices=("cpu", "gpu"), may_change=True)
    """cpu or gpu. Default: gpu if one is available."""

    num_threads: int | None = option(None, at_least(1), unit="threads", may_change=True)
    """CPU threads per process. Default: the process's share of the cores."""

    collective_timeout: float = option(600.0, more_than(0), unit="seconds", may_change=True)
    """On a CPU, how long a rank waits for the others in one collective operation before it gives up."""

    seed: int = option(42, between(0, (1 << 32) - 1))
    """Random seed for weights, data order and dropout."""
