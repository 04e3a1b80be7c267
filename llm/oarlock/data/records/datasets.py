"""The datasets of --dataset_name_or_path: their sources, names and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.data.corpus.blend import make_short_names, parse_blend
from oarlock.data.embedded.instructions import make_instruction_records
from oarlock.data.records.columns import Columns, MappedRecords
from oarlock.data.records.dataset_resolver import RecordSources, find_records
from oarlock.data.records.record_stream import RowRecords
from oarlock.environment.console import get_logger

if TYPE_CHECKING:
    from oarlock.config.finetune import FinetuneDataSection

logger = get_logger(__name__)

EMBEDDED = "embedded instructions"


@dataclass
class RecordSet:
    """One of the datasets of --dataset_name_or_path.

    Attributes:
        name: short, for metrics and messages.
        weight: None to use each record once per epoch.
    """

    name: str
    weight: float | None
    sources: RecordSources


def find_sets(section: FinetuneDataSection) -> list[RecordSet]:
    """Find the datasets of --dataset_name_or_path. The default is the embedded instructions."""
    if section.dataset_name_or_path is None:
        logger.info(
            "no --dataset_name_or_path: fine-tuning on the embedded instructions (small English and Chinese tasks)"
        )
        train, dev = (RowRecords(f"{EMBEDDED}, {side}", make_instruction_records(side)) for side in ("train", "dev"))
        return [_apply_columns(RecordSet(EMBEDDED, 1.0, RecordSources([train], [dev])), section)]
    pairs = parse_blend(section.dataset_name_or_path, "--dataset_name_or_path", lambda name: Path(name).exists())
    names = make_short_names([name for _, name in pairs])
    return [
        _apply_columns(RecordSet(short, weight, find_records(name)), section)
        for short, (weight, name) in zip(names, pairs, strict=True)
    ]


def _apply_columns(part: RecordSet, section: FinetuneDataSection) -> RecordSet:
    """Apply --columns to a dataset."""
    if section.columns is None:
        return part
    columns = Columns.parse(section.columns, section.data_format)
    train, dev = (
        [MappedRecords(source, columns) for source in side] for side in (part.sources.train, part.sources.dev)
    )
    return replace(part, sources=RecordSources(list(train), list(dev), part.sources.left_out))
