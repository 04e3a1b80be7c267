"""Fine-tuning datasets: find the files, tokenise them, hand out examples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from oarlock.data.embedded.instructions import instruction_records
from oarlock.data.labels import IGNORE_INDEX, Example, Prompt, encode_conversation, encode_prompt
from oarlock.data.records import Conversation, Records, read_items, read_records
from oarlock.data.templates import ChatTemplate, choose_template
from oarlock.environment import progress_bar, say
from oarlock.errors import DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

    from oarlock.config.schema import FinetuneDataSection

EMBEDDED = "embedded instructions"
_DEV_NAMES = ("dev", "validation", "valid", "eval", "test")


@dataclass
class FinetuneData:
    """Everything fine-tuning reads.

    Attributes:
        train, dev: examples to learn from, and held-out ones (None without a dev file).
        dev_prompts: for do_generation.
        template: what turned messages into text.
        fingerprint: changes when the training examples do.
    """

    train: ExampleDataset
    dev: ExampleDataset | None
    dev_prompts: list[Prompt]
    template: ChatTemplate
    fingerprint: str


class ExampleDataset(paddle.io.Dataset):
    """Tokenised examples; item i is an Example."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__()
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens of each."""
        return np.fromiter((len(example.input_ids) for example in self.examples), np.int64, len(self))


@dataclass
class _Files:
    train: Records
    dev: Records | None = None
    sources: list[str] = field(default_factory=list)


def load_finetune_data(
    section: FinetuneDataSection, tokenizer: PretrainedTokenizerBase, need_train: bool = True
) -> FinetuneData:
    """Read, check and tokenise.

    Raises:
        DataError: for a missing file or a wrong record.
    """
    files = _read(section)
    template = choose_template(section.chat_template, tokenizer, files.train.form, section.instruction_generation)
    say(f"fine-tuning data: {', '.join(files.sources)}; chat template: {template.name}")
    for side, records in (("train", files.train), ("dev", files.dev)):
        if records is not None and records.bad:
            shown = "".join(f"\n  {line}" for line in records.bad[:5])
            say(f"{len(records.bad):,} bad {side} records left out (--skip_bad):{shown}")

    def examples(records: Records, side: str) -> ExampleDataset:
        return ExampleDataset(_encode_all(records.conversations, side, tokenizer, template, section))

    train = examples(files.train, "train") if need_train else ExampleDataset([])
    dev = examples(files.dev, "dev") if files.dev else None
    prompts = [
        encode_prompt(conversation, tokenizer, template, section.src_length)
        for conversation in (files.dev.conversations if files.dev else [])
    ]
    digest = hashlib.sha256()
    for example in train.examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return FinetuneData(train, dev, prompts, template, digest.hexdigest())


def _encode_all(
    conversations: list[Conversation],
    side: str,
    tokenizer: PretrainedTokenizerBase,
    template: ChatTemplate,
    section: FinetuneDataSection,
) -> list[Example]:
    examples = []
    untrained = truncated = 0
    bar = progress_bar(len(conversations), f"tokenise {side}", "record", leave=False)
    for conversation in conversations:
        bar.update()
        example = encode_conversation(conversation, tokenizer, template, section.src_length, section.tgt_length)
        truncated += example.truncated
        if any(label != IGNORE_INDEX for label in example.labels):
            examples.append(example)
        else:
            untrained += 1
    bar.close()
    if truncated:
        say(f"{side}: {truncated:,} of {len(conversations):,} records were cut by --src_length or --tgt_length")
    if untrained:
        say(f"{side}: {untrained:,} records left out, nothing of their answer fits")
    if not examples:
        raise DataError(f"{side}: no record has anything to train on after --src_length and --tgt_length")
    return examples


def _read(section: FinetuneDataSection) -> _Files:
    name = section.dataset_name_or_path
    if name is None:
        say("no --dataset_name_or_path: fine-tuning on the embedded instructions (small English and Chinese tasks)")
        return _Files(
            read_items(instruction_records("train"), f"{EMBEDDED}, train", "alpaca"),
            read_items(instruction_records("dev"), f"{EMBEDDED}, dev", "alpaca"),
            [EMBEDDED],
        )
    path = Path(name)
    if path.is_file():
        return _Files(read_records(path, section.data_format, section.skip_bad), None, [str(path)])
    if path.is_dir():
        return _read_folder(path, section)
    return _read_hub(name, section)


def _read_folder(folder: Path, section: FinetuneDataSection) -> _Files:
    train, dev = _one_of(folder, ("train",)), _one_of(folder, _DEV_NAMES)
    if train is None:
        raise DataError(f"{folder}: no train.json or train.jsonl in this folder")
    files = _Files(read_records(train, section.data_format, section.skip_bad), None, [str(train)])
    if dev is not None:
        files.dev = read_records(dev, section.data_format, section.skip_bad)
        files.sources.append(str(dev))
    return files


def _one_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        for ending in (".jsonl", ".json"):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    return None


def _read_hub(name: str, section: FinetuneDataSection) -> _Files:
    """A dataset of the Hugging Face hub (or one in its cache)."""
    from datasets import load_dataset

    try:
        found = load_dataset(name)
    except Exception as error:  # the hub client raises everything from OSError to its own classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--dataset_name_or_path {name}: neither a file nor a folder here, and no hub gave it ({reason})"
        ) from error
    if "train" not in found:
        raise DataError(f"{name}: no train split (it has {', '.join(found)})")
    dev = next((split for split in _DEV_NAMES if split in found), None)
    files = _Files(read_items(found["train"], f"{name}[train]", section.data_format, section.skip_bad), None, [name])
    if dev is not None:
        files.dev = read_items(found[dev], f"{name}[{dev}]", section.data_format, section.skip_bad)
    return files
