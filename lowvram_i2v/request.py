"""What the user asks for: one frozen value, its checks, and the video sizes the model was trained on.

Invariants: a request that passed `check()` can run on any model folder; `resolve()` leaves nothing to be
chosen later, and what `to_settings()` writes then repeats the run through `from_settings()`. No file is
opened here: the picture is `image.py`, the output file `video.py`. Left out: device, model folder and memory
profile, which change how a video is computed and not which.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowvram_i2v import __version__
from lowvram_i2v.errors import RequestError

RESOLUTIONS = {"360p": 480, "540p": 720, "720p": 960}  # the side of the square with as many pixels
CELL = 32  # sides of a bucket are multiples of it, in pixels
MAX_RATIO = 4.0  # of a bucket's longer side to its shorter
SIZE_STEP = 16  # 8 pixels a latent, 2 latents a token
MAX_SIDE = 4096
MIN_FRAMES, MAX_FRAMES = 5, 1025
STABLE_FLOW_SHIFT, DYNAMIC_FLOW_SHIFT = 7.0, 17.0


@dataclass(frozen=True)
class GenerateRequest:
    """One video to make. The defaults are the released code's.

    image: a picture file; its content becomes the first frame. resolution: a key of `RESOLUTIONS`; the
    picture's aspect ratio chooses the bucket. `size` (width, height) in
        pixels overrides it.
    frames: 4n + 1; `steps`: Euler steps; `fps`: frames a second of the mp4, which changes no frame.
    flow_shift: of the noise schedule; None is 7 with `stability` and 17 without.
    stability: the noise starts from the picture (0.1 %), so that less moves.
    guidance: the embedded guidance scale; None is 6 where the weights have an embedder for it.
    cfg: true classifier-free guidance with `negative_prompt`; 1 is off, more runs the model twice a step.
    seed: of a CPU generator, so it means the same noise on every card.
    """

    image: Path
    prompt: str
    output: Path
    negative_prompt: str = ""
    resolution: str = "720p"
    size: tuple[int, int] | None = None
    frames: int = 129
    steps: int = 50
    flow_shift: float | None = None
    stability: bool = True
    guidance: float | None = None
    cfg: float = 1.0
    seed: int = 0
    fps: int = 24

    def check(self) -> None:
        """Refuses what no model could do. Raises `RequestError` for the first fault, with the nearest valid
        value."""
        _check_text("--prompt", self.prompt)
        _check_text("--negative-prompt", self.negative_prompt)
        if self.size is not None:
            _check_size(self.size)
        elif self.resolution not in RESOLUTIONS:
            raise RequestError(
                f"--resolution {self.resolution} is not known.",
                f"Use one of {', '.join(RESOLUTIONS)}, or --size.",
            )
        _check_frames(self.frames)
        _check_whole("--steps", self.steps, 1, 1000)
        _check_whole("--fps", self.fps, 1, 120)
        _check_whole("--seed", self.seed, 0, 2**63 - 1)
        if self.flow_shift is not None:
            _check_number("--flow-shift", self.flow_shift, 0.01, 1000.0)
        if self.guidance is not None:
            _check_number("--guidance", self.guidance, 0.0, 100.0)
        _check_number("--cfg", self.cfg, 1.0, 100.0)
        if not isinstance(self.stability, bool):
            raise RequestError(f"stability is {self.stability!r}.", "It is true or false.")

    def notices(self) -> list[str]:
        """Sentences about settings that are odd or will have no effect."""
        found = []
        if not self.prompt.strip():
            found.append("The prompt is empty: what moves is left to the model.")
        if self.negative_prompt and self.cfg == 1.0:
            found.append("The negative prompt is ignored: it counts only with --cfg above 1.")
        return found

    def resolve(self, image_width: int, image_height: int) -> GenerateRequest:
        """The same request with size and flow shift filled in, for a picture of this many pixels."""
        size = self.size
        if size is None:
            height, width = nearest_bucket(image_width, image_height, RESOLUTIONS[self.resolution])
            size = (width, height)
        shift = self.flow_shift
        if shift is None:
            shift = STABLE_FLOW_SHIFT if self.stability else DYNAMIC_FLOW_SHIFT
        return replace(self, size=size, flow_shift=shift)

    def to_settings(self, **about: Any) -> dict[str, Any]:
        """Everything that repeats the run, ready for JSON. `about` (model, device, ...) is for the reader: it
        is kept beside the program's name and version and ignored by `from_settings`. The output path is not a
        setting."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "output"}
        settings["image"] = str(self.image.absolute())
        settings["size"] = None if self.size is None else list(self.size)
        return {**settings, "about": {"program": "lowvram-i2v", "version": __version__, **about}}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], output: Path) -> GenerateRequest:
        """The request that `to_settings` wrote, checked. A setting that is absent takes its default.

        Raises RequestError: an unknown or missing setting (all of them named), or a value that `check()`
        refuses.
        """
        values = {name: value for name, value in settings.items() if name != "about"}
        names = {field.name for field in fields(cls) if field.name != "output"}
        needed = {field.name for field in fields(cls) if field.default is MISSING} - {"output"}
        faults = [f"unknown: {name}" for name in sorted(values.keys() - names)]
        faults += [f"missing: {name}" for name in sorted(needed - values.keys())]
        if faults:
            about = settings.get("about")
            version = about.get("version", "unknown") if isinstance(about, dict) else "unknown"
            raise RequestError(
                f"Settings of version {version} do not fit this one ({__version__}): {'; '.join(faults)}.",
                "Give the options on the command line instead of --like.",
            )
        if not isinstance(values["image"], str):
            raise RequestError(f"The setting image is {values['image']!r}.", "It is the path of a picture.")
        values["image"] = Path(values["image"])
        if isinstance(values.get("size"), list):
            values["size"] = tuple(values["size"])
        request = cls(output=output, **values)
        request.check()
        return request


