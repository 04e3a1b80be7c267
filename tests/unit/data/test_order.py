"""The order of samples: the same for every batch size, every plan, and after every resume."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.data.corpus.order import SampleOrder, StreamOrder, iterate_micro_batches
from oarlock.data.corpus.sampler import ResumableBatchSampler


@given(size=st.integers(1, 60), seed=st.integers(0, 10**6), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_sample_once(size, seed, epoch):
    order = SampleOrder(size, seed)
    assert sorted(order[epoch * size + i] for i in range(size)) == list(range(size))


def test_epochs_and_seeds_have_different_orders():
    order = SampleOrder(50, 1)
    first, second = ([order[e * 50 + i] for i in range(50)] for e in (0, 1))
    assert first != second != [SampleOrder(50, 2)[i] for i in range(50)]


def test_the_order_does_not_change_between_versions():
    """If these numbers change, resumed runs train on other samples."""
    order = SampleOrder(10, 42)
    assert [order[i] for i in range(10)] == [5, 0, 6, 4, 2, 7, 3, 1, 8, 9]


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    replicas=st.integers(1, 4),
    start=st.integers(0, 50),
    steps=st.integers(0, 4),
)
def test_every_plan_takes_the_same_samples_in_each_step(batch, accumulation, replicas, start, steps):
    order = SampleOrder(37, 5)
    size = batch * accumulation * replicas
    stop = start + steps * size
    ranks = [list(iterate_micro_batches(order, start, stop, batch, accumulation, replicas, r)) for r in range(replicas)]
    for step in range(steps):
        taken = [i for rank in ranks for micro in rank[step * accumulation : (step + 1) * accumulation] for i in micro]
        expected = [order[p] for p in range(start + step * size, start + (step + 1) * size)]
        assert sorted(taken) == sorted(expected)
    assert all(len(rank) == steps * accumulation for rank in ranks)


def test_a_changed_batch_size_resumes_at_the_right_sample():
    order = SampleOrder(100, 3)
    before = ResumableBatchSampler(order, 8, 1, 1, 0, start_sample=0, steps_done=0, steps_left=3)
    after = ResumableBatchSampler(order, 3, 2, 1, 0, start_sample=24, steps_done=3, steps_left=4)
    seen = [i for batch in before for i in batch] + [i for batch in after for i in batch]
    assert seen == [order[p] for p in range(48)]
    assert len(before) == 3 and len(after) == (3 + 4) * 2


def test_stream_order_equals_the_position():
    order = StreamOrder(10)
    assert [order[i] for i in (0, 9, 10, 99)] == [0, 9, 10, 99]
