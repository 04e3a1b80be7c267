"""The picture of a plan."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from oarlock.parallel.plan import AXES, ParallelPlan
from oarlock.parallel.plan_drawing import draw_rank_map
from support.plans import FOUR_D, plan_of

# the picture


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(),
        plan_of(data=4),
        plan_of(tensor=2, pipeline=2, sharding=2, stage=2),
        plan_of(data=2, sharding=4, stage=3, tensor=16, sequence_parallel=True),
        plan_of(pipeline=4, virtual_pipeline=2, micro_batches=8),
        FOUR_D,
    ],
)
def test_the_picture_shows_every_rank_once_and_what_each_axis_carries(plan):
    svg = ElementTree.fromstring(draw_rank_map(plan))
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
    picture = draw_rank_map(plan_of(data=40, tensor=2))
    assert "… and 24 more rows like these" in picture and ">31<" in picture and ">32<" not in picture
