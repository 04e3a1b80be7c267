"""Fine-tuning datasets: finding the records and tokenising them once per node.

Examples are cached in a folder named by a hash of the data files, the tokenizer, the template and the lengths. So they
are made once, and again when any of these changes. All ranks map the files, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from oarlock.data.corpus.blend import ConcatenatedDataset, compute_shares
from oarlock.data.examples.encode import ENCODING_VERSION, EncodingSettings, detect_first_form, encode_source
from oarlock.data.examples.example_cache import ExampleWriter, JoinedPrompts, StoredExamples, StoredPrompts, is_complete
from oarlock.data.examples.labels import EvalPrompt, Example
from oarlock.data.records.counts import Counts
from oarlock.data.records.dataset_resolver import RecordSources
from oarlock.data.records.datasets import EMBEDDED, RecordSet, find_sets
from oarlock.data.records.record_stream import RecordSource
from oarlock.data.records.validation_split import ChosenExamples, hold_out
from oarlock.data.templates.chat_template import ChatTemplate, choose_template
from oarlock.data.tokenizers.load import compute_tokenizer_fingerprint
from oarlock.environment.cache import cache_folder
from oarlock.environment.console import get_logger, make_progress_bar
from oarlock.environment.signals import stop_if_terminated
from oarlock.errors import DataError
from oarlock.files import locked
from oarlock.parallel.nodes import run_on_all_ranks_early, run_once_per_node

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

    from oarlock.config.finetune import FinetuneDataSection

logger = get_logger(__name__)


@dataclass
class FinetuneSet:
    """The examples of one data set.

    Attributes:
        dev: held-out examples, None if there are none.
    """

    name: str
    weight: float | None
    train: ExampleDataset
    dev: ExampleDataset | None


@dataclass
class FinetuneData:
    """The data of a fine-tuning run.

    Attributes:
        sets: training and held-out examples, by data set.
        dev_prompts: prompts of the held-out examples, for do_generation.
        template: the chat template of all examples.
        fingerprint: changes with the training examples.
    """

    sets: list[FinetuneSet]
    dev_prompts: Sequence[EvalPrompt]
    template: ChatTemplate
    fingerprint: str

    @property
    def train(self) -> ExampleDataset | ConcatenatedDataset:
        """The concatenated training examples of all sets."""
        if len(self.sets) == 1:
            return self.sets[0].train
        return ConcatenatedDataset([part.train for part in self.sets], [part.name for part in self.sets])

    @property
    def dev(self) -> ExampleDataset | ConcatenatedDataset | None:
        """The concatenated held-out examples. Each set has the share that it has in training."""
        held_out = {part.name: part.dev for part in self.sets if part.dev is not None}
        if len(self.sets) == 1 or not held_out:
            return next(iter(held_out.values()), None)
        parts = [part for part in self.sets if part.name in held_out]
        sizes = [len(part.train) or len(held_out[part.name]) for part in parts]
        shares = compute_shares([part.weight for part in parts], sizes)
        return ConcatenatedDataset(list(held_out.values()), list(held_out), shares)


class ExampleDataset(paddle.io.Dataset):
    """Tokenised examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        super().__init__()
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [examples]."""
        if isinstance(self.examples, (StoredExamples, ChosenExamples)):
            return self.examples.lengths
        return np.fromiter((len(example.input_ids) for example in self.examples), np.int64, len(self))


def load_finetune_data(
    section: FinetuneDataSection,
    tokenizer: PretrainedTokenizerBase,
    need_train: bool = True,
    seed: int = 42,
    need_prompts: bool = True,
) -> FinetuneData:
    """Load the fine-tuning data, from the cache if an earlier run tokenised it. All ranks must call it together.

    Args:
        seed: random seed of --validation_split.
        need_prompts: whether to make the prompts of examples held out by --validation_split.

    Raises:
        DataError: for a missing file or a wrong record.
    """
    found = run_on_all_ranks_early(lambda: find_sets(section))
    settings = run_on_all_ranks_early(lambda: make_encoding_settings(section, tokenizer, found))
    logger.info(
        f"fine-tuning data: {section.dataset_name_or_path or EMBEDDED}; chat template: {settings.template.name}"
    )
    held_out = replace(settings, prompts=need_prompts)
    loaded = [_load_set(section, part, (settings, held_out), need_train, seed, len(found) > 1) for part in found]
    fingerprints = [fingerprint for _, _, fingerprint in loaded]
    if len(found) > 1:
        fingerprints = [hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:32]]
    prompts = [prompts for _, prompts, _ in loaded]
    return FinetuneData(
        [part for part, _, _ in loaded],
        prompts[0] if len(prompts) == 1 else JoinedPrompts(prompts),
        settings.template,
        fingerprints[0],
    )


def _load_set(
    section: FinetuneDataSection,
    part: RecordSet,
    choices: tuple[EncodingSettings, EncodingSettings],
    need_train: bool,
    seed: int,
    several: bool,
) -> tuple[FinetuneSet, Sequence[EvalPrompt], str]:
    """Load one data set. Returns its examples, its held-out prompts, and the fingerprint of the training examples.

    Args:
        choices: the settings without --validation_split, and the one with it.
        several: whether there are other sets, so that log lines need its name.
    """
    sources, split = part.sources, section.validation_split
    prefix = f"{part.name}: " if several else ""
    for side, files in (("train", sources.train), ("dev", sources.dev)):
        if files and section.dataset_name_or_path:
            logger.info(f"{prefix}{side}: {files[0].name}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
    if sources.left_out.count:
        logger.info(prefix + sources.left_out.text())
    if split is not None and sources.dev:
        logger.info(f"{prefix}--validation_split {split:g} is not used: there is a dev file, {sources.dev[0].name}")
        split = None
    settings = choices[0] if split is None else choices[1]
    sides = ("train", "dev") if need_train or split is not None else ("dev",)
    stored = store_examples(section, sources, settings, sides)
    for side, examples in stored.items():
        for note in examples.counts.describe(prefix + side):
            logger.info(note)
    train, dev = stored.get("train"), stored.get("dev")
    fingerprint = train.folder.name if train is not None else ""
    if split is None or train is None:
        made = FinetuneSet(
            part.name,
            part.weight,
            ExampleDataset(train if train is not None else []),
            ExampleDataset(dev) if dev is not None else None,
        )
        return made, StoredPrompts(dev) if dev is not None else [], fingerprint
    kept, held = hold_out(train, split, seed, sources.train[0].name)
    logger.info(f"{prefix}{len(held):,} of {len(train):,} examples are held out (--validation_split {split:g})")
    made = FinetuneSet(
        part.name,
        part.weight,
        ExampleDataset(ChosenExamples(train, kept)),
        ExampleDataset(ChosenExamples(train, held)),
    )
    return made, StoredPrompts(train, held), fingerprint


def make_encoding_settings(
    section: FinetuneDataSection, tokenizer: PretrainedTokenizerBase, sets: Sequence[RecordSet]
) -> EncodingSettings:
    """Make the settings for encoding. `auto` is resolved by the first training record of the first set."""
    form = detect_first_form(sets[0].sources.train, section.data_format)
    template = choose_template(
        section.chat_template,
        tokenizer,
        form,
        section.instruction_generation,
        section.chat_template_name,
        section.parse_special_tokens,
    )
    return EncodingSettings(
        tokenizer, template, section.src_length, section.tgt_length, section.data_format, section.skip_bad
    )


def store_examples(
    section: FinetuneDataSection, sources: RecordSources, settings: EncodingSettings, sides: Sequence[str]
) -> dict[str, StoredExamples]:
    """Return the examples of each side that has records. The first rank of each node tokenises what is not cached."""
    cache = Path(section.data_cache_dir) if section.data_cache_dir else cache_folder() / "finetune"
    parts = {"train": (sources.train, settings), "dev": (sources.dev, replace(settings, prompts=True))}
    wanted = {side: parts[side] for side in sides if parts[side][0]}

    def tokenize_missing() -> dict[str, str]:
        """Return the name of the examples' folder of each side. It is made if it is missing or unusable."""
        found = {}
        try:
            for side, (records, own) in wanted.items():
                inputs = {
                    "version": ENCODING_VERSION,
                    "sources": [source.digest(cache / "hashes") for source in records],
                    "tokenizer": compute_tokenizer_fingerprint(own.tokenizer),
                    "template": own.template.identity,
                    "recipe": [own.src_length, own.tgt_length, own.form, own.prompts],
                }
                key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
                if not _is_usable(cache / key, own):
                    with locked(cache / f".{key}.lock"):  # another run may be making it
                        if not _is_usable(cache / key, own):
                            _write_examples(cache / key, side, records, own)
                found[side] = key
        except OSError as error:
            raise DataError(
                f"{cache}: tokenised data can't be stored here ({error.strerror}); choose another --data_cache_dir"
            ) from error
        return found

    keys, of_all_nodes = run_once_per_node(tokenize_missing)
    if any(other != keys for other in of_all_nodes):
        raise DataError(
            f"{section.dataset_name_or_path}: the nodes have different data, tokenizers or templates; copy the "
            "same files to all nodes"
        )
    return {side: StoredExamples(cache / key, [s.name for s in wanted[side][0]]) for side, key in keys.items()}


def _is_usable(folder: Path, settings: EncodingSettings) -> bool:
    """Whether the folder is complete. One made with skip_bad also serves other runs if nothing was skipped."""
    return is_complete(folder) and (settings.skip_bad or not StoredExamples(folder).counts.bad)


def _write_examples(folder: Path, side: str, sources: list[RecordSource], settings: EncodingSettings) -> None:
    counts, size = Counts(), sum(source.size for source in sources)
    unit = sources[0].unit
    with (
        ExampleWriter(folder, len(settings.tokenizer)) as writer,
        make_progress_bar(size, f"tokenise {side}", unit, leave=False, unit_scale=unit == "B") as bar,
    ):
        for source in sources:
            writer.begin_source()
            for rows, consumed in encode_source(source, settings, counts):
                stop_if_terminated()
                writer.add(rows)
                bar.update(consumed)
        if not counts.records:
            first = f" ({counts.bad} bad ones, the first: {counts.first_bad[0]})" if counts.bad else ""
            raise DataError(f"{sources[0].name}: no usable record{first}")
        if not writer.num_examples:
            raise DataError(f"{side}: truncated to --src_length and --tgt_length, no record has anything to train on")
        writer.finish(counts)
