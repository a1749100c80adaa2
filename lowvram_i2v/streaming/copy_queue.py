"""The queue that copies run in, beside the one that computes. What the stream of blocks asks of it is one protocol;
a mark is a point in one of the two queues that the other can wait for.

Invariants: nothing here waits on the host but `await_copied` and `finish`; copies run in the order given; bytes go from
host to device and never back.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

Mark = TypeVar("Mark")


class CopyQueue(Protocol[Mark]):
    """Two queues in order, one that computes and one that copies, and marks to order them against each other."""

    def computed(self) -> Mark:
        """The end of all computing queued so far."""

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Queues a copy that starts when `after` is reached; the mark of its end. uint8, equal lengths."""

    def wait_copied(self, landed: Mark) -> None:
        """Computing that is queued from now on starts when `landed` is reached."""

    def await_copied(self, landed: Mark) -> None:
        """Returns when `landed` is reached. For threads that read, never for the one that computes."""

    def finish(self) -> None:
        """Returns when all copies have ended: before their memory is freed."""


class CudaCopyQueue:
    """A side stream for copies; the device's current stream computes. Marks are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def computed(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
            event.record(self._copies)
        return event

    def wait_copied(self, landed: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(landed)

    def await_copied(self, landed: torch.cuda.Event) -> None:
        landed.synchronize()

    def finish(self) -> None:
        self._copies.synchronize()


class SynchronousCopy:
    """For the CPU, which computes when it is told to: there is nothing to wait for."""

    def computed(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait_copied(self, landed: None) -> None:
        return None

    def await_copied(self, landed: None) -> None:
        return None

    def finish(self) -> None:
        return None
