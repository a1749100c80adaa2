"""The stream of blocks: iterating it is one denoising step, and yields every block in order with its weights in place.

Some blocks are resident: their weights stay on the device. The others share a few slots, each as long as the largest
of them, into which their bytes are copied in turn. Two orderings must hold, and nothing else does:

    copy before compute     a block is not computed before its bytes have landed
    compute before copy     a slot is not overwritten before the block in it has been computed

Invariants: at any time one slot is in use at most and all others hold the next blocks of the cycle, or are being
filled with them; the cycle goes on over the end of a step, so the next step's first block is under way when a step
ends. One copy a block, host to device. No allocation while a step runs, and no waiting on the host but for bytes that
are not in host memory yet.

Left out: reading weights (`load.py`), and where the blocks are in host memory (`host_blocks.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import nn

from lowvram_i2v.streaming.copy_queue import CopyQueue, Mark
from lowvram_i2v.streaming.host_blocks import HostBlocks
from lowvram_i2v.streaming.slab import SlabLayout

FEWEST_SLOTS = 2


@dataclass(frozen=True)
class Refill(Generic[Mark]):
    """A copy to be started: of which block, into which slot, and when that is free."""

    block: int
    slot: int
    free: Mark


@dataclass(frozen=True)
class Flight(Generic[Mark]):
    """A copy under way, or landed and not yet used: which block, into which slot, and when it has landed."""

    block: int
    slot: int
    landed: Mark


def streamed_places(blocks: int, resident: int, slots: int) -> list[int]:
    """Which of the blocks are streamed, ascending, if `resident` of them are not: spread evenly over the step, so that
    the time to copy a block is that of one or more resident blocks and its predecessor.

    resident: -1 for all. Also all if slots would hold the rest: then copying saves no memory.
    """
    streamed = 0 if resident < 0 else max(0, blocks - resident)
    if streamed <= slots:
        return []
    return [((i + 1) * blocks - 1) // streamed for i in range(streamed)]


class BlockStream(Generic[Mark]):
    """Iterable of blocks. A step may be abandoned anywhere; the next iteration starts from the first block."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Mapping[int, SlabLayout],
        host: HostBlocks[Mark],
        slots: int,
        device: torch.device,
        queue: CopyQueue[Mark],
    ) -> None:
        """blocks: in order; those not in `streamed` (place -> layout) have their weights already. host: the others'
        bytes. slots: 2 or more.

        Starts the copies of the first `slots` streamed blocks.
        """
        if streamed and slots < FEWEST_SLOTS:
            raise ValueError(f"streaming needs {FEWEST_SLOTS} slots or more, not {slots}")
        self._blocks, self._streamed, self._host, self._queue = blocks, streamed, host, queue
        self._cycle = sorted(streamed)
        slot_bytes = max((layout.bytes for layout in streamed.values()), default=0)
        self._slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots if streamed else 0)
        ]
        self._refills: deque[Refill[Mark]] = deque()
        self._flights: deque[Flight[Mark]] = deque()
        self._in_use: int | None = None
        self._next = 0
        self._step = 0
        self._refill_all()

    def __iter__(self) -> Iterator[nn.Module]:
        self._step += 1
        step = self._step
        if self._was_abandoned():
            self._refill_all()
        for place, block in enumerate(self._blocks):
            if place in self._streamed:
                self._bring(place)
            yield block
            if step != self._step:
                raise RuntimeError("this step was given up when another one began")
            if self._in_use is not None:
                self._refill(self._in_use, self._queue.computed())
                self._in_use = None
            self._start_copies()

    def close(self) -> None:
        """Waits for the copies under way, then lets go of slots and slabs. The stream cannot be used again."""
        self._queue.finish()
        self._step += 1
        self._flights.clear()
        self._refills.clear()
        self._slots, self._blocks, self._streamed, self._cycle = [], (), {}, []

    def _was_abandoned(self) -> bool:
        """Whether the last iteration did not come to its end, so that the slots hold the wrong blocks."""
        coming = [flight.block for flight in self._flights] + [refill.block for refill in self._refills]
        return self._in_use is not None or coming[:1] != self._cycle[:1]

    def _bring(self, place: int) -> None:
        """Makes the oldest flight, which is that of this block, its weights."""
        if not self._flights:
            self._start_copy()
        flight = self._flights.popleft()
        self._in_use = flight.slot
        assert flight.block == place
        self._queue.wait_copied(flight.landed)
        layout = self._streamed[place]
        layout.bind(self._blocks[place], self._slots[flight.slot][: layout.bytes])

    def _refill_all(self) -> None:
        """Starts the cycle from its first block. What the slots hold, or are being filled with, is given up."""
        self._flights.clear()
        self._refills.clear()
        self._in_use, self._next = None, 0
        self._host.rewind()
        free = self._queue.computed()
        for slot in range(len(self._slots)):
            self._refill(slot, free)
        self._start_copies()

    def _refill(self, slot: int, free: Mark) -> None:
        """Asks for the cycle's next block in a slot that is free from the mark on."""
        self._refills.append(Refill(self._cycle[self._next], slot, free))
        self._next = (self._next + 1) % len(self._cycle)

    def _start_copies(self) -> None:
        """Of blocks that were asked for and are in host memory."""
        while self._refills and self._host.ready(self._refills[0].block):
            self._start_copy()

    def _start_copy(self) -> None:
        """Of the block that was asked for first, as soon as it is in host memory."""
        refill = self._refills.popleft()
        layout = self._streamed[refill.block]
        landed = self._queue.copy(self._slots[refill.slot][: layout.bytes], self._host.take(refill.block), refill.free)
        self._host.sent(landed)
        self._flights.append(Flight(refill.block, refill.slot, landed))
