"""The picture of the ranks in the documentation."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from oarlock.parallel.plan import AXES, ParallelPlan

DOCS = Path(__file__).resolve().parents[3] / "docs"
spec = importlib.util.spec_from_file_location("draw_rank_map", DOCS / "tools" / "draw_rank_map.py")
drawing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drawing)


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(),
        ParallelPlan(world_size=4, data=4),
        ParallelPlan(world_size=8, tensor=2, pipeline=2, sharding=2, stage=2),
        ParallelPlan(world_size=128, data=2, sharding=4, stage=3, tensor=16, sequence_parallel=True),
        ParallelPlan(world_size=4, pipeline=4, virtual_pipeline=2, micro_batches=8),
        ParallelPlan(32, 2, 2, 2, 4, 2, micro_batches=4),
    ],
)
def test_the_picture_shows_every_rank_once_and_what_each_axis_carries(plan):
    svg = ElementTree.fromstring(drawing.draw_rank_map(plan))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    texts = list(svg.iter("{http://www.w3.org/2000/svg}text"))
    words = [element.text for element in texts]
    assert sorted(int(word) for word in words if word.isdigit()) == list(range(plan.world_size))
    assert plan.describe() in words
    for axis in AXES:
        assert (f"{axis} {getattr(plan, axis)}" in words) == (getattr(plan, axis) > 1)
    for element in texts:  # a letter is about half as wide as high
        reach = float(element.attrib["font-size"]) * 0.5 * len(element.text)
        middle = element.attrib["text-anchor"] == "middle"
        assert float(element.attrib["x"]) + (reach / 2 if middle else reach) <= width, element.text
        assert float(element.attrib["y"]) <= height


def test_a_large_plan_shows_its_first_rows():
    picture = drawing.draw_rank_map(ParallelPlan(world_size=80, data=40, tensor=2))
    assert "… and 24 more rows like these" in picture and ">31<" in picture and ">32<" not in picture


def test_the_picture_in_the_documentation_is_up_to_date():
    assert (DOCS / "images/rank_map.svg").read_text() == drawing.draw_rank_map(drawing.SHOWN_PLAN)
