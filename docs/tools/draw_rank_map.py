"""Draw a plan as an SVG: the position of every rank, and what each axis communicates.

python docs/tools/draw_rank_map.py    writes docs/images/rank_map.svg
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from oarlock.parallel.plan import Axis, Coordinates, ParallelPlan

_COLOURS: dict[Axis, str] = {"tensor": "#d9480f", "pipeline": "#2b8a3e", "sharding": "#1864ab", "data": "#862e9c"}
_ORDER: tuple[Axis, ...] = ("tensor", "pipeline", "sharding", "data")  # from most communication to least
_INK, _GREY, _LINE = "#212529", "#667079", "#ced4da"

_MARGIN, _BOX_WIDTH, _BOX_HEIGHT, _BOX_GAP, _PAD = 24, 46, 40, 4, 8
_PER_LINE = 8  # boxes per line of a cell
_LABELS = 176  # width of the labels, left of the cells
_COLUMN_GAP, _ROW_GAP, _DATA_GAP = 46, 10, 16
_TOP = 112
_MAX_ROWS = 16
_LEGEND_ROW = 48
_WHAT_X = _MARGIN + 2 * _LABELS + 70
# The plan that README.md and docs/parallelism.md show.
SHOWN_PLAN = ParallelPlan(world_size=8, sharding=2, stage=2, tensor=2, pipeline=2, micro_batches=4)
_KEY = (
    "Rows: data shards. Frames: tensor ranks of a stage. Same colour: same shard of the model. "
    "Dots: groups of rank 0, listed below."
)


def draw_rank_map(plan: ParallelPlan) -> str:
    """An SVG with a row per data replica, a column per pipeline stage, and the tensor ranks inside each cell."""
    rows = min(plan.replicas, _MAX_ROWS)
    parts = [*_cells(plan, rows), *_brackets(plan, rows), *_headings(plan)]
    bottom = _row_y(plan, rows - 1) + _cell_height(plan)
    if plan.replicas > rows:
        bottom += 26
        parts.append(_text(_MARGIN, bottom, f"… and {plan.replicas - rows} more rows like these", 13, _GREY))
    legend = [axis for axis in _ORDER if getattr(plan, axis) > 1]
    parts += _legend(plan, legend, bottom + 40)
    height = bottom + (64 + _LEGEND_ROW * len(legend) if legend else 0) + _MARGIN
    map_width = _LABELS + plan.pipeline * (_cell_width(plan) + _COLUMN_GAP) - _COLUMN_GAP
    sentences = [(_WHAT_X, 12, _traffic(plan, axis)[1]) for axis in legend]
    sentences += [(_MARGIN, 17, plan.describe()), (_MARGIN, 13, _KEY)]
    # A letter is about half as wide as high.
    width = max(_MARGIN + map_width, *(x + math.ceil(size / 2 * len(words)) for x, size, words in sentences)) + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Inter, Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(plan.describe())}</title>\n"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# geometry


def _cell_width(plan: ParallelPlan) -> int:
    return min(plan.tensor, _PER_LINE) * (_BOX_WIDTH + _BOX_GAP) - _BOX_GAP + 2 * _PAD


def _cell_height(plan: ParallelPlan) -> int:
    return math.ceil(plan.tensor / _PER_LINE) * (_BOX_HEIGHT + _BOX_GAP) - _BOX_GAP + 2 * _PAD


def _column_x(plan: ParallelPlan, stage: int) -> int:
    return _MARGIN + _LABELS + stage * (_cell_width(plan) + _COLUMN_GAP)


def _row_y(plan: ParallelPlan, row: int) -> int:
    return _TOP + row * (_cell_height(plan) + _ROW_GAP) + (row // plan.sharding * _DATA_GAP if plan.sharding > 1 else 0)


# parts


def _headings(plan: ParallelPlan) -> Iterator[str]:
    yield _text(_MARGIN, 38, plan.describe(), 17, _INK, "600")
    yield _text(_MARGIN, 62, _KEY, 13, _GREY)
    for stage in range(plan.pipeline):
        words = f"pipeline stage {stage}" if _cell_width(plan) > 110 else f"stage {stage}"
        if plan.pipeline > 1:
            yield _text(_column_x(plan, stage) + _cell_width(plan) / 2, _TOP - 12, words, 13, _INK, "600", "middle")


def _cells(plan: ParallelPlan, rows: int) -> Iterator[str]:
    groups = {axis: set(plan.groups(axis)[0]) for axis in _ORDER if getattr(plan, axis) > 1}
    for row in range(rows):
        data, sharding = divmod(row, plan.sharding)
        y = _row_y(plan, row)
        yield from _row_label(plan, row, y + _cell_height(plan) / 2)
        for stage in range(plan.pipeline):
            x = _column_x(plan, stage)
            outline = _COLOURS["tensor"] if plan.tensor > 1 else _LINE
            yield (
                f'<rect x="{x}" y="{y}" width="{_cell_width(plan)}" height="{_cell_height(plan)}" rx="8" '
                f'fill="#f8f9fa" stroke="{outline}" stroke-width="1.5"/>'
            )
            if stage > 0:
                yield from _arrow(x - _COLUMN_GAP + 4, x - 4, y + _cell_height(plan) / 2)
            for tensor in range(plan.tensor):
                line, place = divmod(tensor, _PER_LINE)
                left = x + _PAD + place * (_BOX_WIDTH + _BOX_GAP)
                top = y + _PAD + line * (_BOX_HEIGHT + _BOX_GAP)
                at = Coordinates(data, stage, sharding, tensor)
                dots = [_COLOURS[axis] for axis, ranks in groups.items() if plan.rank(at) in ranks]
                yield from _rank_box(plan, at, left, top, dots)


def _row_label(plan: ParallelPlan, row: int, y: float) -> Iterator[str]:
    data, sharding = divmod(row, plan.sharding)
    names = [f"data {data}"] * (plan.data > 1) + [f"sharding {sharding}"] * (plan.sharding > 1)
    if names:
        yield _text(_MARGIN + 40, y - 2, ", ".join(names), 13, _INK)
        yield _text(_MARGIN + 40, y + 14, f"dataset rank {row}", 11, _GREY)


def _rank_box(plan: ParallelPlan, at: Coordinates, x: float, y: float, dots: list[str]) -> Iterator[str]:
    yield (
        f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" '
        f'fill="{_shard_colour(plan, at)}" stroke="#ffffff"/>'
    )
    yield _text(x + _BOX_WIDTH / 2, y + 20, str(plan.rank(at)), 15, _INK, "600", "middle")
    first = x + _BOX_WIDTH / 2 - (len(dots) - 1) * 5
    for i, colour in enumerate(dots):
        yield f'<circle cx="{first + 10 * i}" cy="{y + 31}" r="3.5" fill="{colour}"/>'


def _shard_colour(plan: ParallelPlan, at: Coordinates) -> str:
    """A pale hue per stage, slightly darker for each tensor rank."""
    hue = (0.58 + at.pipeline / plan.pipeline) % 1.0
    lightness = 0.92 - 0.16 * at.tensor / max(1, plan.tensor - 1)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.45))


def _arrow(start: float, stop: float, y: float) -> Iterator[str]:
    """Arrows in both directions between two stages."""
    colour = _COLOURS["pipeline"]
    for tail, tip, height in ((start, stop, y - 5), (stop, start, y + 5)):
        back = math.copysign(6, tail - tip)
        yield (
            f'<path d="M{tail} {height} H{tip} m{back} -4 L{tip} {height} l{back} 4" fill="none" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )


def _brackets(plan: ParallelPlan, rows: int) -> Iterator[str]:
    """Brackets left of the rows: which of them shard their state, and which are replicas of each other."""
    height = _cell_height(plan)
    for first in range(0, rows, plan.sharding):
        last = min(first + plan.sharding, rows) - 1
        if plan.sharding > 1:
            yield _bracket(_MARGIN + 28, _row_y(plan, first) + 4, _row_y(plan, last) + height - 4, _COLOURS["sharding"])
    if plan.data > 1:
        yield _bracket(_MARGIN + 10, _row_y(plan, 0) + 4, _row_y(plan, rows - 1) + height - 4, _COLOURS["data"])


def _bracket(x: float, top: float, bottom: float, colour: str) -> str:
    return f'<path d="M{x + 7} {top} H{x} V{bottom} h7" fill="none" stroke="{colour}" stroke-width="2.5"/>'


def _legend(plan: ParallelPlan, axes: list[Axis], top: float) -> Iterator[str]:
    columns = (_MARGIN + 22, _MARGIN + _LABELS, _WHAT_X)
    for x, words in zip(columns, ("axis", "rank 0's group", "what it communicates"), strict=True):
        if axes:
            yield _text(x, top, words, 12, _GREY)
    for i, axis in enumerate(axes):
        y = top + 28 + i * _LEGEND_ROW
        degree = getattr(plan, axis)
        what, how = _traffic(plan, axis)
        ranks = " ".join(map(str, plan.groups(axis)[0]))
        if len(ranks) > 30:
            ranks = ranks[:30].rsplit(" ", 1)[0] + " …"
        yield f'<circle cx="{_MARGIN + 6}" cy="{y - 5}" r="6" fill="{_COLOURS[axis]}"/>'
        yield _text(columns[0], y, f"{axis} {degree}", 14, _INK, "600")
        count = plan.world_size // degree
        yield _text(columns[0], y + 17, f"{count} group{'s' * (count > 1)} of {degree}", 12, _GREY)
        yield _text(columns[1], y, ranks, 14, _INK)
        yield _text(columns[2], y, what, 14, _INK)
        yield _text(columns[2], y + 17, how, 12, _GREY)


def _traffic(plan: ParallelPlan, axis: Axis) -> tuple[str, str]:
    """What an axis communicates, and how often."""
    if axis == "tensor":
        how = "all-gather and reduce-scatter" if plan.sequence_parallel else "all-reduce"
        return "activations", f"{how}, 4 per layer and micro-batch (2 forward, 2 backward)"
    if axis == "pipeline":
        loops = f"; {plan.virtual_pipeline} rounds, with a link from the last stage to the first"
        how = "point to point between neighbours, per micro-batch"
        return "activations forward, their gradients back", how + (loops if plan.virtual_pipeline > 1 else "")
    if axis == "data":
        return "gradients", "all-reduce, once per step"
    return {
        1: ("gradients, then updated parameters", "reduce to their owner and broadcast, once per step"),
        2: ("gradients, then updated parameters", "reduce to their owner per micro-batch, broadcast once per step"),
        3: ("parameters and gradients", "all-gather for forward and for backward, reduce; per micro-batch"),
    }[plan.stage]


def _text(x: float, y: float, words: str, size: int, colour: str, weight: str = "400", anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


if __name__ == "__main__":
    picture = Path(__file__).resolve().parents[1] / "images" / "rank_map.svg"
    picture.write_text(draw_rank_map(SHOWN_PLAN), encoding="utf-8")
