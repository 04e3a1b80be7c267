"""`oarlock data embedded`: tokenizer, pretraining corpus and instructions in one folder, made once."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from oarlock.data.corpus.build_corpus import BuildOptions, build_from_sources
from oarlock.data.corpus.index_format import FORMAT, check_corpus, corpus_exists
from oarlock.data.embedded.instructions import write_instructions
from oarlock.data.embedded.stdlib_text import stdlib_sources
from oarlock.data.embedded.tokenizer import train_tokenizer
from oarlock.data.tokenizers.load import load_encoder
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import available_cores
from oarlock.files import locked

logger = get_logger(__name__)

CORPUS_NAME = "stdlib"


def prepare_embedded(folder: str | Path, vocab_size: int = 4096) -> None:
    """Make folder/tokenizer, folder/pretrain/stdlib.{bin,idx} and folder/instructions/{train,dev}.json."""
    folder = Path(folder)
    logger.info(
        f"training a tokenizer of {vocab_size:,} tokens on the standard library of Python {platform.python_version()}"
    )
    train_tokenizer(folder / "tokenizer", vocab_size)
    corpus = embedded_corpus(folder / "pretrain", str(folder / "tokenizer"))
    _remove_others(corpus)
    counts = write_instructions(folder / "instructions")
    logger.info(
        f"{counts['train']:,} instructions to train on, {counts['dev']:,} held out, in {folder / 'instructions'}"
    )


def _remove_others(corpus: Path) -> None:
    """Those of another tokenizer or an earlier version: --input_dir of the folder would blend them."""
    for path in corpus.parent.glob(f"{CORPUS_NAME}-*"):
        if path.suffix in (".bin", ".idx", ".json") and path.stem != corpus.name:
            path.unlink()
            logger.info(f"{path}: removed, of another tokenizer or an earlier version")


def embedded_corpus(folder: str | Path, tokenizer: str) -> Path:
    """The embedded text in a tokenizer's ids; built if it is not there yet. Returns the corpus prefix."""
    prefix = Path(folder) / f"{CORPUS_NAME}-{_fingerprint(tokenizer)}"
    with locked(Path(folder) / f".{prefix.name}.lock"):  # the first of several ranks builds it, the others wait
        return _corpus_at(prefix, tokenizer)


def _corpus_at(prefix: Path, tokenizer: str) -> Path:
    if corpus_exists(prefix):
        check_corpus(prefix)
        return prefix
    sources = stdlib_sources()
    logger.info(f"tokenising {sum(s.size for s in sources) / 1e6:.1f} MB of the standard library")
    report = build_from_sources(
        sources, BuildOptions(inputs=(), tokenizer=tokenizer, output_prefix=str(prefix), workers=available_cores())
    )
    logger.info(f"{report.documents:,} files, {report.tokens:,} tokens in {report.seconds:.1f} s: {prefix}.bin")
    return prefix


def _fingerprint(tokenizer: str) -> str:
    """Changes with the tokenizer, the Python that gives the text, or the way in which it is written."""
    python = hashlib.sha256(f"{platform.python_version()} {FORMAT}".encode()).hexdigest()[:6]
    return f"{load_encoder(tokenizer).fingerprint}-{python}"