def buckets(base: int, cell: int = CELL, max_ratio: float = MAX_RATIO) -> list[tuple[int, int]]:
    """All (height, width) of about base x base pixels with sides in multiples of `cell`, tallest first.

    The released code's walk: along the hyperbola height * width = base^2, below it, one cell at a time.
    """
    cells = round((base / cell) ** 2)
    rows, columns = cells, 1
    found = []
    while rows > 0:
        if max(rows, columns) <= max_ratio * min(rows, columns):
            found.append((rows * cell, columns * cell))
        if (columns + 1) * rows <= cells:
            columns += 1
        else:
            rows -= 1
    return found


def nearest_bucket(width: int, height: int, base: int) -> tuple[int, int]:
    """The (height, width) for a picture of `width` x `height` pixels: the nearest aspect ratio that is at
    least as square as the picture, so that scaling and cropping never has to pad. Beyond 4:1 it is the most
    extreme one.

    As in the released code, ratios are height / width rounded to five places, and the bucket of a landscape
    picture is strictly squarer than it: both decide which bucket is nearest.
    """
    ratio = height / width
    ratios = {size: round(size[0] / size[1], 5) for size in buckets(base)}
    if ratio >= 1:
        fitting = [size for size in ratios if ratios[size] <= ratio]
    else:
        fitting = [size for size in ratios if ratios[size] > ratio]
    return min(fitting, key=lambda size: abs(ratios[size] - ratio))


def _check_text(flag: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{flag} is {text!r}, which is not text.", "Give it as a string.")
    position = next((at for at, mark in enumerate(text) if "\ud800" <= mark <= "\udfff"), None)
    if position is not None:
        raise RequestError(f"{flag} is not valid Unicode at character {position + 1}.", "Use a UTF-8 terminal.")


def _check_size(size: object) -> None:
    shape = f"Give WIDTHxHEIGHT, each a multiple of {SIZE_STEP} from {SIZE_STEP} to {MAX_SIDE}"
    if not (isinstance(size, tuple) and len(size) == 2 and all(type(side) is int for side in size)):
        raise RequestError(f"--size is {size!r}.", f"{shape}.")
    if all(side % SIZE_STEP == 0 and SIZE_STEP <= side <= MAX_SIDE for side in size):
        return
    width, height = (min(max(round(side / SIZE_STEP), 1) * SIZE_STEP, MAX_SIDE) for side in size)
    raise RequestError(f"--size {size[0]}x{size[1]} cannot be made.", f"{shape}: the nearest is {width}x{height}.")


def _check_frames(frames: object) -> None:
    _check_whole("--frames", frames, MIN_FRAMES, MAX_FRAMES)
    assert isinstance(frames, int)
    below = frames - (frames - 1) % 4
    if below != frames:
        nearest = sorted((below, below + 4), key=lambda valid: abs(valid - frames))
        raise RequestError(
            f"--frames {frames} is not 4n+1: four frames share a latent, the first has its own.",
            f"The nearest are {nearest[0]} and {nearest[1]}.",
        )


def _check_whole(flag: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{flag} is {value!r}.", f"Give a whole number from {low} to {high}.")


def _check_number(flag: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{flag} is {value!r}.", f"Give a number from {low:g} to {high:g}.")
