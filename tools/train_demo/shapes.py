"""Objects as signed distances: negative inside, about 1 at a distance of one radius outside.

Every function takes the object's own coordinates u (right) and v (down), float32 arrays of any one shape, in which the
object about fits into the unit circle with its centre of mass in the middle, and returns distances of that shape in
radii. Near the edge the gradient is close to 1, which is all that anti-aliasing needs. `SHAPES` holds a function for
every name in `prompts.SHAPES`, `MARKS` the dark parts of those that have any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.floating[Any]]  # float32
Distance = Callable[[Plane, Plane], Plane]


def _ball(u: Plane, v: Plane) -> Plane:
    return np.asarray(np.hypot(u, v) - np.float32(0.92))


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - np.float32(0.66)) - np.float32(0.27)


def _square(u: Plane, v: Plane) -> Plane:
    return _box(u, v, 0.7, 0.7)


def _diamond(u: Plane, v: Plane) -> Plane:
    return (np.abs(u) * np.float32(1 / 0.58) + np.abs(v) * np.float32(1 / 0.98) - 1) * np.float32(0.499)


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.asarray(np.maximum(v, np.abs(u) * np.float32(0.866) - v * np.float32(0.5)) - np.float32(0.49))


def _star(u: Plane, v: Plane) -> Plane:
    """Folded into one tenth: the edge from a tip at radius 1 to a notch at radius 0.44."""
    tenth = np.pi / 5
    radius = np.hypot(u, v)
    angle = np.abs(np.mod(np.arctan2(u, -v) + tenth, 2 * tenth) - tenth)
    notch_x, notch_y = 0.44 * np.cos(tenth), 0.44 * np.sin(tenth)
    length = np.hypot(1 - notch_x, notch_y)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    return np.asarray(((x - 1) * notch_y + y * (1 - notch_x)) / length, np.float32)


def _heart(u: Plane, v: Plane) -> Plane:
    """A square on its corner and two half discs on its upper edges."""
    side = np.abs(u)
    square = (side + np.abs(v - np.float32(0.22)) - np.float32(0.74)) * np.float32(0.7071)
    return np.asarray(np.minimum(square, np.hypot(side - np.float32(0.37), v + np.float32(0.15)) - np.float32(0.523)))


def _cross(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    return np.asarray(np.maximum(np.maximum(a, b) - np.float32(0.9), np.minimum(a, b) - np.float32(0.3)))


def _moon(u: Plane, v: Plane) -> Plane:
    inner = np.float32(0.63) - np.hypot(u - np.float32(0.74), v)
    return np.asarray(np.maximum(np.hypot(u - np.float32(0.28), v) - np.float32(0.83), inner))


def _fish(u: Plane, v: Plane) -> Plane:
    body = (np.hypot((u - np.float32(0.16)) / np.float32(0.76), v / np.float32(0.52)) - 1) * np.float32(0.55)
    tail = np.maximum(-np.float32(0.93) - u, np.abs(v) * np.float32(0.8) + (u + np.float32(0.35)) * np.float32(0.6))
    return np.asarray(np.minimum(body, tail))


def _car(u: Plane, v: Plane) -> Plane:
    body = _box(u, v - np.float32(0.15), 0.92, 0.27)
    cabin = _box(u + np.float32(0.06), v + np.float32(0.28), 0.5, 0.25)
    return np.asarray(np.minimum(np.minimum(body, cabin), _wheels(u, v)))


def _wheels(u: Plane, v: Plane) -> Plane:
    return np.asarray(np.hypot(np.abs(u) - np.float32(0.5), v - np.float32(0.42)) - np.float32(0.24))


def _house(u: Plane, v: Plane) -> Plane:
    side = np.abs(u)
    roof = np.maximum(v + np.float32(0.1), side * np.float32(0.64) - (v + np.float32(0.95)) * np.float32(0.768))
    return np.asarray(np.minimum(roof, _box(u, v - np.float32(0.32), 0.6, 0.45)))


def _eye(u: Plane, v: Plane) -> Plane:
    return np.asarray(np.hypot(u - np.float32(0.55), v + np.float32(0.12)) - np.float32(0.11))


def _door(u: Plane, v: Plane) -> Plane:
    return _box(u, v - np.float32(0.5), 0.16, 0.27)


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.asarray(np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height)))


SHAPES: dict[str, Distance] = {
    "ball": _ball,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "moon": _moon,
    "fish": _fish,
    "car": _car,
    "house": _house,
}
MARKS: dict[str, Distance] = {"fish": _eye, "car": _wheels, "house": _door}
