"""How far two videos are apart, frame by frame: noise, structure, brightness, and stutter.

    PSNR        of all RGB values; SSIM on luma, 11-pixel Gaussian window (Wang et al. 2004)
    brightness  luma averaged over 32 x 32 pixels, b minus a: what tiles with moments of their own get wrong
    jump        mean |difference| of a frame to the one before it, of each video: a seam in time stands out
    seams       brightness at the borders of a decoder's tiles, of each video and of b minus a (see `seams`)

Units are levels of 255. Invariants: frames are taken one at a time from both, nothing holds a video; numpy alone does
the arithmetic. Left out: learned metrics, alignment in time or space, sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowvram_i2v.errors import PlatformError, RequestError
from lowvram_i2v.seams import Plane, Seam, SeamMeter, Tiles, seam_lines

Frame = npt.NDArray[np.uint8]  # [H, W, 3], RGB

BLOCK = 32  # pixels, of the brightness error; what remains at the right and lower edge counts as a block too
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
WINDOW_SIGMA, WINDOW_RADIUS = 1.5, 5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
MIN_SIDE = 2 * WINDOW_RADIUS + 1


@dataclass(frozen=True)
class FrameError:
    """One frame of b against the same of a. jump_a, jump_b: of each to its own frame before; 0 for the first."""

    squared: float
    ssim: float
    brightness_rms: float
    brightness_max: float
    jump_a: float
    jump_b: float

    @property
    def psnr(self) -> float:
        return psnr(self.squared)


@dataclass(frozen=True)
class Comparison:
    """Of two videos of equal size and length. seams: of "a", of "b" and of "b - a", whose pictures cancel."""

    width: int
    height: int
    frames: tuple[FrameError, ...]
    seams: dict[str, list[Seam]]

    @property
    def psnr(self) -> float:
        """dB over all frames together; infinite for equal videos."""
        return psnr(_mean(frame.squared for frame in self.frames))

    @property
    def ssim(self) -> float:
        return _mean(frame.ssim for frame in self.frames)

    @property
    def brightness_rms(self) -> float:
        return math.sqrt(_mean(frame.brightness_rms**2 for frame in self.frames))

    @property
    def brightness_max(self) -> float:
        return max(frame.brightness_max for frame in self.frames)

    def worst(self, value: Callable[[FrameError], float]) -> int:
        """Number of the frame, from 0, with the largest value."""
        return max(range(len(self.frames)), key=lambda index: value(self.frames[index]))

    def lines(self) -> list[str]:
        """The figures for people."""
        psnr_at = self.worst(lambda frame: frame.squared)
        ssim_at = self.worst(lambda frame: -frame.ssim)
        brightness_at = self.worst(lambda frame: frame.brightness_max)
        lines = [
            f"frames      {len(self.frames)} of {self.width}x{self.height}",
            f"PSNR        {self.psnr:.2f} dB, worst {self.frames[psnr_at].psnr:.2f} in frame {psnr_at}",
            f"SSIM        {self.ssim:.5f}, worst {self.frames[ssim_at].ssim:.5f} in frame {ssim_at}",
            f"brightness  rms {self.brightness_rms:.2f} of 255 in {BLOCK}-pixel blocks, "
            f"most {self.brightness_max:.2f} in frame {brightness_at}",
        ]
        if len(self.frames) > 1:
            lines += [
                f"jumps of a  {_jumps([frame.jump_a for frame in self.frames[1:]])}",
                f"jumps of b  {_jumps([frame.jump_b for frame in self.frames[1:]])}",
            ]
            excess = self.worst(lambda frame: frame.jump_b - frame.jump_a)
            rms = math.sqrt(_mean((frame.jump_b - frame.jump_a) ** 2 for frame in self.frames[1:]))
            most = self.frames[excess].jump_b - self.frames[excess].jump_a
            lines.append(f"b over a    rms {rms:.2f}, most {most:+.2f} at frame {excess}")
        for name, seams in self.seams.items():
            lines += seam_lines(f"seams of {name}", seams)
        return lines

    def table(self) -> list[str]:
        """A line a frame, columns separated by tabs, the first line their names."""
        names = ("frame", "psnr", "ssim", "brightness_rms", "brightness_max", "jump_a", "jump_b")
        lines = ["\t".join(names)]
        for index, frame in enumerate(self.frames):
            lines.append("\t".join([str(index), *(f"{getattr(frame, name):.5g}" for name in names[1:])]))
        return lines


def compare_videos(a: Path, b: Path, tiles: Tiles | None = None) -> Comparison:
    """Compares two video files. tiles: those that a decoder may have used, by default the released code's.

    Raises RequestError for a file that cannot be read, or another size or length.
    """
    with closing(read_frames(a)) as frames_a, closing(read_frames(b)) as frames_b:
        try:
            return compare_frames(frames_a, frames_b, tiles)
        except ValueError as error:
            raise RequestError(
                f"{a} and {b} cannot be compared: {error}.", "Give two versions of one video."
            ) from error


def compare_frames(a: Iterable[Frame], b: Iterable[Frame], tiles: Tiles | None = None) -> Comparison:
    """Compares frames uint8 [H, W, 3] as they come. Raises ValueError for another size or number of frames, or none."""
    errors: list[FrameError] = []
    meters = {name: SeamMeter(tiles) for name in ("a", "b", "b - a")}
    before: tuple[Frame, Frame] | None = None
    size = (0, 0)
    for frame_a, frame_b in zip_longest(a, b):
        if frame_a is None or frame_b is None:
            raise ValueError(f"{'a' if frame_a is None else 'b'} ends after {len(errors)} frames, the other goes on")
        if frame_a.shape != frame_b.shape:
            raise ValueError(f"frames are {_size(frame_a)} and {_size(frame_b)}")
        planes = luma(frame_a), luma(frame_b)
        errors.append(_frame_error(frame_a, frame_b, planes, before))
        for meter, plane in zip(meters.values(), (*planes, planes[1] - planes[0]), strict=True):
            meter.add(plane)
        before, size = (frame_a, frame_b), (frame_a.shape[1], frame_a.shape[0])
    if not errors:
        raise ValueError("there are no frames")
    return Comparison(*size, tuple(errors), {name: meter.seams() for name, meter in meters.items()})


def _frame_error(a: Frame, b: Frame, planes: tuple[Plane, Plane], before: tuple[Frame, Frame] | None) -> FrameError:
    luma_a, luma_b = planes
    blocks = block_means(luma_b - luma_a)
    return FrameError(
        squared=float(np.mean(np.square(_difference(a, b), dtype=np.int32), dtype=np.float64)),
        ssim=ssim(luma_a, luma_b),
        brightness_rms=float(np.sqrt(np.mean(np.square(blocks)))),
        brightness_max=float(np.abs(blocks).max()),
        jump_a=jump(before[0], a) if before else 0.0,
        jump_b=jump(before[1], b) if before else 0.0,
    )


def psnr(squared: float) -> float:
    """dB of a mean squared error in levels of 255."""
    return 10 * math.log10(255**2 / squared) if squared else math.inf


def luma(frame: Frame) -> Plane:
    """[H, W, 3] -> [H, W] in 0..255"""
    return np.asarray(frame.astype(np.float32) @ LUMA, np.float32)


def jump(before: Frame, frame: Frame) -> float:
    """Mean |difference| of two frames over all values, in levels of 255."""
    return float(np.mean(np.abs(_difference(before, frame)), dtype=np.float64))


def block_means(plane: Plane, block: int = BLOCK) -> npt.NDArray[np.float64]:
    """[H, W] -> mean of each block x block square, smaller ones at the right and lower edge."""
    rows, columns = (np.arange(0, side, block) for side in plane.shape)
    sums = np.add.reduceat(np.add.reduceat(plane, rows, axis=0, dtype=np.float64), columns, axis=1)
    heights, widths = (
        np.diff(np.append(start, side)) for start, side in zip((rows, columns), plane.shape, strict=True)
    )
    return np.asarray(sums / np.outer(heights, widths), np.float64)


def ssim(a: Plane, b: Plane) -> float:
    """Mean structural similarity of two planes in 0..255, over the positions where the window lies inside.

    Raises ValueError for planes smaller than the window.
    """
    if min(a.shape) < MIN_SIDE:
        raise ValueError(f"{a.shape[1]}x{a.shape[0]} is smaller than the {MIN_SIDE} pixels of a window")
    a, b = a - np.float32(128), b - np.float32(128)  # variances of small numbers: float32 is enough
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a * a + b * b) - mean_a**2 - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    mean_a += 128
    mean_b += 128
    brightness = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return float(np.mean(brightness * structure, dtype=np.float64))


def read_frames(path: Path) -> Generator[Frame]:
    """A video file's frames as RGB, one at a time, colours by the matrix that the file names.

    Raises RequestError for what is no video, PlatformError without ffmpeg. Close the iterator to stop early.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise PlatformError(f"No ffmpeg: {error}.", "Run: pip install imageio-ffmpeg") from error
    if not path.is_file():
        raise RequestError(f"{path} is not a file.", "Give two videos.")
    exact = "scale=flags=bicubic+accurate_rnd+full_chroma_int"
    reader = imageio_ffmpeg.read_frames(
        f"file:{path.absolute()}", output_params=["-vf", exact, "-fps_mode", "passthrough"]
    )
    try:
        width, height = next(reader)["size"]
        for frame in reader:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RequestError(f"{path} cannot be read as a video: {said}", "Copy it again.") from error
    finally:
        reader.close()


