"""The mapped tier: a few page-locked buffers that threads fill with one block after the other, in the cycle's order.

Two orderings must hold, beside those of the stream of blocks:

    read before copy    a block is copied to the device only when it is in its buffer as a whole
    copy before read    a buffer is not filled again before the copy of the block in it has landed

Invariants: the thread that computes waits for bytes to be in the ring and for nothing else; only reading threads wait
for a copy's end. They are ahead by as many blocks as there are buffers, over the end of a step too. What goes wrong in
them is raised where the block is asked for. After `close` no thread is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import Generic

import torch
from torch import Tensor

from lowvram_i2v.streaming.copy_queue import Mark

BUFFERS = 3
"""One being filled, one full, one being copied."""

Stop = Callable[[], bool]
Fill = Callable[[int, Tensor, Stop], Tensor]
"""(place, buffer, stop) -> the part of the buffer that is the block's slab. Where `stop` says yes the bytes are not
wanted any more."""


class Ring(Generic[Mark]):
    """The streamed blocks of `cycle`, each in a buffer from when it was read until its copy has landed.

    fills: what reads a block; each is called by a thread of its own. landed: returns when a mark is reached.
    """

    def __init__(
        self,
        cycle: Sequence[int],
        buffers: Sequence[Tensor],
        fills: Sequence[Fill],
        landed: Callable[[Mark], None],
    ) -> None:
        self._cycle, self._landed = cycle, landed
        self._free: deque[tuple[Tensor, Mark | None]] = deque((buffer, None) for buffer in buffers)
        self._full: dict[int, tuple[Tensor, Tensor]] = {}  # number of the read -> buffer, slab
        self._read, self._taken = 0, 0  # blocks that a thread began to read, blocks taken; from the last rewind on
        self._lent: Tensor | None = None
        self._pass = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._threads = [Thread(target=self._run, args=(fill,), name="block reader", daemon=True) for fill in fills]
        for thread in self._threads:
            thread.start()

    def ready(self, place: int) -> bool:
        with self._changed:
            return self._taken in self._full or self._error is not None

    def take(self, place: int) -> Tensor:
        assert place == self._cycle[self._taken % len(self._cycle)]
        assert self._lent is None, "the block taken before was not sent"
        with self._changed:
            self._wait_for_block()
            self._lent, slab = self._full.pop(self._taken)
            self._taken += 1
        return slab

    def sent(self, landed: Mark) -> None:
        assert self._lent is not None
        with self._changed:
            self._free.append((self._lent, landed))
            self._lent = None
            self._changed.notify_all()

    def rewind(self) -> None:
        with self._changed:
            if not self._taken:
                return
            self._pass += 1
            self._free.extend((buffer, None) for buffer, _ in self._full.values())
            self._full.clear()
            self._read = self._taken = 0
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads. Copies from the ring must have ended, or be about to."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._free.clear()
        self._full.clear()

    def _wait_for_block(self) -> None:
        """Until the next block is there. Raises what a reading thread raised."""
        self._changed.wait_for(lambda: self._taken in self._full or self._error is not None or self._closed)
        if self._taken not in self._full:
            raise self._error or RuntimeError("the ring is closed")

    def _run(self, fill: Fill) -> None:
        """A reading thread."""
        try:
            with torch.inference_mode():  # the buffers may be tensors of that mode, which is a thread's own
                while self._read_next(fill):
                    continue
        except BaseException as error:  # noqa: BLE001  (it is raised again by the thread that computes)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_next(self, fill: Fill) -> bool:
        """Reads one block into the buffer that is free first; whether there is more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return False
            number, pass_ = self._read, self._pass
            self._read += 1
            buffer, landed = self._free.popleft()
        if landed is not None:
            self._landed(landed)
        slab = fill(self._cycle[number % len(self._cycle)], buffer, lambda: self._unwanted(pass_))
        with self._changed:
            if self._unwanted(pass_):
                self._free.append((buffer, None))
            else:
                self._full[number] = buffer, slab
            self._changed.notify_all()
        return True

    def _unwanted(self, pass_: int) -> bool:
        return self._closed or self._pass != pass_
