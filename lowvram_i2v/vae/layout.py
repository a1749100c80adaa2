"""Where the decoder's tensors lie in one piece of device memory. Arithmetic on shapes; no torch here.

Memory that is asked for piece by piece, in many sizes, is reserved in more than is used: pages between tensors fit
nothing. So the decoder asks for one piece and knows the place of everything in it before it begins. Kept tensors lie at
the two ends (`Ends`), a new trunk at the end where the old one is not; between them a segment's chunks have their
buffers (`chunk_layout`), each as large as its largest chunk needs. The piece's size is the planner's figure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lowvram_i2v.vae.route import OUT_CHANNELS, Rows, Segment, Shape, Stage, bands, rows_through, spans

ALIGNED = 512  # bytes; what the fastest kernels ask of an address divides it
KEYS = 2048  # keys that a frame's attention looks at in one matrix product


class Place(NamedTuple):
    """Bytes [start, start + size) counted from the low end of some memory, or, if `high`, down from its high end."""

    start: int
    size: int
    high: bool = False

    def offset(self, total: int) -> int:
        """From the low end, in memory of `total` bytes."""
        return total - self.start - self.size if self.high else self.start


class Ends:
    """Memory of any size, taken from both ends, first fit. `most`: how large it must be for all that was taken."""

    def __init__(self) -> None:
        self._low: list[Place] = []
        self._high: list[Place] = []
        self.most = 0

    def copy(self) -> Ends:
        other = Ends()
        other._low, other._high, other.most = self._low[:], self._high[:], self.most
        return other

    def take(self, size: int, high: bool = False) -> Place:
        size, start = aligned(size), 0
        taken = self._high if high else self._low
        for place in taken:
            if place.start - start >= size:
                break
            start = place.start + place.size
        place = Place(start, size, high)
        insort(taken, place)
        self.most = max(self.most, self.extent)
        return place

    def give(self, place: Place) -> None:
        (self._high if place.high else self._low).remove(place)

    @property
    def low(self) -> int:
        """Bytes from the low end up to the last taken one."""
        return max((place.start + place.size for place in self._low), default=0)

    @property
    def extent(self) -> int:
        return self.low + max((place.start + place.size for place in self._high), default=0)


def aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Buffers:
    """Places of one stage: past frames, the convolution's input and output; `values`: what an upsampling makes of the
    latter; `narrow`: the trunk after a 1x1x1 convolution."""

    carry: Place
    padded: Place
    out: Place
    values: Place
    narrow: Place


@dataclass(frozen=True)
class Layout:
    """A segment's memory between the kept tensors: `size` bytes. read, sent: two places for copies from and to the
    host, of the trunk and of the branch, where these lie there."""

    size: int
    stages: tuple[Buffers, ...]
    read: tuple[tuple[Place, ...], tuple[Place, ...]] = ((), ())
    sent: tuple[tuple[Place, ...], tuple[Place, ...]] = ((), ())


class _Sizes(NamedTuple):
    """Bytes of one stage's tensors for one chunk."""

    carry: int
    padded: int
    out: int
    values: int
    narrow: int


OnHost = tuple[bool, bool]
"""Whether the trunk and the branch lie in host memory."""


def chunk_layout(
    part: Sequence[Stage], before: Shape, segment: Segment, from_host: OnHost, to_host: OnHost, element: int
) -> Layout:
    """The places of all that a segment's chunks need, each as large as in the largest chunk.

    element: bytes of a number. The convolution's input lies at the high end while it is needed, what it makes at the
    low end; an upsampling has it the other way round, because its phases are freed before what is made of them.
    """
    sizes, read, sent = _largest(part, before, segment, element)
    ends = Ends()
    carries = [ends.take(size.carry) for size in sizes]
    reads = [tuple(ends.take(read) for _ in range(2 * host)) for host in from_host]
    sends = [tuple(ends.take(sent) for _ in range(2 * host)) for host in to_host]
    buffers: list[Buffers] = []
    trunk: Place | None = None  # what the last stage made, beside windows into kept tensors
    branch: Place | None = None
    for stage, size, carry in zip(part, sizes, carries, strict=True):
        up = stage.kind == "up"
        padded, out = ends.take(size.padded, not up), ends.take(size.out, up)
        ends.give(padded)
        values = narrow = Place(0, 0)
        old = [place for place in (trunk, branch) if place is not None]
        if up:
            values = ends.take(size.values)
            ends.give(out)
            trunk = values
        elif stage.kind == "first":
            branch = out
            if stage.narrows:
                trunk = narrow = ends.take(size.narrow)
            else:
                old = []
        else:
            trunk, branch = out, None
        for place in old:
            ends.give(place)
        buffers.append(Buffers(carry, padded, out, values, narrow))
    return Layout(ends.most, tuple(buffers), (reads[0], reads[1]), (sends[0], sends[1]))