def _difference(a: Frame, b: Frame) -> npt.NDArray[np.int16]:
    return b.astype(np.int16) - a


def _taps() -> list[float]:
    """One half of the Gaussian window, its centre first."""
    values = [math.exp(-0.5 * (x / WINDOW_SIGMA) ** 2) for x in range(WINDOW_RADIUS + 1)]
    return [value / (2 * sum(values) - values[0]) for value in values]


def _blur(plane: Plane) -> Plane:
    """The window's mean around every position where it lies inside: [H, W] -> [H - 10, W - 10]"""
    for axis in (0, 1):
        plane = _blur_along(plane, axis)
    return plane


def _blur_along(plane: Plane, axis: int) -> Plane:
    length = plane.shape[axis] - 2 * WINDOW_RADIUS
    part: Callable[[int], Any] = partial(_part, plane, axis, length)
    centre, *others = (np.float32(tap) for tap in _taps())
    result = part(WINDOW_RADIUS) * centre
    for distance, tap in enumerate(others, 1):
        pair = part(WINDOW_RADIUS - distance) + part(WINDOW_RADIUS + distance)
        pair *= tap
        result += pair
    return np.asarray(result, np.float32)


def _part(plane: Plane, axis: int, length: int, start: int) -> Plane:
    return plane[start : start + length] if axis == 0 else plane[:, start : start + length]


def _jumps(jumps: list[float]) -> str:
    """Mean, and the largest beside the median: a jump that stands out is a cut, or a seam in time."""
    largest = max(range(len(jumps)), key=jumps.__getitem__)
    times = jumps[largest] / max(float(np.median(jumps)), 1e-9)
    many = f" ({times:.1f} times the median)" if jumps[largest] else ""
    return f"mean {_mean(jumps):.2f} a frame, most {jumps[largest]:.2f}{many} at frame {largest + 1}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _size(frame: Frame) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
