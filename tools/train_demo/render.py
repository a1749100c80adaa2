"""A scene becomes frames: background, shadows, shaded objects. numpy only.

Invariants: the same scene gives the same bytes; edges are anti-aliased from signed distances, at positions that are not
rounded; where the camera stands still only the windows around the objects are worked on, all frames of an object at
once. Order: background, then the second object, then the first, each with its shadow. Left out: gamma (colours are
mixed as stored), motion blur.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tools.train_demo.backgrounds import draw_background
from tools.train_demo.prompts import COLOURS
from tools.train_demo.scenes import Course, Scene, Thing, camera_course, courses
from tools.train_demo.shapes import MARKS, SHAPES

Video = npt.NDArray[np.uint8]  # [F, H, W, 3]
Stack = npt.NDArray[np.floating[Any]]  # [F, h, w], float32

SHADOW = (5, 6)  # pixels right and down
SHADOW_BLUR, SHADOW_DEPTH = 7.0, 0.38
RIM, RIM_DEPTH = 3.0, 0.22  # an object darkens towards its edge: pixels, share
LIGHT = 0.16  # how much brighter its upper left side is
PATTERN_DEPTH = 0.30
MARK_COLOUR = 0.10


def render(scene: Scene) -> Video:
    """The scene's frames, uint8 [F, H, W, 3], RGB. The first one is the picture that the video starts from."""
    video = _background(scene)
    for thing, course in reversed(list(zip(scene.things, courses(scene), strict=True))):
        _draw(video, thing, course)
    return video


def _background(scene: Scene) -> Video:
    width, height = scene.size
    camera = camera_course(scene.script.camera, scene.frames)
    columns, rows = _seen(width, camera.x, camera.zoom), _seen(height, camera.y, camera.zoom)
    left, top = int(np.floor(columns.min())) - 1, int(np.floor(rows.min())) - 1
    x = np.arange(left, int(np.ceil(columns.max())) + 2, dtype=np.float32)[None] + np.float32(0.5)
    y = np.arange(top, int(np.ceil(rows.max())) + 2, dtype=np.float32)[:, None] + np.float32(0.5)
    canvas = draw_background(scene.script.background, x, y, scene.background_seed) * np.float32(255)
    if scene.script.camera == "still":
        frame = np.rint(canvas[-top : height - top, -left : width - left]).astype(np.uint8)
        return np.repeat(frame[None], scene.frames, axis=0)
    video = np.empty((scene.frames, height, width, 3), np.uint8)
    for index, frame in enumerate(video):
        seen = _sample(_sample(canvas, rows[index] - top, 0), columns[index] - left, 1)
        frame[:] = np.rint(seen, out=seen)
    return video


