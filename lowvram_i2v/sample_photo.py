"""A picture that looks a little like a photo, drawn from a seed: for the demo and the tests, never
downloaded.

A red ball on a meadow before hills, under a low sun. Left out: everything a renderer would do; light is three
formulas (Lambert, a highlight, a shadow ellipse) and texture is noise at several scales.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

Plane = npt.NDArray[np.float64]  # [H, W]
Picture = npt.NDArray[np.float64]  # [H, W, 3], 0..1

SUN = (0.78, 0.24)  # of width and height
HORIZON = 0.56
LIGHT = np.array([0.519, -0.479, 0.708])  # unit vector to the sun: right, up (rows run down), to the viewer
BALL = (0.36, 0.66, 0.17)  # centre of width and height, radius of height


def draw_sample_photo(width: int = 768, height: int = 512, seed: int = 0) -> Image.Image:
    """The picture as mode "RGB"; the same arguments draw the same pixels. Drawn at twice the size and scaled
    down."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 2 * height, 0 : 2 * width].astype(np.float64)
    x, y = (columns + 0.5) / (2 * height), (rows + 0.5) / (2 * height)  # both in units of the height
    aspect = width / height
    picture = _sky(x - SUN[0] * aspect, y, random)
    for level, (top, rough, colour) in enumerate(
        [
            (0.47, 0.10, (0.50, 0.58, 0.68)),
            (0.52, 0.07, (0.33, 0.45, 0.42)),
            (0.55, 0.035, (0.22, 0.36, 0.22)),
        ]
    ):
        ridge = top - rough * (_noise((1, 2 * width), 3 + 2 * level, 6, random) - 0.5)
        shade = 1 + 0.25 * (_noise(x.shape, 24, 4, random) - 0.5)
        picture = _over(picture, np.array(colour) * shade[..., None], _step(y - ridge, 0.002))
    picture = _over(picture, _meadow(y, random), _step(y - HORIZON, 0.002))
    picture = _ball(picture, x - BALL[0] * aspect, y - BALL[1])
    corner = (x / aspect - 0.5) ** 2 + (y - 0.5) ** 2
    picture = picture * (1 - 0.45 * corner)[..., None] + 0.012 * random.standard_normal(picture.shape)
    image = Image.fromarray(np.rint(_unit(picture) * 255).astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BOX)


def _sky(x: Plane, y: Plane, random: np.random.Generator) -> Picture:
    """Blue to warm haze at the horizon, clouds, a sun with its glow. `x` from the sun, `y` from the top."""
    depth = _unit(y / HORIZON) ** 1.3
    sky = _mix((0.27, 0.49, 0.80), (0.96, 0.86, 0.72), depth)
    cover = _noise(x.shape, 5, 7, random)
    cloud = _unit((cover - 0.52) * 4.5) * (1 - 0.5 * depth)
    lit = _mix((1.0, 0.98, 0.95), (0.78, 0.78, 0.80), _unit((cover - 0.60) * 4))
    sky = _over(sky, lit, 0.85 * cloud)
    distance = np.hypot(x, y - SUN[1])
    glow: Plane = 0.65 * np.exp(-distance / 0.10) + 0.9 * np.exp(-((distance / 0.040) ** 6))
    sky += glow[..., None] * np.array([1.0, 0.88, 0.62])
    return sky


def _meadow(y: Plane, random: np.random.Generator) -> Picture:
    """Grass: noise whose grain grows towards the viewer, warmer and lighter far away."""
    near = _unit((y - HORIZON) / (1 - HORIZON))
    coarse = _noise(y.shape, 6, 3, random)
    fine, far = _noise(y.shape, 110, 3, random), _noise(y.shape, 300, 2, random)
    blades = near * fine + (1 - near) * far
    base = _mix((0.50, 0.56, 0.26), (0.20, 0.36, 0.11), near)
    light = 0.62 + 0.45 * coarse + (0.15 + 0.75 * near) * (blades - 0.5)
    return base * light[..., None]


def _ball(picture: Picture, x: Plane, y: Plane) -> Picture:
    """Adds the ball and its shadow. `x`, `y` from the ball's centre, in units of the picture's height."""
    radius = BALL[2]
    across, along = (x + 0.75 * radius) / (1.55 * radius), (y - 0.93 * radius) / (0.26 * radius)
    shadow = 1 - _step(np.hypot(across, along) - 0.85, 0.22)
    picture = picture * (1 - 0.62 * shadow)[..., None]
    inside = _unit(1 - (x**2 + y**2) / radius**2)
    normal = np.stack([x / radius, y / radius, np.sqrt(inside)], axis=-1)
    facing = normal @ LIGHT
    stripe = _step(np.abs(normal[..., 1] + 0.35 * normal[..., 0] + 0.12) - 0.16, 0.012)
    paint = _mix((0.95, 0.93, 0.86), (0.80, 0.13, 0.09), stripe)
    bounce = 0.16 * _unit(normal[..., 1])[..., None] * np.array([0.45, 0.8, 0.3])
    shaded = paint * (0.22 + 0.85 * _unit(facing))[..., None] + bounce
    mirrored = 2 * facing * normal[..., 2] - LIGHT[2]
    shaded = shaded + 0.75 * (_unit(mirrored) ** 40)[..., None]
    return _over(picture, shaded, 1 - _step(np.hypot(x, y) - radius, 0.0015))


def _noise(shape: tuple[int, ...], cells: int, octaves: int, random: np.random.Generator) -> Plane:
    """Smooth noise about 0.5: random grids, `cells` along the longer side and doubling, summed."""
    height, width = shape
    total: Plane = np.zeros(shape)
    weight = 0.0
    for octave in range(octaves):
        across = cells * 2**octave
        down = max(2, round(across * height / max(width, height)))
        across = max(2, round(across * width / max(width, height)))
        grid = Image.fromarray(random.random((down, across), dtype=np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) * 0.55**octave
        weight += 0.55**octave
    return total / weight


def _step(value: Plane, width: float) -> Plane:
    """0 below -width, 1 above +width, smooth between."""
    t = _unit((value + width) / (2 * width))
    return t * t * (3 - 2 * t)


def _unit(values: Plane) -> Plane:
    return np.asarray(np.clip(values, 0, 1), dtype=np.float64)


def _mix(first: tuple[float, ...], second: tuple[float, ...], share: Plane) -> Picture:
    """From the colour `first` where share is 0 to `second` where it is 1."""
    return _over(np.array(first), np.array(second), share)


def _over(below: Picture, above: Picture, alpha: Plane) -> Picture:
    return below + (above - below) * alpha[..., None]
