"""Do a decoder's tiles show? What happens to brightness where tiles met, against what happens elsewhere in the picture.

A decoder with overlapping tiles fades one into the next. A hard border is a step from line to line; a fade between
tiles of different brightness is a ramp, which bends where it begins and where it ends. Both are measured at each line
(a column, a row, or a frame), in levels of 255 of brightness averaged over 32 pixels across:

    step    from the line before:  d[x] = y[x] - y[x-1]
    bend    change of slope:       d[x] = g[x+reach] - g[x-reach], where g[x] is the mean of the `reach` lines from x on
                                   less that of the `reach` lines before

each beyond what the same n lines before and after makes expect, d[x] - (d[x-n] + d[x+n]) / 2 (n is 1 and 2 reach), so
that a picture's slopes and curves count for nothing. Reach is an eighth of the fade: of two tiles 4 levels apart that
fade into each other over 64 pixels, reach is 8 and the bend where the fade begins 4 / 8 = 0.5.

A line's level is the rms over frames, and of the stretches across the median: a border runs through all of them, an
edge of the picture through few. The same at lines inside tiles says what is the picture's own (`Seam.limit`). Lines
inside are those at equal places of a latent cell (8 pixels, 4 frames), because decoders leave a pattern of that
period; what all have in common (their median) is taken off.

Invariants: planes are taken one at a time, none is held; numpy alone. Left out: tiles of a video whose first frames
were dropped, and seams along less than half of a border.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]  # [H, W]
Lines = npt.NDArray[np.float64]  # [lines, stretches across]
Squares = npt.NDArray[np.float64]  # [2, lines, stretches]: step and bend, squared or not

STRETCH = 32  # pixels across that are averaged: texture is no seam
CELL_PIXELS, CELL_FRAMES = 8, 4
SMALLEST_TILE = 16  # pixels or frames, whose quarter still fades
KINDS = ("step", "bend")
VISIBLE = 0.1  # levels
QUIET = 0.01  # levels; what is below this anywhere counts as this


@dataclass(frozen=True)
class Tiles:
    """Size of a tile in pixels and in frames, and the share of it that fades into the next: the released decoder's."""

    pixels: int = 256
    frames: int = 64
    overlap: float = 0.25

    def places(self, width: int, height: int, frames: int) -> list[Places]:
        """Of columns, rows and frames. What is one tile has no fades."""
        space, time = max(width, height) > self.pixels, frames > self.frames
        return [
            self._along("columns", width if space else 0, self.pixels, CELL_PIXELS, 0),
            self._along("rows", height if space else 0, self.pixels, CELL_PIXELS, 0),
            self._along("frames", frames if time else 0, self.frames, CELL_FRAMES, 1),
        ]

    def _along(self, axis: str, extent: int, tile: int, cell: int, phase: int) -> Places:
        fade = int(tile * self.overlap)
        starts = range(phase + tile - fade, extent, tile - fade)
        fades = tuple((start, min(start + fade, extent)) for start in starts)
        return Places(axis, extent, fades, max(1, fade // 8), range(phase, extent, cell))


@dataclass(frozen=True)
class Places:
    """Where tiles meet along one axis of `extent` lines. fades: (first line, first line after) of each.

    reach: of the bend. cells: the lines at which latent cells begin, as the fades do.
    """

    axis: str
    extent: int
    fades: tuple[tuple[int, int], ...]
    reach: int
    cells: range

    def borders(self, kind: int) -> list[int]:
        """Where fades begin and end, as far as enough lines are around to measure step (0) or bend (1)."""
        before, after = self._around(kind)
        ends = sorted({line for fade in self.fades for line in fade})
        return [line for line in ends if before <= line <= self.extent - after]

    def inside(self, kind: int) -> list[int]:
        """Lines whose surroundings touch no fade."""
        before, after = self._around(kind)
        margin = max(self._around(1))
        lines = [line for line in self.cells if before <= line <= self.extent - after]
        return [x for x in lines if all(x + margin <= first or x >= last + margin for first, last in self.fades)]

    def _around(self, kind: int) -> tuple[int, int]:
        return (4 * self.reach, 4 * self.reach) if kind else (2, 2)

    def squares(self, lines: Lines) -> Squares:
        """[lines, stretches] -> squares of step and bend, without what the lines inside have in common."""
        changes = _changes(lines, self.reach)
        for kind, change in enumerate(changes):
            if inside := self.inside(kind):
                change -= np.median(change[inside])
        return np.square(changes)

    def seams(self, levels: npt.NDArray[np.float64]) -> list[Seam]:
        """levels: [2, lines], of step and of bend."""
        seams = []
        for kind, name in enumerate(KINDS):
            groups = self.borders(kind), self.inside(kind)
            if all(groups):
                seams.append(Seam(self.axis, name, *(tuple((x, float(levels[kind, x])) for x in of) for of in groups)))
        return seams


@dataclass(frozen=True)
class Seam:
    """One measure along one axis. borders, interior: (line, its level)."""

    axis: str
    kind: str
    borders: tuple[tuple[int, float], ...]
    interior: tuple[tuple[int, float], ...]

    @property
    def own(self) -> float:
        """The picture's own level: mean of the lines inside tiles."""
        return max(_mean(self.interior), QUIET)

    @property
    def mean(self) -> float:
        """Of the borders, in units of the picture's own level: 1 where there is no seam."""
        return _mean(self.borders) / self.own

    @property
    def most(self) -> float:
        """The same of the border that shows most."""
        return max(level for _, level in self.borders) / self.own

    @property
    def most_inside(self) -> float:
        """The same of the line inside that shows most: a border below it is nothing to see."""
        return max(max(level for _, level in self.interior) / self.own, 1.0)

    @property
    def limit(self) -> float:
        """What chance allows a border: four deviations above the mean of the lines inside, or the most of them."""
        spread = float(np.std([level for _, level in self.interior])) / self.own
        return max(1.0 + 4 * spread, self.most_inside)

    @property
    def stands_out(self) -> bool:
        """A border beyond the limit, by more than can be seen at all."""
        return self.most > self.limit and self.height > VISIBLE

    @property
    def worst(self) -> int:
        """The border that shows most: its first line or frame."""
        return max(self.borders, key=lambda border: border[1])[0]

    @property
    def height(self) -> float:
        """What the worst border adds to the picture's own level, in levels."""
        return math.sqrt(max((self.most * self.own) ** 2 - self.own**2, 0.0))

    def text(self) -> str:
        return (
            f"{self.kind} {self.mean:.2f} of {self.own:.2f}, most {self.most:.2f} at {self.worst} "
            f"(inside {self.most_inside:.2f}, limit {self.limit:.2f}{', stands out' if self.stands_out else ''})"
        )


class SeamMeter:
    """Takes a video's planes of brightness one after the other."""

    def __init__(self, tiles: Tiles | None = None) -> None:
        self._tiles = tiles or Tiles()
        self._sums: dict[str, Squares] = {}
        self._blocks: list[npt.NDArray[np.float64]] = []
        self._size = (0, 0)

    def add(self, plane: Plane) -> None:
        """plane: [H, W] in 0..255, or a difference of two such."""
        self._size = (plane.shape[1], plane.shape[0])
        lines = {"rows": _averaged(plane, 1), "columns": _averaged(plane, 0).T}
        self._blocks.append(_averaged(lines["rows"], 0).ravel())
        for place in self._tiles.places(*self._size, 1):
            if place.fades:
                self._sums[place.axis] = self._sums.get(place.axis, 0.0) + place.squares(lines[place.axis])

    def seams(self) -> list[Seam]:
        """Step and bend of each axis along which tiles met; nothing for an axis too short to be measured."""
        count, found = len(self._blocks), []
        for place in self._tiles.places(*self._size, count) if count else []:
            if place.fades:
                known = self._sums.get(place.axis)
                squares = place.squares(np.stack(self._blocks)) if known is None else known / count
                found += place.seams(np.sqrt(np.median(squares, axis=2)))
        return found


def seams_of(planes: Iterable[Plane], tiles: Tiles | None = None) -> list[Seam]:
    """Of a whole video's planes of brightness, [H, W] each."""
    meter = SeamMeter(tiles)
    for plane in planes:
        meter.add(plane)
    return meter.seams()


def seam_lines(name: str, seams: Sequence[Seam]) -> list[str]:
    """For people: a line an axis."""
    axes = dict.fromkeys(seam.axis for seam in seams)
    return [f"{name}, {axis}: " + "; ".join(seam.text() for seam in seams if seam.axis == axis) for axis in axes]


def _averaged(plane: npt.NDArray[np.floating], axis: int) -> Lines:
    """Means of stretches of 32 along `axis`; what remains at the end counts as one too."""
    side = plane.shape[axis]
    starts = np.arange(0, side, STRETCH)
    counts = np.diff(np.append(starts, side))
    sums = np.add.reduceat(plane, starts, axis=axis, dtype=np.float64)
    return np.asarray(sums / (counts if axis == 1 else counts[:, None]), np.float64)


def _changes(lines: Lines, reach: int) -> Squares:
    """[lines, stretches] -> step and bend at each line; NaN where too few lines are around it."""
    count = lines.shape[0]
    changes = np.full((2, *lines.shape), np.nan)
    if count >= 4:
        changes[0, 2:-1] = _beyond(np.diff(lines, axis=0), 1)
    if count >= 8 * reach:
        sums = np.cumsum(np.pad(lines, ((1, 0), (0, 0))), axis=0)
        gained = _over(_over(sums, reach), reach) / reach  # by the mean of `reach` lines from those before them
        changes[1, 4 * reach : count - 4 * reach + 1] = _beyond(_over(gained, 2 * reach), 2 * reach)
    return changes


def _over(lines: Lines, distance: int) -> Lines:
    """What is gained over `distance` lines."""
    return lines[distance:] - lines[:-distance]


def _beyond(changes: Lines, distance: int) -> Lines:
    """Of each change what exceeds the mean of those `distance` lines before and after it."""
    around = changes[: -2 * distance] + changes[2 * distance :]
    return changes[distance:-distance] - around / 2


def _mean(lines: Sequence[tuple[int, float]]) -> float:
    return sum(level for _, level in lines) / max(len(lines), 1)
