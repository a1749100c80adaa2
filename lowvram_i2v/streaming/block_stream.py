"""The stream of blocks: iterating it is one denoising step, and yields every block in order with its weights in place.

Some blocks are resident: their weights stay on the device. The others share a few slots, each as long as the largest
of them, into which their bytes are copied in turn. Two orderings must hold, and nothing else does:

    copy before compute     a block is not computed before its bytes have landed
    compute before copy     a slot is not overwritten before the block in it has been computed

Invariants: at any time one slot is in use at most and all others hold the next blocks of the cycle, or are being
filled with them; the cycle goes on over the end of a step, so the next step's first block is under way when a step
ends. One copy a block, host to device. No allocation and no waiting on the host while a step runs.

Left out: reading weights (`load.py`), and a host memory smaller than the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor, nn

from lowvram_i2v.streaming.copy_queue import CopyQueue, Mark
from lowvram_i2v.streaming.slab import SlabLayout

FEWEST_SLOTS = 2


@dataclass(frozen=True)
class Slab:
    """A streamed block in host memory: bytes [layout.bytes] uint8, page-locked where the device copies by itself."""

    layout: SlabLayout
    bytes: Tensor


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
        streamed: Mapping[int, Slab],
        slots: int,
        device: torch.device,
        queue: CopyQueue[Mark],
    ) -> None:
        """blocks: in order; those not in `streamed` (place -> bytes) have their weights already. slots: 2 or more.

        Starts the copies of the first `slots` streamed blocks.
        """
        if streamed and slots < FEWEST_SLOTS:
            raise ValueError(f"streaming needs {FEWEST_SLOTS} slots or more, not {slots}")
        self._blocks, self._streamed, self._queue = blocks, streamed, queue
        self._cycle = sorted(streamed)
        slot_bytes = max((slab.layout.bytes for slab in streamed.values()), default=0)
        self._slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots if streamed else 0)
        ]
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

    def close(self) -> None:
        """Waits for the copies under way, then lets go of slots and slabs. The stream cannot be used again."""
        self._queue.finish()
        self._step += 1
        self._flights.clear()
        self._slots, self._blocks, self._streamed, self._cycle = [], (), {}, []

    def _was_abandoned(self) -> bool:
        """Whether the last iteration did not come to its end, so that the slots hold the wrong blocks."""
        return self._in_use is not None or bool(self._flights and self._flights[0].block != self._cycle[0])

    def _bring(self, place: int) -> None:
        """Makes the oldest flight, which is that of this block, its weights."""
        flight = self._flights.popleft()
        self._in_use = flight.slot
        assert flight.block == place
        self._queue.wait_copied(flight.landed)
        layout = self._streamed[place].layout
        layout.bind(self._blocks[place], self._slots[flight.slot][: layout.bytes])

    def _refill_all(self) -> None:
        """Starts the cycle from its first block. What the slots hold, or are being filled with, is given up."""
        self._flights.clear()
        self._in_use, self._next = None, 0
        free = self._queue.computed()
        for slot in range(len(self._slots)):
            self._refill(slot, free)

    def _refill(self, slot: int, free: Mark) -> None:
        """Starts the copy of the cycle's next block into a slot that is free from the mark on."""
        place = self._cycle[self._next]
        self._next = (self._next + 1) % len(self._cycle)
        slab = self._streamed[place]
        landed = self._queue.copy(self._slots[slot][: slab.layout.bytes], slab.bytes, free)
        self._flights.append(Flight(place, slot, landed))
