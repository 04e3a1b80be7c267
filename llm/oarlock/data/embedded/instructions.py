"""Generated instruction data: small tasks in English and Chinese, each with one right answer.

The records and their order are the same on every machine. A hash of the prompt decides whether a record belongs to
train or dev, so the two never share a prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oarlock.data.embedded.words import (
    CAPITALS,
    DAYS,
    DAYS_CHINESE,
    ENGLISH_CHINESE,
    MONTHS,
    OPPOSITES,
    OPPOSITES_CHINESE,
)

_DEV_SHARE = 16  # one of this many prompts is held out
_WORDS = list(ENGLISH_CHINESE)
_WORDS_CHINESE = list(ENGLISH_CHINESE.values())

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """A task, its phrasings and its questions.

    Attributes:
        name: shown in tables.
        phrasings: equivalent instructions.
        pairs: returns all (input, answer) pairs, in a fixed order.
        sampled: number of records drawn from the product of phrasings and pairs, None for all.
    """

    name: str
    phrasings: tuple[str, ...]
    pairs: Callable[[], Pairs]
    sampled: int | None = None


def _pair_translations() -> Pairs:
    return list(ENGLISH_CHINESE.items())


def _pair_opposites(pairs: list[tuple[str, ...]]) -> Pairs:
    return [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]


def _pair_neighbors(names: list[str], step: int) -> Pairs:
    return [(name, names[(i + step) % len(names)]) for i, name in enumerate(names)]


def _make_word_rows(length: int, answer: Callable[[list[str]], str], words: list[str], join: str = " ") -> Pairs:
    rng = random.Random(f"{length}{words[0]}{join}")
    rows = [rng.sample(words, length) for _ in range(1200)]
    return [(join.join(row), answer(row)) for row in rows]


TASKS: tuple[Task, ...] = (
    Task(
        "translate to Chinese",
        (
            "Translate to Chinese.",
            "Say it in Chinese.",
            "What is this in Chinese?",
            "Give the Chinese word.",
            "Write the Chinese for this word.",
            "How do you say this in Chinese?",
            "请翻译成中文。",
            "用中文怎么说？",
        ),
        _pair_translations,
    ),
    Task(
        "translate to English",
        (
            "Translate to English.",
            "Say it in English.",
            "What is this in English?",
            "Give the English word.",
            "请翻译成英文。",
            "用英文怎么说？",
            "写出英文单词。",
            "这个词的英文是什么？",
        ),
        lambda: [(b, a) for a, b in _pair_translations()],
    ),
    Task(
        "opposite",
        (
            "Give the opposite.",
            "What is the opposite of this word?",
            "Write the antonym.",
            "Name the opposite word.",
            "Which word means the opposite?",
            "Find the antonym.",
        ),
        lambda: _pair_opposites(OPPOSITES),
    ),
    Task(
        "opposite, Chinese",
        (
            "写出反义词。",
            "反义词是什么？",
            "这个字的反义词是什么？",
            "请给出反义词。",
            "找出意思相反的字。",
            "相反的字是什么？",
        ),
        lambda: _pair_opposites(OPPOSITES_CHINESE),
    ),
    Task(
        "capital",
        (
            "Name the capital.",
            "What is the capital of this country?",
            "Give the capital city.",
            "Which city is the capital?",
            "Write the capital of this country.",
            "首都是哪里？",
            "这个国家的首都是什么？",
        ),
        lambda: list(CAPITALS.items()),
    ),
    Task(
        "next day or month",
        (
            "What comes next?",
            "Name the one after it.",
            "What follows?",
            "Which one comes after this?",
            "Give the one that follows.",
            "Write what comes right after.",
        ),
        lambda: _pair_neighbors(DAYS, 1) + _pair_neighbors(MONTHS, 1),
    ),
    Task(
        "previous day or month",
        (
            "What comes before?",
            "Name the one before it.",
            "Which one comes right before this?",
            "Give the one that precedes.",
            "What was before this?",
            "Write what comes just before.",
        ),
        lambda: _pair_neighbors(DAYS, -1) + _pair_neighbors(MONTHS, -1),
    ),
    Task(
        "next day, Chinese",
        (
            "后一天是星期几？",
            "第二天是星期几？",
            "写出后一天。",
            "下一天是哪一天？",
            "之后的一天是什么？",
            "明天是星期几？",
        ),
        lambda: _pair_neighbors(DAYS_CHINESE, 1),
    ),
    Task(
        "repeat",
        ("Repeat the words.", "Copy this text.", "Say it again.", "Write the same words."),
        lambda: _make_word_rows(2, " ".join, _WORDS),
        sampled=1600,
    ),
    Task(
        "first word",
        ("Give the first word.", "What is the first word?", "Write the first word.", "Which word comes first?"),
        lambda: _make_word_rows(3, lambda row: row[0], _WORDS),
        sampled=1200,
    ),
    Task(
        "last word",
        ("Give the last word.", "What is the last word?", "Write the last word.", "Which word comes last?"),
        lambda: _make_word_rows(3, lambda row: row[-1], _WORDS),
        sampled=1200,
    ),
    Task(
        "repeat, Chinese",
        ("请重复。", "再说一遍。", "照样写一遍。", "抄写下面的词。"),
        lambda: _make_word_rows(2, "、".join, _WORDS_CHINESE, "、"),
        sampled=1200,
    ),
)


def make_instruction_records(split: str) -> list[dict[str, str]]:
    """Make the records of "train" or "dev" in Alpaca form (instruction, input, output), with the task's name."""
    if split not in ("train", "dev"):
        raise ValueError(f"split must be train or dev, got {split!r}")
    records = []
    for task in TASKS:
        grid = [
            {"instruction": phrasing, "input": question, "output": answer, "task": task.name}
            for question, answer in dict(task.pairs()).items()
            for phrasing in task.phrasings
        ]
        if task.sampled is not None:
            grid = random.Random(task.name).sample(grid, min(task.sampled, len(grid)))
        for record in grid:
            prompt = f"{record['instruction']}\n{record['input']}".encode()
            is_held_out = int.from_bytes(hashlib.sha256(prompt).digest()[:4], "big") % _DEV_SHARE == 0
            if is_held_out == (split == "dev"):
                records.append(record)
    random.Random(split).shuffle(records)
    return records


def write_instructions(folder: str | Path) -> dict[str, int]:
    """Write train.json and dev.json, which are lists of records. Returns the number of records of each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in ("train", "dev"):
        records = make_instruction_records(split)
        text = json.dumps(records, ensure_ascii=False, indent=1)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
        counts[split] = len(records)
    return counts
