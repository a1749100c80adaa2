"""What a video shows, measured: where each object of a known colour is, how it moves, and how the camera moves.

    objects   pixels weigh by how strong the object's hue is in them; centroid, size, angle, opacity follow from these
    camera    shift and zoom of the background by least squares on brightness, repeated until they fit (Lucas and Kanade
              1981), objects masked out. Each frame is compared with a key frame up to `HOP` frames earlier, so that few
              steps add up; objects are then seen as the camera would if it stood
    motion    one word of `prompts.ACTIONS` for each object and one of `prompts.CAMERAS`

Invariants: what the prompt says does happen is never looked at, only which colours there are; a video in which nothing
moves is "still". Frames are uint8 [F, H, W, 3]. Left out: shapes, and objects that hide one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lowvram_i2v.compare import LUMA, psnr
from tools.train_demo.prompts import COLOURS

Video = npt.NDArray[np.uint8]  # [F, H, W, 3]
Floats = npt.NDArray[np.float32]
Track = npt.NDArray[np.float64]  # [F]
Real = TypeVar("Real", np.float32, np.float64)

WEAKEST = 0.12  # how much more of its hue than the background's a pixel needs to count, of 0..1
HUE_SLOPE = 2.0  # a hue that is off by atan(1 / HUE_SLOPE), 27 degrees, counts nothing
CORE = 0.12  # share of the first frame's area whose strongest pixels tell the opacity
SEEN = 0.35  # opacity above which position, size and angle are measured
GONE = 0.5  # opacity at the end below which an object has faded
MOVED, PANNED = 9.0, 12.0  # pixels
ZOOMED, GREW, SHRANK = 1.12, 1.25, 0.75
TURNED = np.radians(50)
ROUND_TRIP = np.radians(270)
EDGE = 3  # of the picture at half its size, which the camera's track leaves out
HARMONICS = (1, 2, 3, 4, 5)
SHAPELESS = 0.04  # of a harmonic: below it nothing tells the angle
SPREAD = 12  # pixels around an object, its shadow among them, that are not background
COLOUR_KEPT = 0.16  # distance of mean colours, each channel 0..1
HUE_KEPT = np.radians(20)
HOP = 8  # frames between two key frames of the camera's track
ROUNDS = 3  # of least squares for each frame
PLAIN = 0.008  # brightness per pixel of the picture at half its size: a slope below it says nothing about the camera
TEXTURED = 0.05  # share of the background that has to be steeper than that before a camera can be seen to move
PICKED = 1500  # about as many of its pixels are compared
STILL_SEEN = 0.25  # share of them that another frame has to show, else nothing is known of it
NOISE = 0.002  # of brightness: differences below it are no misfit
DRAWN = 0.001  # share by which least squares are drawn towards no change


@dataclass(frozen=True)
class ObjectTrack:
    """One object, frame by frame, each [F]; NaN where it cannot be seen. x, y: pixels; size: root mean square distance
    from the centroid; angle: radians clockwise since the first frame, 0 where the shape tells none; opacity: 1 in the
    first frame. colours: [F, 3], mean of its pixels in 0..1."""

    x: Track
    y: Track
    size: Track
    angle: Track
    opacity: Track
    colours: npt.NDArray[np.float64]


@dataclass(frozen=True)
class CameraTrack:
    """Where a place of the first frame lies in each frame: centre + (place - centre) * zoom + (x, y). Each [F]."""

    x: Track
    y: Track
    zoom: Track


@dataclass(frozen=True)
class Measurement:
    """motion: a word for each object, in the order of the colours asked for, then the camera's.
    flicker: mean |second difference in time| / 2 of the background, in levels of 255."""

    motion: tuple[str, ...]
    flicker: float
    objects: tuple[ObjectTrack, ...]
    camera: CameraTrack


def measure(video: Video, colours: Sequence[str]) -> Measurement:
    """Measures a video with objects of these colours. Raises ValueError for fewer than 3 frames."""
    if len(video) < 3:
        raise ValueError(f"{len(video)} frames show no motion")
    planes = np.ascontiguousarray(video.transpose(3, 0, 1, 2)).astype(np.float32)
    planes *= np.float32(1 / 255)
    chroma = _chroma(*planes)
    weights = [object_weights(*chroma, colour) for colour in colours]
    outside = _outside(weights)
    camera = track_camera(np.tensordot(LUMA, planes, 1), outside)
    centre = (video.shape[2] - 1) / 2, (video.shape[1] - 1) / 2
    objects = tuple(track_object(planes, weight) for weight in weights)
    actions = [classify_object(_as_if_it_stood(track, camera, centre)) for track in objects]
    return Measurement(
        motion=(*actions, classify_camera(camera)),
        flicker=flicker(video, outside),
        objects=objects,
        camera=camera,
    )


def first_frame_psnr(video: Video, picture: npt.NDArray[np.uint8]) -> float:
    """dB between the first frame and the picture that it should be, uint8 [H, W, 3]."""
    return psnr(float(np.mean(np.square(video[0].astype(np.float64) - picture))))


def object_weights(across: Floats, along: Floats, colour: str) -> Floats:
    """The frames' chroma, twice [F, H, W] -> [F, H, W] in 0..1: how strongly each pixel has the colour's hue, beyond
    what most of the first frame has."""
    hue_x, hue_y = (float(value) for value in _chroma(*np.array(COLOURS[colour], np.float32)))
    strength = float(np.hypot(hue_x, hue_y))
    hue_x, hue_y = hue_x / strength, hue_y / strength
    toward = across * np.float32(hue_x) + along * np.float32(hue_y)
    aside = np.abs(along * np.float32(hue_x) - across * np.float32(hue_y))
    aside -= np.float32(0.05)
    np.maximum(aside, 0, out=aside)
    aside *= np.float32(HUE_SLOPE)
    toward -= aside
    usual = float(np.median(toward[0, ::2, ::2]))
    weakest = max(usual, 0.0) + WEAKEST
    toward -= np.float32(weakest)
    toward *= np.float32(1 / (0.75 * strength - weakest))
    return np.clip(toward, 0, 1, out=toward)


def track_object(planes: Floats, weights: Floats) -> ObjectTrack:
    """Where the weights lie. planes: the video as [3, F, H, W] in 0..1; weights [F, H, W]."""
    count, height, width = weights.shape
    area = max(float((weights[0] > 0.5).sum()), 1.0)
    core = max(int(CORE * area), 4)
    strongest = np.array([_top(weight[weight > 0], core) for weight in weights])
    opacity = strongest / max(float(strongest[0]), 1e-6)
    values = np.full((8, count), np.nan)
    moments = np.zeros((count, len(HARMONICS)), complex)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for index, weight in enumerate(weights):
        if opacity[index] < SEEN or strongest[0] < SEEN:
            continue
        inside = weight > 0.4 * strongest[index]
        mass, columns, rows = weight[inside].astype(np.float64), x[inside], y[inside]
        total = mass.sum()
        mean_x, mean_y = (mass * columns).sum() / total, (mass * rows).sum() / total
        place = (columns - mean_x) + 1j * (rows - mean_y)
        spread = np.abs(place) ** 2
        colour = planes[:, index][:, inside] @ mass / total
        values[:6, index] = mean_x, mean_y, np.sqrt((mass * spread).sum() / total), *colour
        cubes = mass * np.abs(place) ** 3
        unit = place / np.maximum(np.abs(place), 1e-6)
        moments[index] = [(cubes * unit**k).sum() / max(cubes.sum(), 1e-9) for k in HARMONICS]
    return ObjectTrack(values[0], values[1], values[2], _angle(moments), opacity.astype(np.float64), values[3:6].T)


def _top(values: Floats, count: int) -> float:
    """Mean of the largest `count` values, missing ones counted as 0."""
    largest = values if len(values) <= count else np.partition(values, -count)[-count:]
    return float(largest.sum()) / count


def _angle(moments: npt.NDArray[np.complex128]) -> Track:
    """[F, harmonics] -> radians since the first frame, by the harmonic that is clear in every frame that shows any."""
    seen = np.abs(moments).max(axis=1) > 0
    angle = np.zeros(len(moments))
    if seen.sum() < 2:
        return angle
    clarity = np.min(np.abs(moments[seen]), axis=0)
    best = int(np.argmax(clarity))
    if clarity[best] > SHAPELESS:
        turned = np.unwrap(np.angle(moments[seen, best])) / HARMONICS[best]
        angle[seen] = turned - turned[0]
        angle[~seen] = np.nan
    return angle


def track_camera(luma: Floats, outside: npt.NDArray[np.bool_]) -> CameraTrack:
    """From brightness [F, H, W] in 0..1 and where the background is, [F, H, W]; where an object was in an earlier frame
    counts as its place still, it may have faded. A background without texture stands still."""
    smooth = _blur(_halved(luma))
    background = np.logical_and.accumulate(outside[:, 1::2, 1::2] & outside[:, :-1:2, :-1:2])
    background[:, :EDGE], background[:, -EDGE:], background[:, :, :EDGE], background[:, :, -EDGE:] = (False,) * 4
    count = len(smooth)
    track = np.zeros((count, 3))  # x, y, zoom
    track[0, 2] = 1
    for key in range(0, count - 1, HOP):
        view = _key_view(smooth[key], background[key])
        x, y, zoom = track[key]
        step = np.array([0.0, 0.0, 1.0])
        for index in range(key + 1, min(key + HOP + 1, count)):
            step = _match(view, smooth[index], background[index], step)
            track[index] = x * step[2] + step[0], y * step[2] + step[1], zoom * step[2]
    return CameraTrack(2 * track[:, 0], 2 * track[:, 1], track[:, 2])


@dataclass(frozen=True)
class _KeyView:
    """The pixels of a key frame that tell how the camera moves. x, y: [N] from the picture's middle; values: [N];
    rows: [5, N], how the values change with a shift to the right, one down, a zoom, with contrast and brightness."""

    x: Floats
    y: Floats
    values: Floats
    rows: Floats


def _key_view(plane: Floats, background: npt.NDArray[np.bool_]) -> _KeyView:
    """The steep pixels of a frame's background, [H, W]; none if they are few."""
    right, down = _slope(plane, 1), _slope(plane, 0)
    steep = background & (np.square(right) + np.square(down) > PLAIN**2)
    picked = np.flatnonzero(steep)
    picked = picked[:: max(len(picked) // PICKED, 1)] if len(picked) > TEXTURED * background.sum() else picked[:0]
    row, column = np.divmod(picked, plane.shape[1])
    x = (column - (plane.shape[1] - 1) / 2).astype(np.float32)
    y = (row - (plane.shape[0] - 1) / 2).astype(np.float32)
    right, down, values = right.flat[picked], down.flat[picked], plane.flat[picked]
    contrast = values - values.mean() if len(values) else values
    rows = np.stack([right, down, right * x + down * y, contrast, np.ones_like(values)])
    return _KeyView(x, y, values, rows)


def _match(
    view: _KeyView, plane: Floats, background: npt.NDArray[np.bool_], step: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """x, y and zoom from a key frame to another frame [H, W], from a first guess `step`, which stays where too little
    is seen. After the first round what does not fit, a shadow or an object of another colour, counts less."""
    height, width = plane.shape
    guess = step
    for turn in range(ROUNDS):
        shift_x, shift_y, zoom = step.astype(np.float32)
        x = np.clip(view.x * zoom + (shift_x + np.float32((width - 1) / 2)), 0, width - 2)
        y = np.clip(view.y * zoom + (shift_y + np.float32((height - 1) / 2)), 0, height - 2)
        left, top = x.astype(np.intp), y.astype(np.intp)
        x, y, place = x - left, y - top, top * width + left
        seen = background.take(place)  # the picture's edges are no background
        if seen.sum() <= STILL_SEEN * len(seen):
            return guess
        above, below = (plane.take(place + low) * (1 - x) + plane.take(place + low + 1) * x for low in (0, width))
        change = view.values - above * (1 - y) - below * y
        weight = seen.astype(np.float32)
        if turn:
            usual = float(np.median(np.abs(change[seen])))
            weight /= 1 + np.square(change * np.float32(1 / max(2 * usual, NOISE)))
        step = step + _least_squares(view.rows, change, weight)[:3]
    return step


def _least_squares(rows: Floats, change: Floats, weight: Floats) -> npt.NDArray[np.float64]:
    """change [N] by rows [R, N], each pixel counted by its weight. Drawn a little towards 0: rows may be alike or
    all 0."""
    weighted = rows * weight
    square = (weighted @ rows.T).astype(np.float64)
    square += np.diag(DRAWN * (square.diagonal() + DRAWN))
    return np.asarray(np.linalg.solve(square, (weighted @ change).astype(np.float64)))


def classify_camera(camera: CameraTrack) -> str:
    """One word of `prompts.CAMERAS`. A camera that pans left moves what it sees to the right."""
    zoom = camera.zoom[-1]
    if zoom > ZOOMED:
        return "zoom in"
    if zoom < 1 / ZOOMED:
        return "zoom out"
    way = direction(-camera.x[-1], -camera.y[-1], PANNED)
    return f"pan {way}" if way else "still"


def classify_object(track: ObjectTrack) -> str:
    """One word of `prompts.ACTIONS`, or "lost" for what is not there in the first frame."""
    if np.isnan(track.x[0]):
        return "lost"
    if track.opacity[-3:].mean() < GONE:
        return "fade"
    seen = ~np.isnan(track.x)
    x, y, size, angle = (values[seen] for values in (track.x, track.y, track.size, track.angle))
    width, height = np.ptp(x), np.ptp(y)
    if min(width, height) > MOVED and abs(_winding(x, y)) > ROUND_TRIP:
        return "orbit"
    way = direction(_end(x) - x[0], _end(y) - y[0], MOVED)
    if way:
        return way
    if height > MOVED and width < 0.7 * height:
        return "bounce"
    if abs(_end(angle)) > TURNED:
        return "clockwise" if _end(angle) > 0 else "counterclockwise"
    growth = _end(size) / size[0]
    if growth > GREW:
        return "grow"
    return "shrink" if growth < SHRANK else "still"


def direction(x: float, y: float, least: float) -> str:
    """left, right, up or down, the larger of the two; "" below `least` pixels."""
    if max(abs(x), abs(y)) < least:
        return ""
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def colour_kept(track: ObjectTrack, fades: bool) -> bool:
    """Whether the object keeps its first colour in every frame. Of one that is to fade the hue is judged, until half of
    it is gone."""
    if not fades:
        apart = np.linalg.norm(track.colours - track.colours[0], axis=1)
        return bool(np.all(apart < COLOUR_KEPT))  # NaN, an object out of sight, compares as false
    if np.isnan(track.x[0]):
        return False
    across, along = _chroma(*track.colours[track.opacity > GONE].T)
    turned = np.angle((across + 1j * along) / (across[0] + 1j * along[0]))
    return bool(np.all(np.abs(turned) < HUE_KEPT))


def flicker(video: Video, outside: npt.NDArray[np.bool_]) -> float:
    """Mean |second difference in time| / 2 of the background, in levels of 255: motion at constant speed gives little,
    what comes and goes from frame to frame gives all."""
    second = np.zeros((len(video) - 2, *video.shape[1:3]), np.int16)
    for channel in range(3):
        values = video[..., channel].astype(np.int16)
        second += np.abs(values[2:] - 2 * values[1:-1] + values[:-2])
    background = outside[2:] & outside[1:-1] & outside[:-2]
    return float(second[background].mean()) / 6 if background.any() else float("nan")


def _as_if_it_stood(track: ObjectTrack, camera: CameraTrack, centre: tuple[float, float]) -> ObjectTrack:
    """The object in the coordinates of the first frame."""
    x = (track.x - centre[0] - camera.x) / camera.zoom + centre[0]
    y = (track.y - centre[1] - camera.y) / camera.zoom + centre[1]
    return ObjectTrack(x, y, track.size / camera.zoom, track.angle, track.opacity, track.colours)


def _outside(weights: Sequence[Floats]) -> npt.NDArray[np.bool_]:
    """[F, H, W]: what is neither object nor near one."""
    inside = np.maximum.reduce(list(weights)) > 0.15
    for axis in (1, 2):
        grown = inside.copy()
        for step in range(1, SPREAD + 1):
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= inside[tuple(behind)]
            grown[tuple(behind)] |= inside[tuple(ahead)]
        inside = grown
    return np.asarray(~inside)


def _chroma(
    red: npt.NDArray[Real], green: npt.NDArray[Real], blue: npt.NDArray[Real]
) -> tuple[npt.NDArray[Real], npt.NDArray[Real]]:
    """Colour without brightness, as a vector in the plane whose angle is the hue."""
    half, height = red.dtype.type(0.5), red.dtype.type(np.sqrt(3) / 2)
    return np.asarray(red - (green + blue) * half), np.asarray((green - blue) * height)


def _slope(plane: Floats, axis: int) -> Floats:
    """The derivative along an axis, by 5 points (3 are wrong by a fifth for a pattern of 6 pixels). Wraps around: the
    two pixels at the edges mean nothing."""
    near = np.roll(plane, -1, axis) - np.roll(plane, 1, axis)
    far = np.roll(plane, -2, axis) - np.roll(plane, 2, axis)
    return np.asarray(near * np.float32(8 / 12) - far * np.float32(1 / 12))


def _halved(planes: Floats) -> Floats:
    """[F, H, W] -> [F, H // 2, W // 2]: means of 2 x 2."""
    height, width = planes.shape[1] // 2 * 2, planes.shape[2] // 2 * 2
    even = planes[:, :height, :width]
    return np.asarray((even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 4)


def _blur(planes: Floats) -> Floats:
    """A binomial window of 3 pixels along both sides, [F, H, W]; nothing moves by it."""
    for axis in (1, 2):
        for ahead in (True, False):
            near, far = [slice(None)] * 3, [slice(None)] * 3
            near[axis], far[axis] = (slice(1), slice(-1)) if ahead else (slice(1, None), slice(-1, None))
            parts = (planes[tuple(near)], planes[tuple(far)])
            planes = (planes + np.concatenate(parts, axis)) * np.float32(0.5)
    return planes


def _winding(x: Track, y: Track) -> float:
    """Radians that the way turns around its own middle."""
    angles = np.unwrap(np.arctan2(y - (y.max() + y.min()) / 2, x - (x.max() + x.min()) / 2))
    return float(angles[-1] - angles[0])


def _end(values: Track) -> float:
    return float(np.median(values[-3:]))
