"""A block from the file into a buffer: most of it as one read, straight into place.

A slab's tensors are sorted as the file's, so the distance between a tensor's place in the file and in the slab is the
same for all of them as long as their lengths are multiples of the slab's alignment: these are one range of bytes, the
bulk. The rest (a few numbers of odd length; whatever the file stores in another dtype) is read tensor by tensor.

Invariants: a read past the file's end is a CheckpointError, never a crash; with `direct` the range is read around the
system's cache of files, in whole pages to whole pages, where the filesystem can do that.
"""

from __future__ import annotations

import errno
import io
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram_i2v.errors import CheckpointError
from lowvram_i2v.safetensors_file import TORCH_DTYPES, SafetensorsFile
from lowvram_i2v.streaming.arena import PAGE, page_aligned
from lowvram_i2v.streaming.slab import SlabLayout

DIRECT = True
"""Whether blocks are read around the cache of files. A step reads more than the cache can hold, in a circle, so caching
costs a copy and the memory of other programs, and finds nothing."""
PIECE = 16 * 2**20
"""Bytes of one system call: between two of them a read can be given up."""


def buffer_bytes(slab: int) -> int:
    """A buffer's length for slabs up to this one: with room for whole pages around the bulk, wherever it starts."""
    return -(-slab // PAGE) * PAGE + 2 * PAGE


@dataclass(frozen=True)
class ReadPlan:
    """How a block's slab is read. bulk: bytes of the file that belong at `offset` of the slab. rest: the other tensors,
    by name below the block."""

    block: str
    layout: SlabLayout
    bulk: range
    offset: int
    rest: tuple[str, ...]

    @classmethod
    def of(cls, file: SafetensorsFile, block: str, layout: SlabLayout) -> ReadPlan:
        """The bulk is the most bytes that have one distance between file and slab."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, place in layout.places.items():
            entry = file.entries[f"{block}.{name}"]
            if f"torch.{TORCH_DTYPES.get(entry.dtype)}" == str(place.dtype):
                groups[entry.start - place.offset].append(name)
        if not groups:
            return cls(block, layout, range(0), 0, tuple(layout.places))

        def size(distance: int) -> int:
            return sum(layout.places[name].bytes for name in groups[distance])

        distance = max(groups, key=size)
        places = [layout.places[name] for name in groups[distance]]
        start, stop = min(place.offset for place in places), max(place.offset + place.bytes for place in places)
        rest = tuple(name for name in layout.places if name not in groups[distance])
        return cls(block, layout, range(distance + start, distance + stop), start, rest)

    def read(self, file: SafetensorsFile, disk: DiskFile, buffer: Tensor, stop: Callable[[], bool]) -> Tensor:
        """Fills a part of the buffer [`buffer_bytes` or more, at a page's start] with the slab, and returns that part.

        Where `stop` says yes, it returns early. Raises CheckpointError if the file is cut or cannot be read.
        """
        start = (self.bulk.start - self.offset) % PAGE
        slab = buffer[start : start + self.layout.bytes]
        disk.read(self.bulk, buffer, start + self.offset, stop)
        if not stop():
            for name in self.rest:  # as bytes: in the buffer a slab may start anywhere
                place = self.layout.places[name]
                values = file.read(f"{self.block}.{name}").to(place.dtype)
                slab[place.offset : place.offset + place.bytes] = values.reshape(-1).view(torch.uint8)
        return slab


class DiskFile:
    """A file opened for reading ranges, by one thread at a time.

    direct: around the system's cache; where that is refused, through it.
    """

    def __init__(self, path: Path, direct: bool = DIRECT) -> None:
        self.path = path
        try:
            file = _open_direct(path) if direct else None
            self.direct = file is not None
            self._file = file or path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def read(self, wanted: range, buffer: Tensor, offset: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Bytes of the file into buffer[offset:], uint8. Direct: buffer starts at a page, and offset is the wanted
        range's start but for whole pages; bytes around them in the same pages are overwritten."""
        grain = PAGE if self.direct else 1
        before, length = wanted.start % grain, -(-wanted.stop // grain) * grain - wanted.start
        target = buffer.numpy()[offset - before : offset + length].data if wanted else memoryview(b"")
        done, needed = 0, before + len(wanted) if wanted else 0
        try:
            while done < needed and not stop():
                self._file.seek(wanted.start - before + done)
                count = self._file.readinto(target[done : done + PIECE])
                if not count or (count % grain and done + count < needed):
                    raise CheckpointError(f"{self.path} ends {needed - done} bytes too early", "Copy the file again.")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def _open_direct(path: Path) -> io.FileIO | None:
    """The file opened so that reads go around the cache; None where system or filesystem cannot."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    file: io.FileIO | None = None
    try:
        file = io.FileIO(os.open(path, os.O_RDONLY | flag), "r")
        file.readinto(page_aligned(PAGE).numpy().data)
    except OSError as error:
        if file is not None:
            file.close()
        if error.errno != errno.EINVAL:
            raise
        return None
    file.seek(0)
    return file
