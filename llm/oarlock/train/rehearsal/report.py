"""The result of a rehearsal as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from oarlock.parallel.plan import AXES
from oarlock.train.rehearsal.rehearse import TOLERANCE, Verdict


def format_report(verdict: Verdict) -> str:
    """Format the verdict, a table of the ranks, and the traffic of their groups."""
    lines = [""]
    if verdict.reports:
        lines += _format_ranks(verdict)
        lines += ["", *_format_traffic(verdict), ""]
        rows = [("step", "loss, these ranks", "loss, one process", "gradient norm")]
        first = verdict.reports[0]
        for step, (loss, expected, norm) in enumerate(
            zip(first.losses, verdict.reference.losses, first.grad_norms, strict=False), start=1
        ):
            rows.append((str(step), f"{loss:.7f}", f"{expected:.7f}", f"{norm:.6f}"))
        lines += [*_align_columns(rows), ""]
    if verdict.problem:
        lines.append(f"DIFFERS from one process: {verdict.problem}")
    else:
        steps = len(verdict.reference.losses)
        worst = max(report.difference for report in verdict.reports)
        lines.append(
            f"SAME as one process: {steps} losses and gradient norms to {TOLERANCE:g} relative, every weight after "
            f"every step to {TOLERANCE:g} (largest difference {worst:.1e}), and the evaluation loss"
        )
    return "\n".join(lines)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Convert the verdict to JSON."""
    return {
        "same": verdict.problem is None,
        "problem": verdict.problem,
        "plan": asdict(verdict.plan),
        "one_process": asdict(verdict.reference),
        "ranks": [asdict(report) for report in verdict.reports],
    }


def _format_ranks(verdict: Verdict) -> list[str]:
    plan = verdict.plan
    axes = ["data", "stage", "sharding", "tensor", *(["experts"] if plan.expert > 1 else [])]
    rows: list[tuple[str, ...]] = [("rank", *axes, "parameters", "gradients", "optimizer", "largest difference")]
    for rank, report in enumerate(verdict.reports):
        at = plan.coordinates(rank)
        sizes = (report.parameter_bytes, report.gradient_bytes, report.optimizer_bytes)
        place = (at.data, at.pipeline, at.sharding, at.tensor, plan.expert_rank(rank))[: len(axes)]
        rows.append((str(rank), *map(str, place), *(f"{size:,} B" for size in sizes), f"{report.difference:.1e}"))
    one = verdict.reference
    sizes = (one.parameter_bytes, one.gradient_bytes, one.optimizer_bytes)
    rows.append(("one", *"-" * len(axes), *(f"{size:,} B" for size in sizes), "-"))
    return _align_columns(rows)


def _format_traffic(verdict: Verdict) -> list[str]:
    """Format the collectives of the last step by kind of group, for the busiest rank of each kind."""
    plan = verdict.plan
    groups = [("experts", plan.expert_groups()), ("same experts", plan.expert_copies())] if plan.expert > 1 else []
    groups += [(axis, plan.groups(axis)) for axis in AXES]
    kinds = {tuple(ranks): kind for kind, listed in groups for ranks in listed}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for report in verdict.reports:
        for name, (calls, num_bytes) in report.collectives.items():
            operation, _, listed = name.partition(" over ")
            ranks = tuple(int(rank) for rank in listed.split(","))
            kind = kinds.get(ranks) or ("all ranks" if len(ranks) == plan.world_size else f"ranks {listed}")
            key = (kind, operation)
            found[key] = max(found.get(key, (0, 0)), (calls, num_bytes), key=lambda pair: pair[1])
    rows = [("group", "operation", "calls a step", "bytes a step")]
    rows += [
        (kind, operation, f"{calls:,}", f"{num_bytes:,}")
        for (kind, operation), (calls, num_bytes) in sorted(found.items())
    ]
    return _align_columns(rows)


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
