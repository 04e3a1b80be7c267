"""4 accumulation steps with batch size 2 give the gradient of batch size 8, however uneven the lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import LlamaConfig
from paddlenlp.transformers.llama.modeling import LlamaPretrainingCriterion

from helpers import make_flags, make_tiny_model
from oarlock.config import FinetuneConfig, LoadedConfig, load_config
from oarlock.data.corpus.order import SampleOrder
from oarlock.data.examples.collate import FinetuneCollator
from oarlock.data.examples.dataset import load_finetune_data
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.models.build import build_model, find_model
from oarlock.train.run_training import make_trainer
from oarlock.train.setup import connect_ranks, start_run


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and eight records whose answers have 1 to 60 words."""
    folder = tmp_path_factory.mktemp("uneven")
    records = [{"src": f"count to {n}", "tgt": " ".join(["word"] * n)} for n in (1, 60, 2, 1, 45, 3, 1, 30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return make_tiny_model(folder / "model"), folder / "train.jsonl"


def compute_gradients(uneven, tmp_path, batch: int, accumulation: int) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the first step."""
    model_folder, data_file = uneven
    words = make_flags(
        do_train=1, model_name_or_path=model_folder, dataset_name_or_path=data_file, output_dir=tmp_path / f"{batch}x{accumulation}",
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1, report_to="none",
        src_length=32, tgt_length=128, device="cpu",
    )  # fmt: skip
    config = load_config(FinetuneConfig, words)
    run = start_run(LoadedConfig(config.config))
    source = find_model(run.config, from_weights=True)
    connect_ranks(run, source, 160)
    tokenizer = load_tokenizer(str(model_folder))
    data = load_finetune_data(run.config.data, tokenizer)
    model = build_model(source)
    trainer = make_trainer(
        run, model, None, order=SampleOrder(len(data.train), 1), template=None, tokenizer=tokenizer, flops=None,
        data_fingerprint="", train_dataset=data.train, data_collator=FinetuneCollator(512, 0),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(1)
    losses = [trainer.training_step(model, batch) for batch in trainer.get_train_dataloader()]
    assert len(losses) == accumulation
    return sum(float(loss) for loss in losses), {n: p.grad.numpy() for n, p in model.named_parameters()}


def test_the_accumulated_gradient_equals_that_of_the_global_batch(uneven, tmp_path):
    whole_loss, whole = compute_gradients(uneven, tmp_path, 8, 1)
    for batch, accumulation in ((2, 4), (1, 8), (4, 2)):
        loss, parts = compute_gradients(uneven, tmp_path, batch, accumulation)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, gradient in whole.items():
            scale = np.abs(gradient).max()
            assert np.abs(parts[name] - gradient).max() <= 1e-5 * scale, name


def test_a_mean_of_means_weights_tokens_unevenly():
    """Why PaddleNLP's loss is not used: micro-batches of 1 and 60 tokens have equal weight in it."""
    criterion = LlamaPretrainingCriterion(LlamaConfig(vocab_size=8))
    logits, labels = paddle.randn([2, 60, 8]), paddle.randint(0, 8, [2, 60])
    labels[0, 1:] = -100
    whole = float(criterion(logits, labels))
    halves = [float(criterion(logits[i : i + 1], labels[i : i + 1])) for i in (0, 1)]
    assert abs(sum(halves) / 2 - whole) > 1e-3
    assert (halves[0] + 60 * halves[1]) / 61 == pytest.approx(whole, rel=1e-5)
