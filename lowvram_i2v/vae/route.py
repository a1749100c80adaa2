"""The way of a latent through the decoder, as data: which stages run fused, over which chunks, and what is kept where.

The decoder is a chain of stages: a resnet is two of them (`first`: norm, SiLU, convolution; `second`: norm, SiLU,
convolution, residual). Stages between two kept tensors form a segment; it runs over bands of rows, and in a band over
chunks of frames. A stage needs one row more on each side than it makes, and two past frames, which it carries along.

A norm's moments are those of the whole tensor before it. What a segment keeps is measured as it is written, so a
segment of one stage runs once. In a longer one the later norms take a pass each to be measured (`exact`), or, for the
last and largest stages, are measured all at once with the moments known so far, and again until they are good enough.

No torch here: the planner does this arithmetic too. Left out: columns, a band is as wide as the picture, so that what
a chunk reads of a frame is one piece of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowvram_i2v.vae.config import BLOCK_STRIDES, BLOCKS, VaeConfig

OUT_CHANNELS = 8  # the last convolution makes 3, and tensor cores want eight: the rest are zero and cut off

Rows = tuple[int, int]
"""First row and the row after the last."""


@dataclass(frozen=True)
class Shape:
    """Frames, rows and columns of a tensor."""

    frames: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Stage:
    """kind: in | first | second | attend | up | out. time and space: how much longer and larger `up` makes it."""

    kind: str
    inputs: int
    outputs: int
    time: int = 1
    space: int = 1

    @property
    def narrows(self) -> bool:
        return self.kind == "first" and self.inputs != self.outputs

    @property
    def past(self) -> int:
        """Frames that the convolution sees before the current one."""
        return 1 if self.time > 1 else 2

    def shape(self, before: Shape) -> Shape:
        frames = (before.frames - 1) * self.time + 1
        return Shape(frames, before.height * self.space, before.width * self.space)

    def rows_read(self, made: Rows, height: int) -> Rows:
        """Rows of the input, `height` high, that the rows `made` need."""
        first, last = made
        if self.kind == "up":
            return max(0, (first - 1) // 2), min(height, (last + 2) // 2)
        return max(0, first - 1), min(height, last + 1)

    def rows_made(self, read: Rows, height: int) -> Rows:
        """Rows that come out where the rows `read`, of `height`, go in: at the picture's edges nothing is lost."""
        first, last = read[0] - (read[0] == 0), read[1] + (read[1] == height)
        if self.kind == "up":
            return max(0, 2 * first + 1), min(2 * height, 2 * last - 1)
        return first + 1, last - 1


def stages(config: VaeConfig) -> tuple[Stage, ...]:
    """All stages of the decoder, in order."""
    widths = config.block_out_channels[::-1]
    resnet = [Stage("first", widths[0], widths[0]), Stage("second", widths[0], widths[0])]
    found = [Stage("in", config.latent_channels, widths[0]), *resnet, Stage("attend", widths[0], widths[0]), *resnet]
    for index, width in enumerate(widths):
        inputs = [widths[max(index - 1, 0)], *[width] * config.layers_per_block]
        found += [stage for wide in inputs for stage in (Stage("first", wide, width), Stage("second", width, width))]
        found += [Stage("up", width, width, time, space) for time, space, _ in BLOCK_STRIDES[index : index + 1]]
    assert len(widths) == BLOCKS
    return (*found, Stage("out", widths[-1], config.out_channels))


@dataclass(frozen=True)
class Segment:
    """Stages [first, last) run fused, `frames` frames of their input at a time, in bands of `rows` output rows.

    measures: passes that measure the norms within, all at once, before the one that keeps the result; None: one pass
    for each of them, which is exact. trunk, branch: where the new tensors are kept, "device" or "host", or "" where
    nothing new is kept or the old one is written over. spare: rows above a new trunk, for later segments to do so.
    """

    first: int
    last: int
    frames: int
    rows: int
    trunk: str = ""
    branch: str = ""
    spare: int = 0
    measures: int | None = None


def spans(frames: int, size: int) -> list[Rows]:
    """Chunks of `size` frames. The first has 1 + what is left over, because the first frame is not doubled in time:
    all others make tensors of one shape."""
    if frames <= size:
        return [(0, frames)]
    return list(pairwise([0, *range(1 + (frames - 1) % size, frames, size), frames]))


def bands(height: int, rows: int) -> list[Rows]:
    """Bands of at most `rows` rows, nearly equally high."""
    high = -(-height // -(-height // rows))
    return list(pairwise([*range(0, height, high), height]))


def rows_through(part: Sequence[Stage], made: Rows, before: Shape) -> list[Rows]:
    """Rows at the input of each stage of a segment, and at last `made`, where `before` is the shape of its input."""
    heights = [before.height]
    for stage in part:
        heights.append(heights[-1] * stage.space)
    needed = [made]
    for stage, height in zip(reversed(part), reversed(heights[:-1]), strict=True):
        needed.insert(0, stage.rows_read(needed[0], height))
    return needed
