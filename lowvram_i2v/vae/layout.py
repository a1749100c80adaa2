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
from functools import lru_cache
from math import prod
from typing import NamedTuple

from lowvram_i2v.vae.route import OUT_CHANNELS, Rows, Segment, Shape, Stage, bands, rows_through

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
        return _end(self._low)

    @property
    def extent(self) -> int:
        return _end(self._low) + _end(self._high)


def _end(taken: list[Place]) -> int:
    """Of places in order, none over another: where the last one ends."""
    return taken[-1].start + taken[-1].size if taken else 0


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


class _Lines(NamedTuple):
    """Rows of one stage's tensors in the band that needs the most: its input, that with what is padded, its output."""

    read: int
    padded: int
    made: int


class _Sizes(NamedTuple):
    """Bytes of one stage's tensors in the largest chunk."""

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
    sizes, read, sent = _largest(tuple(part), before, segment, element)
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
                old = []  # `second` will add the trunk that `first` has read
        else:
            trunk, branch = out, None
        for place in old:
            ends.give(place)
        buffers.append(Buffers(carry, padded, out, values, narrow))
    return Layout(ends.most, tuple(buffers), (reads[0], reads[1]), (sends[0], sends[1]))


def _largest(part: tuple[Stage, ...], before: Shape, segment: Segment, element: int) -> tuple[list[_Sizes], int, int]:
    """Each stage's sizes in the largest chunk, and the bytes read and written at a time."""
    lines, core = _most_lines(part, before.height, segment.rows)
    frames, shape = min(segment.frames, before.frames), before
    read = element * frames * lines[0].read * shape.width * part[0].inputs
    found: list[_Sizes] = []
    for stage, rows in zip(part, lines, strict=True):
        line = element * rows.padded * (shape.width + 2) * stage.inputs
        values, narrow, after = 0, 0, stage.shape(shape)
        padded = (stage.past + frames) * line
        if stage.kind == "up":
            out = element * frames * (rows.padded - 1) * (shape.width + 1) * 4 * stage.time * stage.outputs
            frames *= stage.time
            values = element * frames * rows.made * after.width * stage.outputs
        else:
            out = element * frames * rows.made * shape.width * (OUT_CHANNELS if stage.kind == "out" else stage.outputs)
        if stage.narrows:
            narrow = element * frames * rows.read * shape.width * stage.outputs
        found.append(_Sizes(stage.past * line, padded, out, values, narrow))
        shape = after
    sent = element * frames * core * shape.width * part[-1].outputs
    return found, read, sent


@lru_cache(maxsize=4096)  # a search asks for the same rows with other frames, another width, or another memory
def _most_lines(part: tuple[Stage, ...], height: int, rows: int) -> tuple[tuple[_Lines, ...], int]:
    """The most rows of each stage, of an input `height` high, in bands of at most `rows` rows; and of a band."""
    space = prod(stage.space for stage in part)
    cores = bands(height * space, rows)
    # near an edge of the picture bands may differ, elsewhere only by where they begin in a row of the input
    edge = (len(part) + 2) * space // cores[0][1] + 2
    some = {*cores[: edge + space], *cores[-edge:]}
    by_stage = zip(*(_lines(part, height, core) for core in some), strict=True)
    most = tuple(_Lines(*map(max, zip(*stage, strict=True))) for stage in by_stage)
    return most, max(last - first for first, last in some)


def _lines(part: tuple[Stage, ...], height: int, core: Rows) -> list[_Lines]:
    """Of the band that makes the rows `core`."""
    rows, found = rows_through(part, core, Shape(1, height, 1))[0], []
    for stage in part:
        read, made = rows[1] - rows[0], stage.rows_made(rows, height)
        found.append(_Lines(read, read + (rows[0] == 0) + (rows[1] == height), made[1] - made[0]))
        rows, height = made, height * stage.space
    return found


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
