"""The order of copies and blocks, in a model of two queues that run in every order that the marks allow."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from copy_queues import DelayedCopy, TwoQueues
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowvram_i2v.streaming.block_stream import BlockStream, Slab, streamed_places
from lowvram_i2v.streaming.copy_queue import SynchronousCopy
from lowvram_i2v.streaming.slab import layout_of

CPU = torch.device("cpu")
RUNS = 1000


class Weight(nn.Module):
    """A block that is nothing but bytes, all equal to its number."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.number = number
        self.weight: Tensor
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device="meta"))


def make(sizes: list[int], resident: int, slots: int) -> tuple[list[Weight], dict[int, Slab]]:
    blocks = [Weight(number, size) for number, size in enumerate(sizes)]
    slabs, streamed = {}, streamed_places(len(sizes), resident, slots)
    for number, block in enumerate(blocks):
        layout = layout_of(block, torch.float32)
        bytes_ = torch.full((layout.bytes,), number, dtype=torch.uint8)
        if number in streamed:
            slabs[number] = Slab(layout, bytes_)
        else:
            layout.bind(block, bytes_)
    return blocks, slabs


def check(block: nn.Module) -> None:
    """Are these the block's bytes?"""
    assert isinstance(block, Weight)
    assert block.weight.eq(block.number).all(), f"block {block.number} sees {block.weight.unique().tolist()}"


def queue_use(queue: TwoQueues, block: nn.Module) -> None:
    """Two looks at the weights that are bound now, so that a copy may come between them."""
    assert isinstance(block, Weight)
    number, weight = block.number, block.weight

    def look() -> None:
        assert weight.eq(number).all(), f"block {number} sees {weight.unique().tolist()}"

    queue.compute(look)
    queue.compute(look)


def run(seed: int, make_queue: type[TwoQueues] = TwoQueues) -> None:
    """A few steps of a random stream, some of them abandoned, then both queues in a random order."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 200, 256, 257, 700)) for _ in range(draw.randint(1, 12))]
    slots = draw.randint(2, 4)
    blocks, slabs = make(sizes, draw.randint(-1, len(sizes)), slots)
    queue = make_queue(seed)
    stream = BlockStream(blocks, slabs, slots, CPU, queue)
    kept_alive = []  # a generator that nobody closes, as a trace keeps one
    for _ in range(draw.randint(1, 4)):
        last = draw.randint(0, len(blocks) - 1) if draw.random() < 0.3 else None
        step = iter(stream)
        for number, block in enumerate(step):
            assert block is blocks[number]
            if number != last or draw.random() < 0.5:
                queue_use(queue, block)
            if number == last:
                kept_alive.append(step)
                break
    stream.close()
    assert not any(queue.queues)


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
    blocks, slabs = make([300, 900, 10, 20, 500, 600, 70], resident=2, slots=2)
    queue = DelayedCopy()
    stream = BlockStream(blocks, slabs, 2, CPU, queue)
    pointers = {address for address, _ in queue.copies}
    for step in range(3):
        assert len(queue.copies) == 2 + step * len(slabs), "two slots ahead, then one copy a block"
        assert len(queue.under_way) == 2, "the step's first two blocks are on their way before it begins"
        for block in stream:
            check(block)
            assert isinstance(block, Weight)
            queue.use(block.weight.data_ptr())
    assert {address for address, _ in queue.copies} == pointers, "two slots, and no other memory"
    assert sum(size for _, size in queue.copies[2:]) == 3 * sum(slab.layout.bytes for slab in slabs.values())


@pytest.mark.parametrize("stop", range(7))
def test_a_step_after_an_abandoned_one_starts_from_the_first_block(stop: int) -> None:
    blocks, slabs = make([300, 900, 10, 20, 500, 600, 70], resident=2, slots=3)
    queue = DelayedCopy()
    stream = BlockStream(blocks, slabs, 3, CPU, queue)

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
    blocks, slabs = make([8] * 5, resident=0, slots=2)
    stream = BlockStream(blocks, slabs, 2, CPU, SynchronousCopy())
    old = iter(stream)
    next(old)
    next(iter(stream))
    with pytest.raises(RuntimeError, match="given up"):
        next(old)


def test_resident_blocks_are_never_copied_and_all_resident_needs_no_slot() -> None:
    blocks, slabs = make([64] * 6, resident=-1, slots=2)
    queue = DelayedCopy()
    stream = BlockStream(blocks, slabs, 2, CPU, queue)
    addresses = [block.weight.data_ptr() for block in blocks]
    for _ in range(2):
        for block in stream:
            check(block)
    assert not slabs
    assert not queue.copies
    assert [block.weight.data_ptr() for block in blocks] == addresses


def test_one_slot_is_refused() -> None:
    blocks, slabs = make([8] * 5, resident=0, slots=2)
    with pytest.raises(ValueError, match="not 1"):
        BlockStream(blocks, slabs, 1, CPU, SynchronousCopy())
