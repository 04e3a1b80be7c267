"""Fine-tuning datasets: find the records, tokenise them once per node, hand out examples.

Examples lie in a folder named by the hash of the data files' content, the tokenizer, the template and the lengths, so
that they are made once and a change of any of these makes others. Every rank maps that folder: memory stays flat.
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

from oarlock.data.corpus.blend import ConcatenatedDataset, shares_of
from oarlock.data.examples.encode import ENCODING_VERSION, Recipe, encode_source, first_form
from oarlock.data.examples.example_cache import ExampleWriter, JoinedPrompts, StoredExamples, StoredPrompts, is_whole
from oarlock.data.examples.labels import Example, Prompt
from oarlock.data.records.counts import Counts
from oarlock.data.records.dataset_resolver import RecordSources
from oarlock.data.records.datasets import EMBEDDED, RecordSet, find_sets
from oarlock.data.records.record_stream import RecordSource
from oarlock.data.records.validation_split import ChosenExamples, hold_out
from oarlock.data.templates.chat_template import ChatTemplate, choose_template
from oarlock.data.tokenizers.load import tokenizer_fingerprint
from oarlock.environment.cache import cache_folder
from oarlock.environment.console import get_logger, progress_bar
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
        dev: held-out examples, None where there are none.
    """

    name: str
    weight: float | None
    train: ExampleDataset
    dev: ExampleDataset | None


@dataclass
class FinetuneData:
    """Everything fine-tuning reads.

    Attributes:
        sets: examples to learn from, and held-out ones.
        dev_prompts: for do_generation.
        template: what turned messages into text.
        fingerprint: changes when the training examples do.
    """

    sets: list[FinetuneSet]
    dev_prompts: Sequence[Prompt]
    template: ChatTemplate
    fingerprint: str

    @property
    def train(self) -> ExampleDataset | ConcatenatedDataset:
        """The training examples of all sets, one after the other."""
        if len(self.sets) == 1:
            return self.sets[0].train
        return ConcatenatedDataset([part.train for part in self.sets], [part.name for part in self.sets])

    @property
    def dev(self) -> ExampleDataset | ConcatenatedDataset | None:
        """The held-out examples of all sets that have some; each counts as it is trained."""
        held_out = {part.name: part.dev for part in self.sets if part.dev is not None}
        if len(self.sets) == 1 or not held_out:
            return next(iter(held_out.values()), None)
        parts = [part for part in self.sets if part.name in held_out]
        sizes = [len(part.train) or len(held_out[part.name]) for part in parts]
        shares = shares_of([part.weight for part in parts], sizes)
        return ConcatenatedDataset(list(held_out.values()), list(held_out), shares)


class ExampleDataset(paddle.io.Dataset):
    """Tokenised examples; item i is an Example."""

    def __init__(self, examples: Sequence[Example]) -> None:
        super().__init__()
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens of each."""
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
    """Find, check and tokenise, or take what an earlier run tokenised; every rank has to call it at the same time.

    Args:
        seed: of --validation_split.
        need_prompts: whether the prompts of examples that are held out of training data are asked for.

    Raises:
        DataError: for a missing file or a wrong record.
    """
    found = run_on_all_ranks_early(lambda: find_sets(section))
    recipe = run_on_all_ranks_early(lambda: make_recipe(section, tokenizer, found))
    logger.info(f"fine-tuning data: {section.dataset_name_or_path or EMBEDDED}; chat template: {recipe.template.name}")
    held_out = replace(recipe, prompts=need_prompts)
    loaded = [_load_set(section, part, (recipe, held_out), need_train, seed, len(found) > 1) for part in found]
    fingerprints = [fingerprint for _, _, fingerprint in loaded]
    if len(found) > 1:
        fingerprints = [hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:32]]
    prompts = [prompts for _, prompts, _ in loaded]
    return FinetuneData(
        [part for part, _, _ in loaded],
        prompts[0] if len(prompts) == 1 else JoinedPrompts(prompts),
        recipe.template,
        fingerprints[0],
    )


def _load_set(
    section: FinetuneDataSection,
    part: RecordSet,
    recipes: tuple[Recipe, Recipe],
    need_train: bool,
    seed: int,
    several: bool,
) -> tuple[FinetuneSet, Sequence[Prompt], str]:
    """The examples of one set, its prompts, and the fingerprint of what it is trained on.

    Args:
        recipes: without --validation_split, and with it.
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
    recipe = recipes[0] if split is None else recipes[1]
    sides = ("train", "dev") if need_train or split is not None else ("dev",)
    stored = store_examples(section, sources, recipe, sides)
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


