"""The ring of buffers: in a model where reading, copying and computing interleave at random, and with real threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from copy_queues import POISON, DelayedCopy, TwoQueues
from streamed_weights import CPU, check, make, step_through
from torch import Tensor

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.streaming.block_stream import BlockStream
from lowvram_i2v.streaming.ring import BUFFERS, Fill, Ring, Stop

RUNS = 1000


class InterleavedRing(Ring[int]):
    """Without threads: blocks are read when they are waited for, or before that, as it happens; copies and computing
    go on in the middle of it."""

    def __init__(self, slabs: dict[int, Tensor], queue: TwoQueues, waits: bool = True) -> None:
        self.slabs, self.queue, self.waits = slabs, queue, waits
        size = max(map(len, slabs.values()), default=0)
        super().__init__(sorted(slabs), [torch.empty(size, dtype=torch.uint8) for _ in range(BUFFERS)], [], self.land)

    def land(self, landed: int) -> None:
        if self.waits:
            self.queue.await_copied(landed)

    def fill(self, place: int, buffer: Tensor, stop: Stop) -> Tensor:
        slab = buffer[: len(self.slabs[place])]
        buffer.fill_(POISON)
        self.run_a_little()
        slab.copy_(self.slabs[place])
        return slab

    def run_a_little(self) -> None:
        while self.queue.random.random() < 0.7 and self.queue.able():
            self.queue.run_one()

    def ready(self, place: int) -> bool:
        while self._free and self.queue.random.random() < 0.4:
            self._read_next(self.fill)
        return super().ready(place)

    def _wait_for_block(self) -> None:
        while self._taken not in self._full:
            self._read_next(self.fill)


def run(seed: int, waits: bool = True) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((1, 200, 256, 257, 700)) for _ in range(draw.randint(1, 12))]
    slots = draw.randint(2, 4)
    made, queue = make(sizes, draw.randint(-1, len(sizes)), slots), TwoQueues(seed)
    ring = InterleavedRing(made.slabs, queue, waits)
    step_through(draw, made.blocks, queue, BlockStream(made.blocks, made.layouts, ring, slots, CPU, queue))


def test_no_block_is_copied_before_it_was_read_and_no_buffer_filled_before_its_copy_ended() -> None:
    for seed in range(RUNS):
        run(seed)


def test_the_model_sees_a_reader_that_does_not_wait() -> None:
    faults = 0
    for seed in range(100):
        try:
            run(seed, waits=False)
        except AssertionError as error:
            faults += "sees" in str(error)
    assert faults > 10


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def slow_fill(slabs: dict[int, Tensor], seed: int) -> Fill:
    draw = random.Random(seed)

    def fill(place: int, buffer: Tensor, stop: Stop) -> Tensor:
        buffer.fill_(POISON)
        time.sleep(draw.choice((0, 0, 1e-4, 1e-3)))
        slab = buffer[: len(slabs[place])]
        slab.copy_(slabs[place])
        return slab

    return fill


def buffers(slabs: dict[int, Tensor]) -> list[Tensor]:
    return [torch.empty(max(map(len, slabs.values())), dtype=torch.uint8) for _ in range(BUFFERS)]


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_threads_read_while_blocks_are_used_and_steps_given_up(readers: int) -> None:
    made = make([300, 900, 10, 20, 500, 600, 70, 80], resident=1, slots=2)
    draw, queue = random.Random(readers), DelayedCopy()
    fills = [slow_fill(made.slabs, seed) for seed in range(readers)]
    with no_thread_left(), closing(Ring(sorted(made.slabs), buffers(made.slabs), fills, queue.await_copied)) as ring:
        stream = BlockStream(made.blocks, made.layouts, ring, 2, CPU, queue)
        for _ in range(40):
            last = draw.randint(0, 20)
            for number, block in enumerate(stream):
                check(block)
                queue.use(made.blocks[number].weight.data_ptr())
                if number == last:
                    break
        stream.close()


def test_the_next_step_is_read_while_nobody_asks() -> None:
    slabs = {place: torch.full((8,), place, dtype=torch.uint8) for place in range(5)}
    queue = DelayedCopy()
    with closing(Ring(sorted(slabs), buffers(slabs), [slow_fill(slabs, 0)], queue.await_copied)) as ring:
        for place in (0, 1, 2, 3):
            assert ring.take(place).eq(place).all()
            ring.sent(0)
        until = time.monotonic() + 10
        while len(ring._full) < BUFFERS and time.monotonic() < until:
            time.sleep(1e-3)
        assert [int(slab[0]) for _, slab in ring._full.values()] == [4, 0, 1]


def test_what_a_reader_raises_is_raised_where_the_block_is_asked_for() -> None:
    slabs = {place: torch.full((8,), place, dtype=torch.uint8) for place in range(4)}
    good = slow_fill(slabs, 0)

    def fill(place: int, buffer: Tensor, stop: Stop) -> Tensor:
        if place == 2:
            raise CheckpointError("the file ends too early")
        return good(place, buffer, stop)

    with no_thread_left(), closing(Ring(sorted(slabs), buffers(slabs), [fill], DelayedCopy().await_copied)) as ring:
        for place in (0, 1):
            ring.take(place)
            ring.sent(0)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="too early"):
                ring.take(2)
        assert ring.ready(2), "asking must not wait for what never comes"


@pytest.mark.parametrize("taken", [0, 1])
def test_closing_ends_a_read_and_a_wait(taken: int) -> None:
    """A reader is in the middle of a long read, or waits for a buffer, when the ring is closed."""
    slabs = {place: torch.full((8,), place, dtype=torch.uint8) for place in range(4)}
    reading = threading.Event()

    def fill(place: int, buffer: Tensor, stop: Stop) -> Tensor:
        reading.set()
        until = time.monotonic() + 10
        while place >= taken and not stop() and time.monotonic() < until:
            time.sleep(1e-3)
        return buffer

    with no_thread_left():
        ring = Ring(sorted(slabs), buffers(slabs), [fill, fill], DelayedCopy().await_copied)
        for place in range(taken):
            ring.take(place)
        assert reading.wait(10)
        start = time.monotonic()
        ring.close()
        assert time.monotonic() - start < 5
    if taken:
        ring.sent(0)
    with pytest.raises(RuntimeError, match="closed"):
        ring.take(taken)


def test_blocks_are_taken_in_the_order_of_the_cycle() -> None:
    slabs = {place: torch.full((8,), place, dtype=torch.uint8) for place in (1, 3)}
    with closing(Ring([1, 3], buffers(slabs), [slow_fill(slabs, 0)], DelayedCopy().await_copied)) as ring:
        with pytest.raises(AssertionError):
            ring.take(3)
        ring.take(1)
        with pytest.raises(AssertionError, match="not sent"):
            ring.take(3)
