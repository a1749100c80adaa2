"""Finished parts of tiles become one picture on the CPU, while the device computes the next tile.

    part on the device -> one of LANDING page-locked buffers -> its place in the picture, by a thread

Invariants: the picture is made once, float32 [C, T, H, W], and each part copied to its place; `put` returns when the
part may be overwritten by what the device is given next. The host waits only where all buffers are under way.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lowvram_i2v.vae.planning import LANDING


class Landing:
    """The picture of one tile of time, `height` x `width`."""

    def __init__(self, height: int, width: int) -> None:
        self._size = height, width
        self._picture = torch.empty(0)
        self._thread = ThreadPoolExecutor(1)
        self._under_way: deque[Future[Tensor]] = deque()

    def put(self, part: Tensor, top: int, left: int) -> None:
        """part [C, T, h, w], from this row and column on."""
        if not self._picture.numel():
            self._picture = torch.empty(*part.shape[:2], *self._size)
        place = self._picture[:, :, top : top + part.shape[2], left : left + part.shape[3]]
        if part.is_cuda:
            self._send(part, place)
        else:
            place.copy_(part)

    def finished(self) -> Tensor:
        """The picture, when all parts are in place."""
        while self._under_way:
            self._under_way.popleft().result()
        self._thread.shutdown()
        return self._picture

    def _send(self, part: Tensor, place: Tensor) -> None:
        buffer = self._buffer(part.numel())
        landed = buffer[: part.numel()].view(part.shape).copy_(part.contiguous(), non_blocking=True)
        self._under_way.append(self._thread.submit(_settle, buffer, landed, _recorded(part.device), place))

    def _buffer(self, size: int) -> Tensor:
        if len(self._under_way) == LANDING:
            used = self._under_way.popleft().result()
            if used.numel() >= size:
                return used
        return _page_locked(size)


def _page_locked(size: int) -> Tensor:
    """Ordinary memory where locking is refused: a copy to it takes longer, and waits."""
    try:
        return torch.empty(size, pin_memory=True)
    except RuntimeError:
        return torch.empty(size)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """After all that the device was given so far."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _settle(buffer: Tensor, landed: Tensor, there: torch.cuda.Event, place: Tensor) -> Tensor:
    """Waits for the copy and puts it in its place. Returns the buffer, which may be used anew."""
    there.synchronize()
    with torch.inference_mode():  # a thread's own: the picture may have been made in it
        place.copy_(landed)
    return buffer
