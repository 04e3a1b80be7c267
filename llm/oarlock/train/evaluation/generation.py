"""Greedy generation in batches, under any plan."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from oarlock.environment.console import log_once, make_progress_bar
from oarlock.model_config.generation_config import find_end_tokens
from oarlock.models.generate import generate_ids, generate_without_cache
from oarlock.train.evaluation.prompts import Answer, PromptSet
from oarlock.train.step.pipeline_step import predict_next_ids

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate


def generate_answers(
    prompt_set: PromptSet,
    model: Any,
    tokenizer: Any,
    *,
    template: ChatTemplate | None = None,
    generation: Mapping[str, Any] | None = None,
    pipeline: Any = None,
) -> list[Answer]:
    """Generate an answer to each prompt, in their order, on every rank. Prompts of similar length share a batch.

    Args:
        generation: content of generation_config.json.
        pipeline: PipelineParallel around the model, if it is split into stages.
    """
    prompts = prompt_set.prompts
    ends = find_end_tokens(generation or {}, model.config, tokenizer)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    texts: dict[int, str] = {}
    with make_progress_bar(len(prompts), "generate", "answer", leave=False) as bar:
        for start in range(0, len(order), prompt_set.batch_size):
            chosen = order[start : start + prompt_set.batch_size]
            rows = [prompts[i].input_ids for i in chosen]
            if pipeline is None:
                rows = _generate(model, tokenizer, rows, prompt_set.max_new_tokens, ends)
            else:
                # PipelineParallel has no key/value cache: every new token takes a forward pass of all stages.
                log_once("generation with pipeline parallelism has no key/value cache; long answers are slow")
                next_ids = partial(predict_next_ids, pipeline, pad_id=0)
                rows = generate_without_cache(next_ids, rows, ends, prompt_set.max_new_tokens)
            for i, row in zip(chosen, rows, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = template.extract_answer(text) if template is not None else text
            bar.update(len(chosen))
    if was_training:
        model.train()
    return [Answer(prompt, texts[i]) for i, prompt in enumerate(prompts)]


def _generate(
    model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int, ends: tuple[int, ...]
) -> list[list[int]]:
    split, model.config.tensor_parallel_output = model.config.tensor_parallel_output, False  # gather the logits
    try:
        return generate_ids(model, tokenizer, rows, max_new_tokens, ends)
    finally:
        model.config.tensor_parallel_output = split
