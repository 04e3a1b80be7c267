"""`oarlock data show`: examples as the model sees them. Tokens that are trained on are marked."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from oarlock.config.finetune import FinetuneDataSection
from oarlock.data.corpus.blend import parse_blend
from oarlock.data.corpus.dataset import Corpus, PretrainDataset, parse_input
from oarlock.data.corpus.index_format import is_corpus_present
from oarlock.data.corpus.tokenizer_check import check_corpus_tokenizers
from oarlock.data.examples.dataset import make_encoding_settings
from oarlock.data.examples.encode import Counts, encode_source
from oarlock.data.examples.labels import IGNORE_INDEX, Encoded, Example
from oarlock.data.records.datasets import find_sets
from oarlock.data.templates.special_token_text import compile_spellings
from oarlock.data.tokenizers.load import list_special_spellings, load_tokenizer

_GREEN, _DIM, _OFF = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def show_data(section: FinetuneDataSection, tokenizer_name: str, num: int, max_seq_length: int, color: bool) -> None:
    """Print the first `num` examples of a corpus or of fine-tuning data."""
    tokenizer = load_tokenizer(tokenizer_name)
    path = section.dataset_name_or_path
    if path is not None and _is_corpus(path):
        for _, prefix in parse_input(path):
            check_corpus_tokenizers([prefix], tokenizer, tokenizer_name, allow_other=True)
            _show_corpus(prefix, tokenizer, num, max_seq_length, color)
        return
    sets = find_sets(section)
    settings = make_encoding_settings(section, tokenizer, sets)
    legend = f"{_GREEN}trained on{_OFF}, {_DIM}read only{_OFF}" if color else "⟦trained on⟧, the rest is read only"
    print(f"chat template: {settings.template.name}; {legend}\n")
    counts = Counts()
    rows = (
        (source.name, row)
        for each in sets
        for source in each.sources.train
        for part, _ in encode_source(source, settings, counts)
        for row in part
    )
    for number, (name, row) in enumerate(itertools.islice(rows, num), 1):
        example = row.encoded.to_example()
        trained = sum(label != IGNORE_INDEX for label in example.labels)
        note = ", truncated" if example.truncated else ""
        if spellings := list_special_spellings(tokenizer):
            special = set(tokenizer.convert_tokens_to_ids(list(spellings)))
            text = tokenizer.decode(list(row.encoded.ids), skip_special_tokens=False)
            spelled = len(compile_spellings(spellings).findall(text)) - sum(id_ in special for id_ in row.encoded.ids)
            note += f", {spelled} special tokens spelled as text" if spelled > 0 else ""
        print(f"--- example {number}, {name}:{row.line}: {len(row.encoded.ids)} tokens, {trained} trained on{note}")
        print(mark_trained(row.encoded, tokenizer, color) + "\n")
    if counts.bad:
        print(f"{counts.bad:,} bad records skipped:" + "".join(f"\n  {line}" for line in counts.first_bad))
    for line in replace(counts, bad=0, unread=[]).describe("so far"):
        print(line)
    if not counts.records + counts.bad:
        print("no records")
    for field in counts.unread:
        print(f"{field} is ignored")


def _is_corpus(path: str) -> bool:
    folder = Path(path)
    if folder.is_dir():
        return any(folder.glob("*.idx")) or any(folder.glob("*_idx.npz"))
    if is_corpus_present(path):
        return True
    return all(is_corpus_present(name) for _, name in parse_blend(path, "PATH", lambda name: Path(name).exists()))


def _show_corpus(prefix: str, tokenizer: Any, num: int, max_seq_length: int, color: bool) -> None:
    corpus = Corpus.open(prefix)
    dataset = PretrainDataset(corpus, range(corpus.num_documents), max_seq_length, seed=42)
    print(f"{prefix}: {corpus.num_documents:,} documents, {len(dataset):,} samples of {max_seq_length} tokens")
    print("every token but the first of a sample is trained on\n")
    for number in range(min(num, len(dataset))):
        ids = dataset[number]["text"].tolist()
        print(f"--- sample {number + 1}: {len(ids)} tokens")
        print(mark_trained(Example(ids[:-1], ids[1:], False), tokenizer, color) + "\n")


def mark_trained(example: Encoded | Example, tokenizer: Any, color: bool) -> str:
    """Return the text of an example with the ranges that are trained on in green, or in ⟦ ⟧.

    The last token of an Example is omitted if it is not trained on, because its id is unknown.
    """
    if isinstance(example, Encoded):
        tokens, labels = list(example.ids), example.to_example().labels
    else:
        known = [label for label in example.labels[-1:] if label != IGNORE_INDEX]
        tokens, labels = [*example.input_ids, *known], example.labels
    flags = [False, *(label != IGNORE_INDEX for label in labels)][: len(tokens)]
    parts, start, done = [], 0, ""
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or flags[i] != flags[start]:
            # Decode from the start, because some tokenizers decode the start of a text differently.
            decoded = tokenizer.decode(tokens[:i], skip_special_tokens=False)
            joined = decoded.startswith(done)
            text = decoded[len(done) :] if joined else tokenizer.decode(tokens[start:i], skip_special_tokens=False)
            done, kept = decoded, flags[start]
            if kept:
                parts.append(f"{_GREEN}{text}{_OFF}" if color else f"⟦{text}⟧")
            else:
                parts.append(f"{_DIM}{text}{_OFF}" if color else text)
            start = i
    return "".join(parts)
