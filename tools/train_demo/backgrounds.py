"""What lies behind the objects: gradients and textures in muted colours, drawn from a seed.

Invariants: a canvas is float32 [H, W, 3] in 0..1 and covers all that the camera will see, in pixels of the first frame;
no colour is as strong as an object's (`measure.py` tells objects from background by that); every texture varies in both
directions, so that every move of the camera can be seen. `BACKGROUNDS` holds a function for every name in
`prompts.BACKGROUNDS`; it gets pixel coordinates x [1, W] and y [H, 1] with the screen's corner at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.floating[Any]]  # [H, W]
Picture = npt.NDArray[np.float32]  # [H, W, 3]
Random = np.random.Generator
Background = Callable[[Plane, Plane, Random], Picture]


def draw_background(name: str, x: Plane, y: Plane, seed: int) -> Picture:
    """The named background over pixel coordinates x [1, W] and y [H, 1]."""
    picture = BACKGROUNDS[name](x, y, np.random.default_rng(seed))
    return np.asarray(np.clip(picture, 0, 1), np.float32)


def _wall(x: Plane, y: Plane, random: Random) -> Picture:
    """A gradient between two muted tones, in any direction."""
    angle = random.uniform(0, 2 * np.pi)
    share = 0.5 + (np.cos(angle) * (x - x.mean()) + np.sin(angle) * (y - y.mean())) / (x.size + y.size)
    return _mix(_muted(random, 0.45, 0.10), _muted(random, 0.80, 0.10), share)


def _sky(x: Plane, y: Plane, random: Random) -> Picture:
    blue = _mix((0.50, 0.66, 0.84), (0.76, 0.83, 0.90), (y - y.min()) / y.size + 0 * x)
    clouds = _noise(x, y, 26, random) + 0.4 * _noise(x, y, 9, random)
    return _over(blue, (0.97, 0.97, 0.98), np.clip(clouds * 2.2 - 0.1, 0, 0.9))


def _meadow(x: Plane, y: Plane, random: Random) -> Picture:
    shade = 0.5 + 0.6 * _noise(x, y, 22, random) + 0.5 * _noise(x, y, 5, random)
    return _mix((0.36, 0.50, 0.28), (0.60, 0.68, 0.46), np.clip(shade, 0, 1))


def _bricks(x: Plane, y: Plane, random: Random) -> Picture:
    width, height = 26, 12
    row = np.floor(y / height)
    along = x + row % 2 * (width / 2)
    tone = random.random((64, 64), dtype=np.float32)[row.astype(int) % 64, np.floor(along / width).astype(int) % 64]
    bricks = _mix((0.56, 0.42, 0.37), (0.66, 0.53, 0.47), tone)
    mortar = np.minimum(_to_line(along, width), _to_line(y, height))
    return _over(bricks, (0.76, 0.73, 0.69), np.clip(1.6 - mortar, 0, 1))


def _checkers(x: Plane, y: Plane, random: Random) -> Picture:
    side = float(random.choice([14, 18, 22]))
    edge = np.clip(_to_line(x, side), 0, 1) * _wave(x, side) * np.clip(_to_line(y, side), 0, 1) * _wave(y, side)
    tiles = _mix(_muted(random, 0.40, 0.08), _muted(random, 0.78, 0.08), 0.5 + 0.5 * edge)
    return tiles + 0.08 * _noise(x, y, 30, random)[..., None]


def _dots(x: Plane, y: Plane, random: Random) -> Picture:
    side = float(random.choice([13, 16, 20]))
    inside = 0.27 * side - np.hypot((x % side) - side / 2, (y % side) - side / 2)
    paper = _mix(_muted(random, 0.72, 0.08), _muted(random, 0.84, 0.08), 0.5 + 0.5 * _noise(x, y, 40, random))
    return _over(paper, _muted(random, 0.48, 0.10), np.clip(inside + 0.5, 0, 1))


def _night(x: Plane, y: Plane, random: Random) -> Picture:
    dark = _mix((0.05, 0.06, 0.14), (0.13, 0.14, 0.26), 0.5 + 0.7 * _noise(x, y, 40, random))
    light = np.zeros((y.size, x.size), np.float32)
    count = light.size // 400
    rows, columns = random.integers(1, light.shape[0] - 1, count), random.integers(1, light.shape[1] - 1, count)
    strength = random.uniform(0.25, 0.8, count).astype(np.float32)
    light[rows, columns] = strength
    for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        place = rows + down, columns + right
        light[place] = np.maximum(light[place], 0.45 * strength)
    return _over(dark, (0.95, 0.95, 0.90), light)


def _sand(x: Plane, y: Plane, random: Random) -> Picture:
    bend = _noise(x, y, 30, random)
    ripples = np.sin((y + 0.35 * x + 14 * bend) * np.float32(2 * np.pi / 15))
    shade = 0.5 + 0.28 * ripples + 0.35 * bend + 0.5 * _noise(x, y, 4, random)
    return _mix((0.66, 0.58, 0.46), (0.85, 0.79, 0.67), np.clip(shade, 0, 1))


BACKGROUNDS: dict[str, Background] = {
    "plain wall": _wall,
    "cloudy sky": _sky,
    "green meadow": _meadow,
    "brick wall": _bricks,
    "checkered floor": _checkers,
    "dotted wallpaper": _dots,
    "starry night": _night,
    "sandy beach": _sand,
}


def _noise(x: Plane, y: Plane, cell: int, random: Random) -> Plane:
    """Smooth noise about 0, mostly within 0.5: random values every `cell` pixels, joined by cubic splines."""
    down, across = _spline(y.size, cell), _spline(x.size, cell)
    grid = random.random((down.shape[1], across.shape[1]), dtype=np.float32) - np.float32(0.5)
    return np.asarray(down @ grid @ across.T, np.float32) * np.float32(1.6)


@lru_cache(maxsize=64)
def _spline(length: int, cell: int) -> Plane:
    """[length, knots]: the weights of uniform cubic B-splines at every pixel."""
    position = (np.arange(length) + 0.5) / cell
    knots = np.arange(length // cell + 4) - 1
    distance = np.abs(position[:, None] - knots)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _muted(random: Random, brightness: float, strength: float) -> tuple[float, ...]:
    """A tone about `brightness` whose channels differ by at most `strength`."""
    return tuple(brightness + random.uniform(-0.5, 0.5, 3) * strength)


def _to_line(position: Plane, period: float) -> Plane:
    """Distance to the nearest multiple of the period."""
    return np.asarray(np.abs(np.mod(position + period / 2, period) - np.float32(period / 2)))


def _wave(position: Plane, period: float) -> Plane:
    """1 and -1 in turn."""
    return np.asarray(1 - 2 * (np.floor(position / period) % 2), np.float32)


def _mix(first: tuple[float, ...], second: tuple[float, ...], share: Plane) -> Picture:
    """From `first` where share is 0 to `second` where it is 1."""
    a, b = np.array(first, np.float32), np.array(second, np.float32)
    return np.asarray(a + (b - a) * share[..., None], np.float32)


def _over(below: Picture, above: tuple[float, ...], alpha: Plane) -> Picture:
    return np.asarray(below + (np.array(above, np.float32) - below) * alpha[..., None], np.float32)
