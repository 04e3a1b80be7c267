"""`oarlock data check`: what fine-tuning data holds, and what a run with these lengths would make of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.examples.dataset import make_recipe, store_examples
from oarlock.data.examples.example_cache import StoredExamples
from oarlock.data.records.datasets import find_sets
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.files import settle_file

logger = get_logger(__name__)

_PERCENTILES = (50, 90, 99, 100)
_BINS = 60
_PICTURES = (".svg", ".png", ".pdf")


def check_data(section: FinetuneDataSection, tokenizer_name: str, histogram: str | None) -> int:
    """Print counts, lengths, duplicates and what is wrong; 1 where records are wrong, else 0.

    Raises:
        DataError: when no record can be used.
        ConfigError: for a picture of an unknown kind.
    """
    if histogram is not None and Path(histogram).suffix.lower() not in _PICTURES:
        raise ConfigError(f"--histogram {histogram}: known kinds are {', '.join(_PICTURES)}")
    tokenizer = load_tokenizer(tokenizer_name)
    sets = find_sets(section)
    recipe = make_recipe(section, tokenizer, sets)
    print(f"chat template: {recipe.template.name}\n")
    wrong = False
    for number, part in enumerate(sets):
        if len(sets) > 1:
            print(f"{'' if number == 0 else chr(10)}=== {part.name}")
        if part.sources.left_out.count:
            print(f"{part.sources.left_out.text()}\n")
        sides = store_examples(section, part.sources, recipe, ("train", "dev"))
        print("\n\n".join("\n".join(_about(side, examples)) for side, examples in sides.items()))
        for line in _duplicates(sides):
            print(line)
        if histogram is not None:
            picture = _picture(Path(histogram), part.name if len(sets) > 1 else "")
            draw_lengths(sides, section.src_length, section.tgt_length, picture)
            logger.info(f"lengths drawn: {picture}")
        wrong = wrong or any(examples.counts.bad for examples in sides.values())
    return int(wrong)


def _picture(path: Path, name: str) -> Path:
    """Of several sets each has its own."""
    return path.with_stem(f"{path.stem}-{name.replace('/', '-')}") if name else path


def _about(side: str, examples: StoredExamples) -> Iterator[str]:
    counts, tokens = examples.counts, examples.lengths + 1
    yield f"{side}: {counts.records:,} records, {len(examples):,} examples, {int(tokens.sum()):,} tokens"
    yield f"  tokens of an example     {_percentiles(tokens)}"
    for name, title in (("context", "  before the last answer   "), ("answer", "  of the last answer       ")):
        yield title + _percentiles(examples.rows[name]) + "  (before anything is cut)"
    longest = int(tokens.argmax())
    yield f"  longest example          {examples.locate(longest)}"
    cut = counts.truncated / max(1, counts.records)
    yield f"  cut by the lengths       {counts.truncated:,} ({cut:.1%})"
    yield f"  nothing to train on      {counts.untrained:,}{_list(counts.first_untrained)}"
    if counts.unanswered:
        yield f"  end with a question      {counts.unanswered:,} (it is left out)"
    if counts.spelled:
        yield f"  spell a special token    {counts.spelled:,} (it is text there, unless --parse-special-tokens)"
    if counts.joined:
        yield f"  prompt joins its answer  {counts.joined:,} (by one token, which is not part of the prompt)"
    if counts.forgotten:
        yield f"  reasoning left out       {counts.forgotten:,} (of earlier answers, by the chat template)"
    if counts.unread:
        yield f"  fields that are not read {len(counts.unread):,}{_list(counts.unread)}"
    yield f"  wrong records            {counts.bad:,}{_list(counts.first_bad)}"


def _percentiles(values: np.ndarray) -> str:
    found = np.percentile(values, _PERCENTILES, method="lower").astype(int)
    return "  ".join(f"{'max' if p == 100 else f'{p}%'} {v:,}" for p, v in zip(_PERCENTILES, found, strict=True))


def _list(places: list[str]) -> str:
    return "".join(f"\n    {place}" for place in places)


def _duplicates(sides: dict[str, StoredExamples]) -> Iterator[str]:
    """Examples that are the same, token for token, within a side and between them (eight bytes are held of each)."""
    hashes = {side: _hashes(examples) for side, examples in sides.items()}
    for side, values in hashes.items():
        first, inverse = np.unique(values, return_index=True, return_inverse=True)[1:]
        repeats = np.flatnonzero(first[inverse] != np.arange(len(values)))
        examples = sides[side]
        shown = [f"{examples.locate(int(i))} repeats {examples.locate(int(first[inverse[i]]))}" for i in repeats[:5]]
        yield f"\n{side}: {len(repeats):,} examples repeat an earlier one, token for token{_list(shown)}"
    if len(hashes) == 2:
        both = np.flatnonzero(np.isin(hashes["dev"], hashes["train"]))
        shown = [sides["dev"].locate(int(i)) for i in both[:5]]
        yield f"dev: {len(both):,} examples stand in train too{_list(shown)}"


def _hashes(examples: StoredExamples) -> np.ndarray:
    return np.fromiter((int.from_bytes(h, "little") for h in examples.hash_contents()), np.uint64, len(examples))


def draw_lengths(sides: dict[str, StoredExamples], src_length: int, tgt_length: int, path: Path) -> None:
    """Histograms of prompt and answer lengths before anything is cut, with the limits."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("context", "tokens before the last answer", "--src_length", src_length),
              ("answer", "tokens of the last answer", "--tgt_length", tgt_length))  # fmt: skip
    for axes, (name, title, flag, limit) in zip(figure.subplots(1, 2), panels, strict=True):
        values = {side: np.asarray(examples.rows[name]) for side, examples in sides.items()}
        top = max(limit, *(int(v.max()) for v in values.values()))
        # Whole tokens in every bin; beyond a hundred times the limit a few long records would hide the others.
        edges = np.unique(np.linspace(0, min(top, 100 * limit) + 1, _BINS + 1).astype(int))
        for (side, lengths), color in zip(values.items(), ("#1864ab", "#d9480f"), strict=False):
            beyond = int(((lengths > limit) & sides[side].rows["truncated"]).sum())  # plain text is never cut
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
