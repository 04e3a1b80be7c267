"""`oarlock data check`: statistics of fine-tuning data, and what truncation to the given lengths does to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.examples.dataset import make_encoding_settings, store_examples
from oarlock.data.examples.example_cache import StoredExamples
from oarlock.data.records.datasets import find_sets
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.files import settle_file

logger = get_logger(__name__)

_PERCENTILES = (50, 90, 99, 100)
_BINS = 60
_PICTURE_FORMATS = (".svg", ".png", ".pdf")


def check_data(section: FinetuneDataSection, tokenizer_name: str, histogram: str | None) -> int:
    """Print counts, lengths, duplicates and wrong records. Returns 1 if records are wrong, else 0.

    Raises:
        DataError: if no record is usable.
        ConfigError: for an unsupported picture format.
    """
    if histogram is not None and Path(histogram).suffix.lower() not in _PICTURE_FORMATS:
        raise ConfigError(f"--histogram {histogram}: supported formats are {', '.join(_PICTURE_FORMATS)}")
    tokenizer = load_tokenizer(tokenizer_name)
    sets = find_sets(section)
    settings = make_encoding_settings(section, tokenizer, sets)
    print(f"chat template: {settings.template.name}\n")
    wrong = False
    for number, part in enumerate(sets):
        if len(sets) > 1:
            print(f"{'' if number == 0 else chr(10)}=== {part.name}")
        if part.sources.left_out.count:
            print(f"{part.sources.left_out.text()}\n")
        sides = store_examples(section, part.sources, settings, ("train", "dev"))
        print("\n\n".join("\n".join(_describe(side, examples)) for side, examples in sides.items()))
        for line in _describe_duplicates(sides):
            print(line)
        if histogram is not None:
            picture = Path(histogram)
            if len(sets) > 1:  # a picture per set
                picture = picture.with_stem(f"{picture.stem}-{part.name.replace('/', '-')}")
            draw_lengths(sides, section.src_length, section.tgt_length, picture)
            logger.info(f"histogram written: {picture}")
        wrong = wrong or any(examples.counts.bad for examples in sides.values())
    return int(wrong)


def _describe(side: str, examples: StoredExamples) -> Iterator[str]:
    counts, tokens = examples.counts, examples.lengths + 1
    yield f"{side}: {counts.records:,} records, {len(examples):,} examples, {int(tokens.sum()):,} tokens"
    yield f"  tokens per example       {_format_percentiles(tokens)}"
    for name, title in (("context", "  before the last answer   "), ("answer", "  of the last answer       ")):
        yield title + _format_percentiles(examples.rows[name]) + "  (before truncation)"
    longest = int(tokens.argmax())
    yield f"  longest example          {examples.locate(longest)}"
    truncated = counts.truncated / max(1, counts.records)
    yield f"  truncated                {counts.truncated:,} ({truncated:.1%})"
    yield f"  nothing to train on      {counts.untrained:,}{_list_places(counts.first_untrained)}"
    if counts.unanswered:
        yield f"  end with a question      {counts.unanswered:,} (the question is dropped)"
    if counts.spelled:
        yield f"  spell a special token    {counts.spelled:,} (as text; as the token with --parse-special-tokens)"
    if counts.joined:
        yield f"  prompt joins its answer  {counts.joined:,} (one token spans both; it is part of the answer)"
    if counts.forgotten:
        yield f"  reasoning dropped        {counts.forgotten:,} (from earlier answers, by the chat template)"
    if counts.unread:
        yield f"  fields not read          {len(counts.unread):,}{_list_places(counts.unread)}"
    yield f"  wrong records            {counts.bad:,}{_list_places(counts.first_bad)}"


def _format_percentiles(values: np.ndarray) -> str:
    found = np.percentile(values, _PERCENTILES, method="lower").astype(int)
    return "  ".join(f"{'max' if p == 100 else f'{p}%'} {v:,}" for p, v in zip(_PERCENTILES, found, strict=True))


def _list_places(places: list[str]) -> str:
    return "".join(f"\n    {place}" for place in places)


def _describe_duplicates(sides: dict[str, StoredExamples]) -> Iterator[str]:
    """List identical examples within each side and between them. Only a hash of 8 bytes per example is in memory."""
    hashes = {
        side: np.fromiter((int.from_bytes(h, "little") for h in examples.hash_contents()), np.uint64, len(examples))
        for side, examples in sides.items()
    }
    for side, values in hashes.items():
        first, inverse = np.unique(values, return_index=True, return_inverse=True)[1:]
        repeats = np.flatnonzero(first[inverse] != np.arange(len(values)))
        examples = sides[side]
        shown = [f"{examples.locate(int(i))} repeats {examples.locate(int(first[inverse[i]]))}" for i in repeats[:5]]
        yield f"\n{side}: {len(repeats):,} examples repeat an earlier one, token for token{_list_places(shown)}"
    if len(hashes) == 2:
        both = np.flatnonzero(np.isin(hashes["dev"], hashes["train"]))
        shown = [sides["dev"].locate(int(i)) for i in both[:5]]
        yield f"dev: {len(both):,} examples are also in train{_list_places(shown)}"


def draw_lengths(sides: dict[str, StoredExamples], src_length: int, tgt_length: int, path: Path) -> None:
    """Draw histograms of the prompt and answer lengths before truncation, with the limits."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("context", "tokens before the last answer", "--src_length", src_length),
              ("answer", "tokens of the last answer", "--tgt_length", tgt_length))  # fmt: skip
    for axes, (name, title, flag, limit) in zip(figure.subplots(1, 2), panels, strict=True):
        values = {side: np.asarray(examples.rows[name]) for side, examples in sides.items()}
        top = max(limit, *(int(v.max()) for v in values.values()))
        # Bins have integer edges. The axis ends at 100 times the limit, or a few long records would hide the rest.
        edges = np.unique(np.linspace(0, min(top, 100 * limit) + 1, _BINS + 1).astype(int))
        for (side, lengths), color in zip(values.items(), ("#1864ab", "#d9480f"), strict=False):
            beyond = int(((lengths > limit) & sides[side].rows["truncated"]).sum())  # plain text is never truncated
            label = f"{side}: {beyond:,} of {len(lengths):,} longer"
            kind = "stepfilled" if side == "train" else "step"
            shown = np.minimum(lengths, edges[-1] - 1)
            axes.hist(shown, edges, color=color, histtype=kind, linewidth=1.5, label=label)
        axes.axvline(limit + 0.5, color="#212529", linewidth=1, linestyle="--", zorder=1.5, label=f"{flag} {limit}")
        axes.set_yscale("log")
        axes.set(xlabel=title, ylabel="records", xlim=(0, edges[-1]), ylim=(0.7, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none", framealpha=1, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    settle_file(path)
