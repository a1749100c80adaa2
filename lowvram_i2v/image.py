"""A picture file becomes the first frame: read, scale, crop, values in -1..1.

Invariants: `read_image` returns an RGB picture or raises `RequestError` before any weight is read;
`fit_image` returns exactly the size asked for and never pads. Where the released code's resize rule covers
the target, its arithmetic is followed to the bit. Transparent pictures are laid on white; 16-bit values are
scaled, not clipped. Left out: colour profiles (values are taken as sRGB, as the released code does) and
formats that Pillow does not read by itself (HEIC).
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice, ignore

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
MIN_SIDE = 16
MAX_PIXELS = 150_000_000
MAX_ASPECT = 1000
READ_AS = "Give a PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF picture (convert HEIC first)."
# What Pillow raises for damaged files; TypeError and LookupError come from its parsers of headers and EXIF.
DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError),
    *(RuntimeError, ArithmeticError, struct.error, zlib.error),
)


@dataclass(frozen=True)
class FittedImage:
    """The first frame, RGB and of the video's size, and one sentence on how it was scaled and cropped."""

    image: Image.Image
    description: str


def read_image(path: Path, listen: Listener = ignore) -> Image.Image:
    """The picture as mode "RGB", upright (EXIF rotation applied), whatever its format, depth or transparency.

    Of a file with several pictures the first is taken, with a Notice. Raises RequestError: no such file, not
    a picture or damaged, a side below 16 pixels, more than 150 million pixels, longer than 1000:1.
    """
    _check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and odd metadata: sizes are checked here
        try:
            with Image.open(path, formats=_formats()) as file:
                _check_dimensions(path, *file.size)
                file.load()
                upright = ImageOps.exif_transpose(file)
                # The further pictures of an MPO are previews of the same photo.
                count = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
                picture = to_rgb(upright)
        except Image.DecompressionBombError as error:
            raise _too_large(path, str(error).partition(" exceeds")[0]) from error
        except UnidentifiedImageError as error:
            raise RequestError(f"{path} ({path.stat().st_size} bytes) is not a picture.", READ_AS) from error
        except DAMAGE as error:
            raise RequestError(
                f"{path} ({path.stat().st_size} bytes) is damaged or cut off: {error}.",
                "Copy or download it again, or save it anew from a picture editor.",
            ) from error
    if count > 1:
        listen(Notice(f"{path.name} holds {count} pictures; the first is used."))
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to "RGB". Transparency is laid on white.

    Integers deeper than 8 bits run from 0 to 65535 and are divided by 257. Floats run from 0 to 1, or to 255
    if any is above 1. Raises ValueError for floats that are not finite and modes without a conversion.
    """
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        scale = 255.0 if values.max() <= 1 else 1.0
        return Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, width: int, height: int) -> FittedImage:
    """Scales and crops to exactly `width` x `height` around the centre; every pixel of the result is picture.

    The released code's rule: the short side becomes the target's short side, bilinear, the long side in
    proportion (rounded down). It covers every bucket that `nearest_bucket` chooses, but not every `--size`:
    elsewhere the largest centred box of the target's proportions is scaled, which is also what keeps a very
    long picture within memory.
    """
    short, long = sorted(image.size)
    new_short = min(width, height)
    new_long = int(new_short * long / short)
    scaled = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
    if scaled[0] >= width and scaled[1] >= height and new_short * new_long <= MAX_PIXELS:
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        resized = image if short == new_short else image.resize(scaled, Image.Resampling.BILINEAR)
        fitted = resized.crop((left, top, left + width, top + height))
        factor = new_short / short
    else:
        factor = max(width / image.width, height / image.height)
        box_width, box_height = min(width / factor, image.width), min(height / factor, image.height)
        x, y = (image.width - box_width) / 2, (image.height - box_height) / 2
        box = (x, y, min(x + box_width, image.width), min(y + box_height, image.height))
        fitted = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return FittedImage(fitted, _describe(image.size, (width, height), factor))


def pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """An RGB picture as float32 [3, H, W] in -1..1, the VAE's input."""
    values = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.ascontiguousarray(((values - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1))


def _describe(size: tuple[int, int], target: tuple[int, int], factor: float) -> str:
    """The sentence of `FittedImage`. Cut lengths are pixels of the original, both sides together."""
    cut = [max(0.0, side - wanted / factor) for side, wanted in zip(size, target, strict=True)]
    parts = [
        f"{round(lost)} of {side} px of its {name} ({100 * lost / side:.1f} %)"
        for lost, side, name in zip(cut, size, ("width", "height"), strict=True)
        if lost >= 0.5
    ]
    cropped = f"the crop removes {' and '.join(parts)}, half on each side" if parts else "nothing is cropped"
    change = "enlarged" if factor > 1 else "reduced"
    scaled = "kept at its scale" if factor == 1 else f"{change} x{factor:.3g}"
    return f"The {size[0]}x{size[1]} picture is {scaled} for a {target[0]}x{target[1]} video; {cropped}."


def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow has. No other is tried: one of them runs Ghostscript."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise RequestError(f"--image {path} is a folder.", "Name a picture file in it.")
        if not path.exists():
            raise RequestError(f"--image {path} does not exist.", "Check the path.")
        if not path.is_file():
            raise RequestError(f"--image {path} is not a regular file.", "Save the picture to a file first.")
        with path.open("rb") as file:
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:
        raise RequestError(f"--image {path} cannot be opened: {error}.", "Check the path.") from error
    if size == 0:
        raise RequestError(f"--image {path} is empty (0 bytes).", "Copy or download it again.")


def _check_dimensions(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise RequestError(
            f"--image {path} has {width}x{height} pixels; each side needs at least {MIN_SIDE}.",
            "Use a larger picture.",
        )
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} is {width * height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"--image {path} is {width}x{height}, beyond {MAX_ASPECT}:1.", "Crop it first.")


def _too_large(path: Path, numbers: str) -> RequestError:
    return RequestError(
        f"--image {path} is too large: {numbers}, the limit is {MAX_PIXELS}.",
        "Scale it down first: no video has more than 4096x4096 pixels.",
    )
