"""Where streamed blocks are in host memory: what the stream of blocks asks of it, and the tier that holds them all.

`pinned` keeps every streamed block in one arena, ready at any time. `mapped` (`ring.py`) reads them from the file again
in every step, into a few buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

Landed = TypeVar("Landed", contravariant=True)


class HostBlocks(Protocol[Landed]):
    """The bytes of streamed blocks, asked for in the order of the cycle, over and over.

    `take` and then `sent`, once for each block; all are called by the thread that computes.
    """

    def ready(self, place: int) -> bool:
        """Whether `take` would return, or raise, at once."""

    def take(self, place: int) -> Tensor:
        """The bytes of the cycle's next block, uint8, page-locked where a device copies by itself. Waits for them to be
        read, and for nothing else. Raises CheckpointError if the file cannot be read."""

    def sent(self, landed: Landed) -> None:
        """The copy of what `take` gave has ended when this mark is reached; the bytes are not needed after it."""

    def rewind(self) -> None:
        """The next block to be taken is the cycle's first."""


class Pinned:
    """Every block at its place in the arena, for as long as the arena lasts."""

    def __init__(self, slabs: Mapping[int, Tensor]) -> None:
        self._slabs = slabs

    def ready(self, place: int) -> bool:
        return True

    def take(self, place: int) -> Tensor:
        return self._slabs[place]

    def sent(self, landed: Any) -> None:
        return None

    def rewind(self) -> None:
        return None