def _seen(side: int, offset: npt.NDArray[np.float32], zoom: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[F, side]: which place, in pixels of the first frame, each row or column of each frame shows."""
    pixels = np.arange(side, dtype=np.float32) + np.float32(0.5 - side / 2)
    return side / 2 - np.float32(0.5) + offset[:, None] + pixels / zoom[:, None]


def _sample(canvas: npt.NDArray[np.float32], places: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Linear interpolation along one axis. Evenly shifted places are slices, which is faster than picking."""
    below = np.floor(places).astype(np.intp)
    share = (places - below).astype(np.float32)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    if below[-1] - below[0] == len(below) - 1 and np.ptp(share) < 1e-3:
        start, stop = below[0], below[0] + len(below)
        a = canvas[start:stop] if axis == 0 else canvas[:, start:stop]
        if share[0] < 1e-3:
            return np.array(a)
        b = canvas[start + 1 : stop + 1] if axis == 0 else canvas[:, start + 1 : stop + 1]
        return np.asarray(a + (b - a) * share[0])
    a, b = np.take(canvas, below, axis), np.take(canvas, below + 1, axis)
    b -= a
    b *= share.reshape(shape)
    b += a
    return b


def _draw(video: Video, thing: Thing, course: Course) -> None:
    """Lays the object and its shadow over the frames, in windows that hold both wherever they are."""
    frames, height, width = video.shape[:3]
    reach = float(course.radius.max()) + 2
    corner_x, columns = _windows(course.x, reach, max(SHADOW) + SHADOW_BLUR, width)
    corner_y, rows = _windows(course.y, reach, max(SHADOW) + SHADOW_BLUR, height)
    cut = [
        (frame, slice(top, top + rows), slice(left, left + columns))
        for frame, (top, left) in enumerate(zip(corner_y.tolist(), corner_x.tolist(), strict=True))
    ]
    x = np.arange(columns, dtype=np.float32) + (corner_x - course.x + np.float32(0.5)).astype(np.float32)[:, None]
    y = np.arange(rows, dtype=np.float32) + (corner_y - course.y + np.float32(0.5)).astype(np.float32)[:, None]
    alpha, shade, mark, shadow = _look(thing, course, x[:, None, :], y[:, :, None])
    windows = np.empty((frames, 3, rows, columns), np.float32)
    for frame, down, across in cut:
        windows[frame] = video[frame, down, across].transpose(2, 0, 1)
    windows *= (1 - shadow)[:, None]
    for channel, value in enumerate(COLOURS[thing.subject.colour]):
        plane = windows[:, channel]
        paint = shade * np.float32(255 * value)
        paint += (np.float32(255 * MARK_COLOUR) - paint) * mark if mark is not None else 0
        np.minimum(paint, 255, out=paint)
        paint -= plane
        paint *= alpha
        plane += paint
    np.rint(windows, out=windows)
    for frame, down, across in cut:
        video[frame, down, across] = windows[frame].transpose(1, 2, 0)


def _windows(centre: npt.NDArray[np.float32], reach: float, more: float, side: int) -> tuple[npt.NDArray[np.intp], int]:
    """First pixel of every frame's window and the length of all: `reach` before the centre, `more` further after it,
    but no more than the picture."""
    length = min(int(np.ceil(2 * reach + more)) + 1, side)
    first = np.floor(centre - np.float32(reach)).astype(np.intp)
    return np.clip(first, 0, side - length), length


def _look(thing: Thing, course: Course, x: Stack, y: Stack) -> tuple[Stack, Stack, Stack | None, Stack]:
    """Coverage, brightness, share of dark marks and shadow of an object, at pixel coordinates from its centre."""
    radius, angle, opacity = (track[:, None, None] for track in (course.radius, course.angle, course.opacity))
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    u, v = x * cos + y * sin, y * cos - x * sin
    distance = SHAPES[thing.subject.shape](u, v)
    distance *= radius  # pixels
    alpha = np.clip(np.float32(0.5) - distance, 0, 1)
    shade = _shade(thing, u, v, x / radius, y / radius)
    shade *= 1 - np.float32(RIM_DEPTH) * np.clip(1 + distance / np.float32(RIM), 0, 1)
    mark = None
    if thing.subject.shape in MARKS:
        mark = np.clip(np.float32(0.5) - MARKS[thing.subject.shape](u, v) * radius, 0, 1)
    soft = np.clip(np.float32(0.5) - distance / np.float32(SHADOW_BLUR), 0, 1)
    shadow = np.zeros_like(soft)
    right, down = SHADOW
    shadow[:, down:, right:] = soft[:, :-down, :-right]
    shadow *= np.float32(SHADOW_DEPTH) * opacity
    alpha *= opacity
    return alpha, shade, mark, shadow


def _shade(thing: Thing, u: Stack, v: Stack, x: Stack, y: Stack) -> Stack:
    """Brightness about 1: light from the upper left of the screen, a pattern that turns with the object."""
    if thing.subject.shape == "ball":
        far = np.square(x + np.float32(0.35)) + np.square(y + np.float32(0.4))
        shade = np.float32(1.15) - np.float32(0.42) * np.minimum(far, 1.4)
    else:
        shade = 1 - np.float32(LIGHT) * np.clip((x + y) * np.float32(0.7), -1, 1)
    if thing.subject.pattern == "striped":
        ink = np.clip(np.sin(u * np.float32(10)) * 3, -1, 1)
    elif thing.subject.pattern == "spotted":
        ink = np.clip((np.sin(u * np.float32(9)) * np.sin(v * np.float32(9)) - np.float32(0.35)) * 5, -1, 1)
    else:
        return np.asarray(shade, np.float32)
    return np.asarray(shade * (1 - np.float32(PATTERN_DEPTH / 2) * (1 + ink)), np.float32)
