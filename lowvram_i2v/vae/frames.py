"""Where a tensor [frames, rows, columns, channels] is kept between two segments: on the device, or in host memory.

Reading gives windows, some frames and rows at a time; writing goes the same way. Host memory is page-locked and copied
by two streams, one each way: the next window comes while the current one is computed with, the last result goes. Two
buffers each way, which the segment lends, taken in turn, and events in between. The host never waits, but in `settled`.

In place: a new tensor may be written over the old one while that is still read. A stage needs rows above those that it
makes, so the new tensor lies that many rows higher (`over`), in rows that were read before or are spare.

Memory: one piece of the device's, one of the host's, and one there for the video's frames alone, as large as the plan
says, made once for all tiles. Page-locking takes a while, and so does its end: threads do it, while the device computes
what comes before, and while finished frames are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from math import prod

import torch
from torch import Tensor

from lowvram_i2v.device import release
from lowvram_i2v.streaming.arena import Tenant, arena
from lowvram_i2v.vae.layout import ALIGNED, Place
from lowvram_i2v.vae.planning import Kept
from lowvram_i2v.vae.route import Rows, Shape
from lowvram_i2v.vae.streamed import Room, Window

TENANT = Tenant(
    "the decoder's tensors",
    'Close other programs, or take decode = "reference" (--policy reference), which keeps less in RAM; lowvram-i2v '
    "decode goes on with saved latents.",
)

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

    def lend(self, room: Room, read: tuple[Place, ...], sent: tuple[Place, ...]) -> None:
        """Device memory for copies, until the segment ends."""

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
        self._read: list[_Buffer] = []
        self._sent: list[_Buffer] = []

    def over(self, halo: int) -> HostFrames:
        assert halo <= self.top
        return HostFrames(self.memory, self.shape, self.top - halo, self._courier)

    def lend(self, room: Room, read: tuple[Place, ...], sent: tuple[Place, ...]) -> None:
        self._read = [_Buffer(room.bytes_at(place)) for place in read] or self._read
        self._sent = [_Buffer(room.bytes_at(place)) for place in sent] or self._sent

    def windows(self, parts: Sequence[Part]) -> Iterator[Window]:
        views = [self.view(*part) for part in parts]
        for (_, rows), values in zip(parts, self._courier.fetch(views, self._read), strict=True):
            yield Window(values, rows[0], self.shape.height)

    def write(self, frame: int, row: int, values: Tensor) -> None:
        self._courier.send(self.view((frame, frame + len(values)), (row, row + values.shape[1])), values, self._sent[0])
        self._sent.reverse()

    def settled(self) -> Tensor:
        self._courier.settle()
        return super().settled()


class Courier:
    """Copies between the device and page-locked memory, on a stream for each direction, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Copies of what comes now start after all computations and copies before."""
        compute = torch.cuda.current_stream(self._device)
        self._in.wait_stream(compute)
        self._in.wait_stream(self._out)
        self._out.wait_stream(compute)

    def end(self) -> None:
        """Computations from now on start after all copies: they may use the buffers' memory."""
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._in)
        compute.wait_stream(self._out)

    def fetch(self, views: Sequence[Tensor], ring: Sequence[_Buffer]) -> Iterator[Tensor]:
        """The views' values on the device, each valid until the next is asked for, which is on its way by then."""
        compute = torch.cuda.current_stream(self._device)
        for buffer, view in zip(ring, views[:1], strict=False):
            self._start(buffer, view)
        for index, view in enumerate(views):
            if index + 1 < len(views):
                self._start(ring[(index + 1) % 2], views[index + 1])
            buffer = ring[index % 2]
            compute.wait_event(buffer.done)
            yield buffer.values(view)
            buffer.done.record(compute)

    def _start(self, buffer: _Buffer, view: Tensor) -> None:
        """Host to device, after the computation that used the buffer before."""
        with torch.cuda.stream(self._in):
            self._in.wait_event(buffer.done)
            for target, source in zip(buffer.values(view), view, strict=True):  # a frame's rows are one piece
                target.copy_(source, non_blocking=True)
            buffer.done.record(self._in)

    def send(self, view: Tensor, values: Tensor, buffer: _Buffer) -> None:
        """Device to host. The values may be overwritten at once."""
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(buffer.done)
        staged = buffer.values(values)
        staged.copy_(values)
        buffer.done.record(compute)
        with torch.cuda.stream(self._out):
            self._out.wait_event(buffer.done)
            for target, source in zip(view, staged, strict=True):
                target.copy_(source, non_blocking=True)
            buffer.done.record(self._out)

    def settle(self) -> None:
        """Waits until all copies have ended."""
        self._in.synchronize()
        self._out.synchronize()


