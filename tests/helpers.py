"""Small models, tokenizers and runs that the tests share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LLM = ROOT / "llm"

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_tiny_tokenizer(folder: str | Path, vocab_size: int = 512) -> Path:
    """A byte-level BPE tokenizer trained on a few of the embedded instructions (fractions of a second)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from oarlock.data.embedded.instructions import make_instruction_records
    from oarlock.data.embedded.tokenizer import ASSISTANT, EOS, USER, save_tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join((r["instruction"], r["input"], r["output"])) for r in make_instruction_records("train")[:500]]
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(folder, tokenizer.to_str())
    return Path(folder)


def make_tiny_model(folder: str | Path, **changes: Any) -> Path:
    """Save a random Llama with its tokenizer, as published models are (safetensors)."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle()
    import paddle
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    set_paddlenlp_log_level("error")
    paddle.seed(7)
    model = make_norms_and_biases_nontrivial(LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | changes))))
    model.save_pretrained(str(folder), safe_serialization=True)
    make_tiny_tokenizer(folder)
    return Path(folder)


def logits_of(model: Any, ids: Any) -> Any:
    """The logits [rows, tokens, vocabulary] of a model for token ids, dropout off."""
    import paddle

    model.eval()
    with paddle.no_grad():
        found = model(input_ids=paddle.to_tensor(ids))
    return (found[0] if isinstance(found, (tuple, list)) else found).numpy()


def make_norms_and_biases_nontrivial(model: Any) -> Any:
    """A model whose norms are not 1 and whose biases are not 0, as every trained one's, in place: ones and zeros hide
    faults. The values follow from the names."""
    for name, parameter in model.named_parameters():
        if len(parameter.shape) == 1:
            parameter.set_value(_off_by_some(name, parameter.numpy()))
    return model


def make_folder_nontrivial(folder: Path) -> None:
    """The same for the model in a folder (one float32 file in Paddle's layout)."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    arrays = load_file(file)
    vectors = {n: a for n, a in arrays.items() if a.ndim == 1 and n.endswith((".weight", ".bias"))}
    save_file(arrays | {n: _off_by_some(n, a) for n, a in vectors.items()}, file, metadata={"format": "np"})


def _off_by_some(name: str, values: Any) -> Any:
    import numpy as np

    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(values.shape)
    return (values + 0.2 * noise).astype(values.dtype)


def make_adapter(
    base: str | Path, folder: Path, method: Any = None, method_saved: Any = None, seed: int = 0, std: float = 0.1
) -> Path:
    """An adapter of a base with random matrices, by default LoRA."""
    import numpy as np
    from paddlenlp.transformers import AutoConfig

    from oarlock.model_config.load import find_model_class
    from oarlock.models.layer_offload import make_empty_model
    from oarlock.peft.adapter_folder import Base, save_adapter
    from oarlock.peft.lora import LoRA
    from oarlock.peft.method import trainable_parameters
    from oarlock.weights.safetensors_file import TensorSource

    method = method or LoRA(r=4, alpha=6.0)
    config = AutoConfig.from_pretrained(str(base))
    random = np.random.default_rng(seed)
    tensors = []
    for parameter in trainable_parameters(make_empty_model(find_model_class(config), config, method)):
        values = (random.standard_normal(parameter.slice.shape) * std).astype(np.float32)
        tensors.append(TensorSource(parameter.name, "float32", values.shape, lambda values=values: values))
    folder.mkdir(parents=True)
    save_adapter(tensors, method_saved or method, Base.from_folder(str(base), Path(base)), None, None, folder)
    return folder


def make_tiny_config(folder: str | Path, **changes: Any) -> Path:
    """Write config.json and the tokenizer only, for training from scratch."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "llama", **TINY_LLAMA, **changes}
    (folder / "config.json").write_text(json.dumps(content))
    make_tiny_tokenizer(folder)
    return folder


def encode_conversation(conversation: Any, tokenizer: Any, template: Any, src_length: int, tgt_length: int) -> Any:
    """Encode a conversation as oarlock.data.examples.encode does."""
    from oarlock.data.examples.labels import encode_chat
    from oarlock.data.templates.trained_spans import render_chat_text
    from oarlock.data.tokenizers.load import encode_marked

    chat = render_chat_text(conversation, template)
    (tokens,) = encode_marked(tokenizer, [chat.text])
    return encode_chat(chat, tokens, src_length, tgt_length)


def write_checkpoint(folder: Path, step: int, **changes: Any) -> Path:
    """Write a small complete checkpoint, as a run of one process does.

    Args:
        changes: fields of its manifest.
    """
    import numpy as np

    from oarlock.train.checkpoint.manifest import TRAINER_STATE, Manifest
    from oarlock.weights.safetensors_file import TensorSource, write_safetensors
    from oarlock.weights.shard_index import WEIGHTS, StoredShard, shard_file_name, write_index
    from oarlock.weights.tensor_slice import TensorSlice

    folder.mkdir(parents=True)
    values = np.random.default_rng(step).standard_normal((20, 25)).astype(np.float32)
    pieces = [StoredShard(kind, "head.weight", TensorSlice(values.shape)) for kind in (WEIGHTS, "moment1")]
    tensors = [TensorSource(piece.key, "float32", values.shape, lambda: values) for piece in pieces]
    write_safetensors(folder / shard_file_name(0), tensors, {"format": "oarlock"})
    write_index(folder, {shard_file_name(0): pieces})
    (folder / TRAINER_STATE).write_text(json.dumps({"global_step": step}) + "\n")
    content: dict[str, Any] = {
        "step": step, "samples": step, "seed": 42, "lr_scheduler": {"last_epoch": step, "last_lr": 1e-3},
        "loss_window": (0.0, 0), "config": {}, "data_fingerprint": "data",
    }  # fmt: skip
    Manifest(**(content | changes)).seal(folder)
    return folder


def make_flags(**options: Any) -> list[str]:
    """{"max_steps": 3, "do_train": True} -> ["--max_steps", "3", "--do_train", "True"]."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_program(
    program: str | Path, *words: str, cwd: Path | None = None, timeout: int = 300, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run an entrypoint (a path below llm/) or "oarlock" in a separate process."""
    start = ["-m", "oarlock"] if program == "oarlock" else [str(LLM / program)]
    environment = {**os.environ, "PYTHONPATH": str(LLM), **kwargs.pop("env", {})}
    return subprocess.run(
        [sys.executable, *start, *words],
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
        **kwargs,
    )


def reset_signals() -> None:
    """A preexec_fn: what a program inherits as ignored it may never see (SIGHUP under nohup, SIGINT behind a script's
    "&")."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports
