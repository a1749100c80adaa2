"""What a run says while it works: five frozen values, handed to one callback.

Invariant: the runtime prints nothing itself. The command line prints events; a web page or a test listens to the
same ones.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Planned:
    """What the run will do with its memory. text: for humans. vram: phase -> predicted bytes that the allocator
    reserves at most; limit: what it may reserve, None where nothing is limited."""

    text: str
    vram: dict[str, int]
    limit: int | None


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins. `total` counts `unit` (steps, frames, bytes) to come, 0 where that is not known."""

    phase: str
    total: int = 0
    unit: str = ""


@dataclass(frozen=True)
class PhaseAdvanced:
    """`done` of the phase's `total` units are finished."""

    phase: str
    done: int


@dataclass(frozen=True)
class PhaseFinished:
    """A phase ended: wall seconds, and peak bytes of video memory (0 on CPU): allocated, reserved by torch's allocator,
    and what the card holds outside it at the end (CUDA's context, libraries, other programs)."""

    phase: str
    seconds: float
    peak_allocated: int
    peak_reserved: int
    outside: int = 0


@dataclass(frozen=True)
class Notice:
    """One sentence that the user should read: something was cropped, cut, ignored or chosen."""

    text: str


Event = Planned | PhaseStarted | PhaseAdvanced | PhaseFinished | Notice
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of callers that do not care."""