class _Buffer:
    """Device memory for one copy at a time. `done` is recorded in turn by who fills it and by who uses what is in it,
    and each waits for the other's."""

    def __init__(self, memory: Tensor) -> None:
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._memory = memory

    def values(self, like: Tensor) -> Tensor:
        return self._memory[: like.nbytes].view(like.dtype).view(like.shape)


class HostPiece:
    """Page-locked host memory. A thread locks it while the device computes what comes before, and gives it back."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.size = device, 0
        self._thread, self._locked = ThreadPoolExecutor(1), ExitStack()
        self._memory: Future[Tensor] | None = None
        self._given: Future[None] | None = None

    def make(self, size: int) -> None:
        """Begins to make it. The one before is closed."""
        self.size = size
        self._memory = self._thread.submit(self._lock, size)

    def memory(self) -> Tensor:
        """Waits until it is locked. Raises ResourceError if the host has too little memory to lock."""
        assert self._memory is not None
        return self._memory.result()

    def unlock(self) -> None:
        """Begins to give it back. Copies have ended. Raises ResourceError if it could not be had."""
        memory, self._memory, self.size = self._memory, None, 0
        if memory is not None:
            memory.result()
            del memory  # the thread lets go of it last: freeing takes a while too
            self._given = self._thread.submit(self._give_back)

    def close(self) -> None:
        """Gives it back. Raises as `unlock`."""
        self.unlock()
        if self._given is not None:
            self._given.result()

    def _lock(self, size: int) -> Tensor:
        return self._locked.enter_context(arena(size, self._device, TENANT))

    def _give_back(self) -> None:
        self._locked.close()


class Memory:
    """The device's piece and the host's. Give back with `close`, when all frames are where they belong."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.courier = Courier(device) if device.type == "cuda" else None
        self._piece = torch.empty(0, dtype=torch.uint8, device=device)
        self._host, self._video = HostPiece(device), HostPiece(device)

    def fit(self, piece: int, host: int, video: int) -> None:
        """Makes all pieces at least as large as this. Raises torch.OutOfMemoryError, and ResourceError for RAM."""
        if self._piece.numel() < piece:
            self._piece = self._piece[:0].clone()  # gone before the larger one comes
            self._piece = torch.empty(piece, dtype=torch.uint8, device=self._device)
        larger = [(kept, size) for kept, size in ((self._host, host), (self._video, video)) if kept.size < size]
        for kept, _ in larger:
            self.settle()
            kept.close()
        if larger:  # both at once, before a thread each makes its own
            TENANT.check_ram(sum(size for _, size in larger))
        for kept, size in larger:
            kept.make(size)

    def drop(self) -> None:
        """The device's piece, after it was too large."""
        self.end()
        self._piece = self._piece[:0].clone()
        release(self._device)

    def only_video(self) -> None:
        """Begins to give all back but the video's frames. Raises ResourceError if the host's piece could not be had."""
        self._piece = self._piece[:0].clone()
        self.settle()
        self._host.unlock()

    def close(self) -> None:
        """Raises ResourceError if the host's pieces could not be had."""
        try:
            self.only_video()
        finally:
            self._host.close()
            self._video.close()

    def begin(self) -> None:
        if self.courier is not None:
            self.courier.begin()

    def end(self) -> None:
        if self.courier is not None:
            self.courier.end()

    def settle(self) -> None:
        if self.courier is not None:
            self.courier.settle()

    def room(self, base: int, size: int) -> Room:
        """A segment's memory between the kept tensors."""
        return Room(self._piece[base : base + size], self._dtype)

    def frames(self, kept: Kept, shape: Shape, channels: int, spare: int) -> Frames:
        """Room for a tensor at its place. Raises ResourceError if the host has too little memory to lock."""
        size = (shape.frames, shape.height + spare, shape.width, channels)
        on_device = kept.memory == "device"
        piece = self._piece if on_device else {"host": self._host, "video": self._video}[kept.memory].memory()
        start = kept.place.offset(piece.numel())
        memory = piece[start : start + prod(size) * self._dtype.itemsize].view(self._dtype).view(size)
        if on_device or self.courier is None:
            return Frames(memory, shape, spare)
        return HostFrames(memory, shape, spare, self.courier)

    def beside(self, frames: Frames) -> Tensor:
        """A clip's frames [3, F, H, W] as float32, at the other end of the device's piece: nothing else is kept now."""
        picture = frames.settled().permute(3, 0, 1, 2)
        size, total = 4 * picture.numel(), self._piece.numel()
        first = frames.memory.data_ptr() - self._piece.data_ptr()
        last = first + frames.memory.nbytes
        for start in (0, total - -(-size // ALIGNED) * ALIGNED):
            if first >= 0 and last <= total and start >= 0 and (start >= last or start + size <= first):
                room = self._piece[start : start + size].view(torch.float32)
                return room.view(picture.shape).copy_(picture)
        return picture.to(torch.float32, copy=True)