def _largest(part: Sequence[Stage], before: Shape, segment: Segment, element: int) -> tuple[list[_Sizes], int, int]:
    """Each stage's sizes in the largest chunk, and the bytes read and written at a time."""
    space = prod(stage.space for stage in part)
    height = before.height * space
    frames = max(last - first for first, last in spans(before.frames, segment.frames))
    cores = bands(height, segment.rows)
    # near an edge of the picture bands may differ, elsewhere only by where they begin in a row of the input
    edge = (len(part) + 2) * space // cores[0][1] + 2
    found = [_sizes(part, before, frames, core, element) for core in {*cores[: edge + space], *cores[-edge:]}]
    most = [
        _Sizes(*map(max, zip(*stage, strict=True))) for stage in zip(*(sizes for sizes, _, _ in found), strict=True)
    ]
    return most, max(read for _, read, _ in found), max(sent for _, _, sent in found)


def _sizes(
    part: Sequence[Stage], before: Shape, frames: int, core: Rows, element: int
) -> tuple[list[_Sizes], int, int]:
    """Of a chunk of `frames` frames in the band that makes the rows `core`."""
    rows, shape = rows_through(part, core, before)[0], before
    read = element * frames * (rows[1] - rows[0]) * shape.width * part[0].inputs
    found: list[_Sizes] = []
    for stage in part:
        padded_rows = rows[1] - rows[0] + (rows[0] == 0) + (rows[1] == shape.height)
        line = element * padded_rows * (shape.width + 2) * stage.inputs
        made, values, narrow = stage.rows_made(rows, shape.height), 0, 0
        high, after = made[1] - made[0], stage.shape(shape)
        padded = (stage.past + frames) * line
        if stage.kind == "up":
            out = element * frames * (padded_rows - 1) * (shape.width + 1) * 4 * stage.time * stage.outputs
            frames *= stage.time
            values = element * frames * high * after.width * stage.outputs
        else:
            out = element * frames * high * shape.width * (OUT_CHANNELS if stage.kind == "out" else stage.outputs)
        if stage.narrows:
            narrow = element * frames * (rows[1] - rows[0]) * shape.width * stage.outputs
        found.append(_Sizes(stage.past * line, padded, out, values, narrow))
        rows, shape = made, after
    sent = element * frames * (core[1] - core[0]) * shape.width * part[-1].outputs
    return found, read, sent


@dataclass(frozen=True)
class AttentionLayout:
    """Places of the attention's tensors: keys and values of all frames; of one frame the tokens, the queries, scores
    and probabilities of some keys, the sum in float32, and each row's maximum and sum."""

    size: int
    k: Place
    v: Place
    tokens: Place
    q: Place
    scores: Place
    weights: Place
    total: Place
    rows: Place
    read: tuple[tuple[Place, ...], tuple[Place, ...]]
    sent: tuple[tuple[Place, ...], tuple[Place, ...]]


def attention_layout(shape: Shape, channels: int, element: int, on_host: bool) -> AttentionLayout:
    """element: bytes of a number; sums are float32 at least. on_host: whether the frames come from there and go."""
    ends, wide, frame = Ends(), max(4, element), shape.height * shape.width
    keys = min(KEYS, shape.positions)
    k, v = (ends.take(element * shape.positions * channels) for _ in range(2))
    tokens, q = (ends.take(element * frame * channels) for _ in range(2))
    scores, weights = ends.take(wide * frame * max(keys, channels)), ends.take(element * frame * keys)
    total, rows = ends.take(wide * frame * channels), ends.take(2 * wide * frame)
    read, sent = (tuple(ends.take(element * frame * channels) for _ in range(2 * on_host)) for _ in range(2))
    return AttentionLayout(ends.most, k, v, tokens, q, scores, weights, total, rows, (read, ()), (sent, ()))
