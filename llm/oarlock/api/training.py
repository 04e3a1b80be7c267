"""Pretraining and fine-tuning from Python."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from oarlock.config import FinetuneConfig, LoadedConfig, PretrainConfig
from oarlock.config.load import load_options
from oarlock.environment.paddle_import import import_paddle
from oarlock.environment.signals import restore_signals
from oarlock.errors import EnvironmentProblem, OarlockError, TrainingError, notify_failure_listeners
from oarlock.formats.json_file import parse_json


@dataclass(frozen=True)
class TrainingResult:
    """The output of a run.

    Attributes:
        output_dir: folder of the trained model or adapter, the checkpoints and the logs.
        metrics: the rows of metrics.jsonl in their order. Rows of training have "step", "loss", "learning_rate" and so
            on; rows of evaluations have "step" and keys that begin with "eval_".
    """

    output_dir: Path
    metrics: list[dict[str, Any]]


@overload
def load_config(
    kind: Literal["pretrain"], recipe: str | Path | None = None, **options: Any
) -> LoadedConfig[PretrainConfig]: ...
@overload
def load_config(
    kind: Literal["finetune"], recipe: str | Path | None = None, **options: Any
) -> LoadedConfig[FinetuneConfig]: ...
def load_config(
    kind: Literal["pretrain", "finetune"], recipe: str | Path | None = None, **options: Any
) -> LoadedConfig[Any]:
    """Read and check a configuration without starting anything.

    Args:
        kind: "pretrain" or "finetune".
        recipe: a YAML file, or the name of a recipe that comes with Oarlock (see `list_recipes`). Without one, options
            that are not given have their defaults.
        options: options by their names on the command line, such as `learning_rate=3e-4`. They win over the recipe.

    Returns:
        The configuration as `.config`, and where each value came from as `.origins`. `pretrain` and `finetune` take it.

    Raises:
        ConfigError: an option does not exist, has a wrong value, or conflicts with another one. The message lists all
            problems.

    Example:
        >>> loaded = load_config("finetune", "lora_7b", r=16)
        >>> loaded.config.method.r
        16
    """
    return load_options(PretrainConfig if kind == "pretrain" else FinetuneConfig, recipe, options)


def pretrain(config: str | Path | LoadedConfig[PretrainConfig] | None = None, **options: Any) -> TrainingResult:
    """Pretrain a model, as `oarlock pretrain` does.

    Called in a plain program or a notebook, the run has one rank. For several ranks, start a program that calls this
    with `python -m paddle.distributed.launch` or `oarlock launch`. A call with the `output_dir` of a stopped run
    resumes it from its newest checkpoint. Ctrl-C finishes the step, saves a checkpoint and returns.

    One process can call this and `finetune` several times in a row, on one device. What the first call sets up stays:
    the number of threads, and the ranks with their parallel degrees.

    Args:
        config: a recipe (its name or its YAML file), or what `load_config` returned.
        options: options by their names on the command line; not together with the result of `load_config`.

    Raises:
        ConfigError: the configuration is wrong.
        EnvironmentProblem: something on this machine is missing, or the call is not in the main thread, which handles
            signals.
        OarlockError: any other failure, as one of DataError, ModelError, CheckpointError and TrainingError.

    Example:
        >>> result = pretrain(
        ...     model_name_or_path="my_config", tokenizer_name_or_path="my_tokenizer", input_dir="corpus",
        ...     output_dir="output/base", do_train=True, max_steps=100,
        ... )
        >>> result.metrics[-1]["step"]
        100
    """  # fmt: skip
    return _train(_load_config_once("pretrain", config, options))


def finetune(config: str | Path | LoadedConfig[FinetuneConfig] | None = None, **options: Any) -> TrainingResult:
    """Fine-tune a model, as `oarlock finetune` does.

    Resuming and the use of several ranks are as in `pretrain`.

    Args:
        config: a recipe's name or path, or a loaded configuration; None for the defaults.
        options: as in `pretrain`.

    Raises:
        OarlockError: in the same cases as `pretrain`.

    Example:
        >>> result = finetune("lora_7b", model_name_or_path="output/base", output_dir="output/lora", max_steps=20)
        >>> result.output_dir
        PosixPath('output/lora')
    """
    return _train(_load_config_once("finetune", config, options))


def run_training(loaded: LoadedConfig[Any]) -> int:
    """Pretrain or fine-tune in this process, as its configuration says; returns the exit code."""
    from oarlock.train.output.lock import hold_output_lock

    with hold_output_lock(loaded.config.checkpoint.output_dir):  # before the seconds that importing Paddle takes
        import_paddle(loaded.config.runtime.num_threads)
        if loaded.config.is_finetuning:
            from oarlock.train.finetune import finetune

            return finetune(loaded)
        from oarlock.train.pretrain import pretrain

        return pretrain(loaded)


def _load_config_once(kind: Any, config: str | Path | LoadedConfig[Any] | None, options: dict[str, Any]) -> Any:
    """The configuration of a call: one that was loaded before, or a recipe and options.

    Raises:
        TypeError: for both.
    """
    if not isinstance(config, LoadedConfig):
        return load_config(kind, config, **options)
    if options:
        raise TypeError(f"give {', '.join(options)} to load_config(); a loaded configuration is used as it is")
    return config


def _train(loaded: LoadedConfig[Any]) -> TrainingResult:
    if threading.current_thread() is not threading.main_thread():
        raise EnvironmentProblem("training has to run in the main thread of a program: it handles SIGTERM and Ctrl-C")
    output_dir = Path(loaded.config.checkpoint.output_dir)
    with restore_signals():
        try:
            run_training(loaded)
        except OarlockError as error:
            notify_failure_listeners(error)
            raise
        except SystemExit as error:  # a signal before the first step
            raise TrainingError("stopped by a signal before training began") from error
    log = output_dir / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [parse_json(line, f"{log}:{number}", dict[str, Any]) for number, line in enumerate(lines, 1)]
    return TrainingResult(output_dir, rows)
