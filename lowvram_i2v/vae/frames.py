"""Where a tensor [frames, rows, columns, channels] is kept between two segments: on the device, or in host memory.

Reading gives windows, some frames and rows at a time; writing goes the same way. Host memory is page-locked and copied
by a stream of its own, the next window while the current one is computed with: two buffers each way, taken in turn,
and events in between. The host never waits, but in `settled`.

In place: a new tensor may be written over the old one while that is still read. A stage needs rows above those that it
makes, so the new tensor lies that many rows higher (`over`), in rows that were read before or are spare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import prod

import torch
from torch import Tensor

from lowvram_i2v.streaming.arena import arena
from lowvram_i2v.vae.route import Rows, Shape
from lowvram_i2v.vae.streamed import Window

Part = tuple[Rows, Rows]
"""Frames and rows of a window."""


class Frames:
    """A tensor of `shape` frames, rows and columns in `memory` [T, H + spare, W, C], its first row at row `top`."""

    def __init__(self, memory: Tensor, shape: Shape, top: int) -> None:
        self.memory, self.shape, self.top = memory, shape, top

    def over(self, halo: int) -> Frames:
        """The tensor that overwrites this one, made from windows with `halo` more rows above and below."""
        assert halo <= self.top
        return type(self)(self.memory, self.shape, self.top - halo)

    def fits(self, shape: Shape, channels: int) -> bool:
        return self.shape == shape and self.memory.shape[3] == channels

    def view(self, frames: Rows, rows: Rows) -> Tensor:
        return self.memory[frames[0] : frames[1], self.top + rows[0] : self.top + rows[1]]

    def windows(self, parts: Sequence[Part]) -> Iterator[Window]:
        """The windows in the order of `parts`. Each is valid until the next is asked for."""
        for frames, rows in parts:
            yield Window(self.view(frames, rows), rows[0], self.shape.height)

    def write(self, frame: int, row: int, values: Tensor) -> None:
        """values [T, R, W, C] from `frame` and `row` on."""
        self.view((frame, frame + len(values)), (row, row + values.shape[1])).copy_(values)

    def settled(self) -> Tensor:
        """[T, H, W, C] when all that was written has arrived."""
        return self.view((0, self.shape.frames), (0, self.shape.height))


class HostFrames(Frames):
    """Frames in page-locked host memory, for a CUDA device."""

    def __init__(self, memory: Tensor, shape: Shape, top: int, courier: Courier) -> None:
        super().__init__(memory, shape, top)
        self._courier = courier

    def over(self, halo: int) -> HostFrames:
        assert halo <= self.top
        return HostFrames(self.memory, self.shape, self.top - halo, self._courier)

    def windows(self, parts: Sequence[Part]) -> Iterator[Window]:
        views = [self.view(*part) for part in parts]
        for (_, rows), values in zip(parts, self._courier.fetch(views), strict=True):
            yield Window(values, rows[0], self.shape.height)

    def write(self, frame: int, row: int, values: Tensor) -> None:
        self._courier.send(self.view((frame, frame + len(values)), (row, row + values.shape[1])), values)

    def settled(self) -> Tensor:
        self._courier.settle()
        return super().settled()


class Courier:
    """Copies between the device and page-locked memory, on a stream of its own, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._send_buffers = [_Buffer(), _Buffer()]

    def fetch(self, views: Sequence[Tensor]) -> Iterator[Tensor]:
        """The views' values on the device, each valid until the next is asked for, which is on its way by then."""
        if not views:
            return
        size = max(view.numel() for view in views)
        ring = [_Buffer(), _Buffer()]
        for buffer in ring[: len(views)]:
            buffer.reserve(size, views[0].dtype, self._device)
        compute = torch.cuda.current_stream(self._device)
        try:
            self._start(ring[0], views[0])
            for index, view in enumerate(views):
                if index + 1 < len(views):
                    self._start(ring[(index + 1) % 2], views[index + 1])
                buffer = ring[index % 2]
                compute.wait_event(buffer.done)
                yield buffer.values(view)
                buffer.done.record(compute)
        finally:
            compute.wait_stream(self._stream)  # whoever gets the buffers' memory next

    def _start(self, buffer: _Buffer, view: Tensor) -> None:
        """Host to device, after the computation that used the buffer before."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.done)
            for target, source in zip(buffer.values(view), view, strict=True):  # a frame's rows are one piece
                target.copy_(source, non_blocking=True)
            buffer.done.record(self._stream)

    def send(self, view: Tensor, values: Tensor) -> None:
        """Device to host. The values may be overwritten at once."""
        buffer = self._send_buffers[0]
        self._send_buffers.reverse()
        compute = torch.cuda.current_stream(self._device)
        buffer.reserve(values.numel(), values.dtype, self._device)
        compute.wait_event(buffer.done)
        staged = buffer.values(values)
        staged.copy_(values)
        buffer.done.record(compute)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.done)
            for target, source in zip(view, staged, strict=True):
                target.copy_(source, non_blocking=True)
            buffer.done.record(self._stream)

    def settle(self) -> None:
        """Waits until all copies have ended."""
        self._stream.synchronize()


class _Buffer:
    """Device memory for one copy at a time, and the event after which it may be used anew."""

    def __init__(self) -> None:
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._memory = torch.empty(0)

    def reserve(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if self._memory.numel() < size or self._memory.dtype != dtype:
            self.done.synchronize()  # only where a segment begins with larger chunks
            self._memory = torch.empty(0)
            self._memory = torch.empty(size, dtype=dtype, device=device)
            self.done.record(torch.cuda.current_stream(device))  # whoever had this memory before

    def values(self, like: Tensor) -> Tensor:
        return self._memory[: like.numel()].view(like.shape)


class Shelf:
    """Makes room for `Frames`, and takes it back."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._courier = Courier(device) if device.type == "cuda" else None
        self._locked: dict[int, ExitStack] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._courier is not None:
            self._courier.settle()
        for lock in self._locked.values():
            lock.close()

    def room(self, shape: Shape, channels: int, place: str, spare: int = 0) -> Frames:
        """place: "device" or "host". Raises ResourceError if the host has too little memory to lock."""
        size = (shape.frames, shape.height + spare, shape.width, channels)
        if place == "device" or self._courier is None:
            return Frames(torch.empty(size, dtype=self._dtype, device=self._device), shape, spare)
        lock = ExitStack()
        memory = lock.enter_context(arena(prod(size) * self._dtype.itemsize, self._device))
        self._locked[memory.data_ptr()] = lock
        return HostFrames(memory.view(self._dtype).view(size), shape, spare, self._courier)

    def clear(self, frames: Frames) -> None:
        """The memory of `frames`, also where it was overwritten, is not needed any more."""
        lock = self._locked.pop(frames.memory.data_ptr(), None)
        frames.memory = frames.memory[:0]
        if lock is not None:
            assert self._courier is not None
            self._courier.settle()
            lock.close()