def make_recipe(section: FinetuneDataSection, tokenizer: PretrainedTokenizerBase, sets: Sequence[RecordSet]) -> Recipe:
    """How the records become tokens; the first training record (of the first set) decides what auto means."""
    form = first_form(sets[0].sources.train, section.data_format)
    template = choose_template(
        section.chat_template,
        tokenizer,
        form,
        section.instruction_generation,
        section.chat_template_name,
        section.parse_special_tokens,
    )
    return Recipe(tokenizer, template, section.src_length, section.tgt_length, section.data_format, section.skip_bad)


def store_examples(
    section: FinetuneDataSection, sources: RecordSources, recipe: Recipe, sides: Sequence[str]
) -> dict[str, StoredExamples]:
    """The examples of each side that has records, tokenised by the first rank of each node if they are not there."""
    cache = Path(section.data_cache_dir) if section.data_cache_dir else cache_folder() / "finetune"
    parts = {"train": (sources.train, recipe), "dev": (sources.dev, replace(recipe, prompts=True))}
    wanted = {side: parts[side] for side in sides if parts[side][0]}

    def keys_of_node() -> dict[str, str]:
        try:
            return {side: _stored(cache, side, *wanted[side]) for side in wanted}
        except OSError as error:
            raise DataError(
                f"{cache}: tokenised data can't be kept here ({error.strerror}); name a folder with --data_cache_dir"
            ) from error

    keys, of_all_nodes = run_once_per_node(keys_of_node)
    if any(other != keys for other in of_all_nodes):
        raise DataError(
            f"{section.dataset_name_or_path}: the nodes of this run hold different data, tokenizers or templates; "
            "copy the same files to all of them"
        )
    return {side: StoredExamples(cache / key, [s.name for s in wanted[side][0]]) for side, key in keys.items()}


def _stored(cache: Path, side: str, sources: list[RecordSource], recipe: Recipe) -> str:
    """The folder's name; makes it if it is not there."""
    key = _key(cache, sources, recipe)
    if not _usable(cache / key, recipe):
        with locked(cache / f".{key}.lock"):  # another run may be making it
            if not _usable(cache / key, recipe):
                _make(cache / key, side, sources, recipe)
    return key


def _usable(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder is there; one made with skip_bad serves others too if there was nothing to skip."""
    return is_whole(folder) and (recipe.skip_bad or not StoredExamples(folder).counts.bad)


def _key(cache: Path, sources: list[RecordSource], recipe: Recipe) -> str:
    """A hash of all that the examples depend on."""
    content = {
        "version": ENCODING_VERSION,
        "sources": [source.digest(cache / "hashes") for source in sources],
        "tokenizer": tokenizer_fingerprint(recipe.tokenizer),
        "template": recipe.template.identity,
        "recipe": [recipe.src_length, recipe.tgt_length, recipe.form, recipe.prompts],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _make(folder: Path, side: str, sources: list[RecordSource], recipe: Recipe) -> None:
    counts, size = Counts(), sum(source.size for source in sources)
    unit = sources[0].unit
    with (
        ExampleWriter(folder, len(recipe.tokenizer)) as writer,
        progress_bar(size, f"tokenise {side}", unit, leave=False, unit_scale=unit == "B") as bar,
    ):
        for source in sources:
            writer.begin_source()
            for rows, consumed in encode_source(source, recipe, counts):
                stop_if_terminated()
                writer.add(rows)
                bar.update(consumed)
        _check_counts(side, sources[0].name, counts, writer.num_examples)
        writer.finish(counts)


def _check_counts(side: str, name: str, counts: Counts, num_examples: int) -> None:
    if not counts.records:
        raise DataError(
            f"{name}: no usable record"
            + (f" ({counts.bad} bad ones, the first: {counts.first_bad[0]})" if counts.bad else "")
        )
    if not num_examples:
        raise DataError(f"{side}: no record has anything to train on after --src_length and --tgt_length")
