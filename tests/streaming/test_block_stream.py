"""The order of copies and blocks, in a model of two queues that run in every order that the marks allow."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from copy_queues import DelayedCopy, TwoQueues
from hypothesis import given
from hypothesis import strategies as st
from streamed_weights import Weight, check, make, step_through
from torch import Tensor

from lowvram_i2v.streaming.block_stream import streamed_places
from lowvram_i2v.streaming.copy_queue import SynchronousCopy

RUNS = 1000


def run(seed: int, make_queue: type[TwoQueues] = TwoQueues) -> None:
    """A random stream whose blocks are all in host memory."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 200, 256, 257, 700)) for _ in range(draw.randint(1, 12))]
    slots = draw.randint(2, 4)
    made = make(sizes, draw.randint(-1, len(sizes)), slots)
    queue = make_queue(seed)
    step_through(draw, made.blocks, queue, made.stream(slots, queue))


def test_no_block_is_read_before_it_lands_and_none_overwritten_before_it_was_used() -> None:
    for seed in range(RUNS):
        run(seed)


class ComputesTooEarly(TwoQueues):
    """Forgets that computing waits for a copy."""

    def wait_copied(self, landed: int) -> None:
        return None


class CopiesTooEarly(TwoQueues):
    """Forgets that a copy waits for computing."""

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        self.reached.add(after)
        return super().copy(target, source, after)


@pytest.mark.parametrize("broken", [ComputesTooEarly, CopiesTooEarly])
def test_the_model_of_two_queues_sees_both_faults(broken: type[TwoQueues]) -> None:
    faults = 0
    for seed in range(100):
        try:
            run(seed, broken)
        except AssertionError as error:
            faults += "sees" in str(error)
    assert faults > 10


@given(blocks=st.integers(1, 70), resident=st.integers(-1, 75), slots=st.integers(2, 5))
def test_the_resident_set_is_spread_evenly(blocks: int, resident: int, slots: int) -> None:
    places = streamed_places(blocks, resident, slots)
    if resident < 0 or blocks - resident <= slots:
        assert places == []
        return
    assert len(places) == len(set(places)) == blocks - resident
    assert all(0 <= place < blocks for place in places)
    around = [*places, places[0] + blocks]
    gaps = [after - before for before, after in pairwise(around)]
    assert max(gaps) - min(gaps) <= 1


def test_one_copy_a_block_and_the_next_step_is_under_way_when_one_ends() -> None:
    made = make([300, 900, 10, 20, 500, 600, 70], resident=2, slots=2)
    queue, slabs = DelayedCopy(), made.slabs
    stream = made.stream(2, queue)
    pointers = {address for address, _ in queue.copies}
    for step in range(3):
        assert len(queue.copies) == 2 + step * len(slabs), "two slots ahead, then one copy a block"
        assert len(queue.under_way) == 2, "the step's first two blocks are on their way before it begins"
        for block in stream:
            check(block)
            assert isinstance(block, Weight)
            queue.use(block.weight.data_ptr())
    assert {address for address, _ in queue.copies} == pointers, "two slots, and no other memory"
    assert sum(size for _, size in queue.copies[2:]) == 3 * sum(map(len, slabs.values()))


@pytest.mark.parametrize("stop", range(7))
def test_a_step_after_an_abandoned_one_starts_from_the_first_block(stop: int) -> None:
    queue = DelayedCopy()
    stream = make([300, 900, 10, 20, 500, 600, 70], resident=2, slots=3).stream(3, queue)

    def compute(limit: int) -> list[int]:
        seen = []
        for block in stream:
            assert isinstance(block, Weight)
            if block.number == limit:
                raise MemoryError
            check(block)
            queue.use(block.weight.data_ptr())
            seen.append(block.number)
        return seen

    assert compute(99) == list(range(7))
    with pytest.raises(MemoryError):
        compute(stop)
    assert compute(99) == list(range(7))
    assert compute(99) == list(range(7))


def test_an_abandoned_step_cannot_go_on_beside_a_new_one() -> None:
    stream = make([8] * 5, resident=0, slots=2).stream(2, SynchronousCopy())
    old = iter(stream)
    next(old)
    next(iter(stream))
    with pytest.raises(RuntimeError, match="given up"):
        next(old)


def test_resident_blocks_are_never_copied_and_all_resident_needs_no_slot() -> None:
    made = make([64] * 6, resident=-1, slots=2)
    queue, blocks = DelayedCopy(), made.blocks
    stream = made.stream(2, queue)
    addresses = [block.weight.data_ptr() for block in blocks]
    for _ in range(2):
        for block in stream:
            check(block)
    assert not made.slabs
    assert not queue.copies
    assert [block.weight.data_ptr() for block in blocks] == addresses


def test_one_slot_is_refused() -> None:
    made = make([8] * 5, resident=0, slots=2)
    with pytest.raises(ValueError, match="not 1"):
        made.stream(1, SynchronousCopy())
