"""`oarlock data embedded`: a tokenizer, a pretraining corpus and instructions in one folder."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from oarlock.data.corpus.build_corpus import BuildOptions, build_from_sources
from oarlock.data.corpus.index_format import FORMAT, check_corpus, is_corpus_present
from oarlock.data.embedded.instructions import write_instructions
from oarlock.data.embedded.stdlib_text import find_stdlib_sources
from oarlock.data.embedded.tokenizer import train_tokenizer
from oarlock.data.tokenizers.load import load_encoder
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import count_available_cores
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
    corpus = build_embedded_corpus(folder / "pretrain", str(folder / "tokenizer"))
    _remove_other_corpora(corpus)
    counts = write_instructions(folder / "instructions")
    logger.info(
        f"{counts['train']:,} instructions to train on, {counts['dev']:,} held out, in {folder / 'instructions'}"
    )


def _remove_other_corpora(corpus: Path) -> None:
    """Remove corpora of another tokenizer or an earlier version, which --input_dir with this folder would blend."""
    for path in corpus.parent.glob(f"{CORPUS_NAME}-*"):
        if path.suffix in (".bin", ".idx", ".json") and path.stem != corpus.name:
            path.unlink()
            logger.info(f"{path}: removed, of another tokenizer or an earlier version")


def build_embedded_corpus(folder: str | Path, tokenizer: str) -> Path:
    """Build the corpus of the embedded text for a tokenizer, if it does not exist. Returns its prefix."""
    # The text depends on the version of Python.
    python = hashlib.sha256(f"{platform.python_version()} {FORMAT}".encode()).hexdigest()[:6]
    prefix = Path(folder) / f"{CORPUS_NAME}-{load_encoder(tokenizer).fingerprint}-{python}"
    with locked(Path(folder) / f".{prefix.name}.lock"):  # the first rank builds it, the others wait
        if is_corpus_present(prefix):
            check_corpus(prefix)
            return prefix
        sources = find_stdlib_sources()
        logger.info(f"tokenising {sum(s.size for s in sources) / 1e6:.1f} MB of the standard library")
        report = build_from_sources(
            sources,
            BuildOptions(inputs=(), tokenizer=tokenizer, output_prefix=str(prefix), workers=count_available_cores()),
        )
        logger.info(f"{report.documents:,} files, {report.tokens:,} tokens in {report.seconds:.1f} s: {prefix}.bin")
    return prefix
