"""What each way to run the demo model costs in quality: schemes, 8-bit products, attention, decode policies.

Goes scene by scene: a scene's video is made in every way, judged as it is before compression, and compared with the one
of REFERENCE from the same noise; one line of JSON is all that is kept. So a run that stops goes on with the scenes that
are left, the rows of the table are always about the same scenes, and figures differ by the way alone. Two controls are
rows as well: another scene's prompt, and the first frame all the time.

Videos this small do not fill a GPU: `workers` processes share what cards there are.

Invariants: a way that would quietly be replaced by another on this machine is refused (`frames_of`); a file of results
goes on only with the weights, rows and settings that it began with.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lowvram_i2v.compare import psnr
from lowvram_i2v.errors import CheckpointError, RequestError
from lowvram_i2v.events import ignore
from lowvram_i2v.profile import DECODE_POLICIES, DEFAULT_PROFILE, VramProfile, load_profile
from lowvram_i2v.request import GenerateRequest
from tools.train_demo.evaluation import Report, Result, Video, held_out_scenes, judge, shuffled_prompts, still_video
from tools.train_demo.render import render
from tools.train_demo.scenes import Scene

if TYPE_CHECKING:
    import torch

    from lowvram_i2v.attention import AttentionBackend
    from lowvram_i2v.embed_cache import EmbedCache

SHUFFLED, STATIC = "another scene's prompt", "first frame all the time"
SPARE = 16
"""Scenes beyond those asked for, whose prompts the last ones may get."""
FIGURES = ("motion right", "first frame", "colour kept", "flicker", "against bf16")
IDENTICAL = 100.0  # dB that stand for no difference


@dataclass(frozen=True)
class Way:
    """One way to run the model. scheme: a folder `model-SCHEME`; the others are keys of a profile."""

    scheme: str
    compute: str = "w8a16"
    attention: str = "sdpa"
    decode: str = "reference"

    def __str__(self) -> str:
        return f"{self.scheme} {self.compute} {self.attention} {self.decode}"


REFERENCE, SHIPPED = Way("bf16"), Way("int8")
WAYS = (
    REFERENCE,
    SHIPPED,
    Way("fp8"),
    Way("nf4"),
    Way("int8", "w8a8"),
    Way("fp8", "w8a8"),
    Way("int8", attention="triton-int8"),
    Way("int8", attention="triton-sparse"),
    *(Way("int8", decode=policy) for policy in DECODE_POLICIES if policy != "reference"),
    Way("int8", "w8a8", "triton-int8", "seamless"),
)
"""One thing after the other away from SHIPPED, then everything that is quick at once."""


@dataclass(frozen=True)
class Settings:
    """models: the folder of the folders `model-SCHEME`. results: the file of lines. minutes: until no new scene begins.
    workers: processes; 1 is this one. cards: names for CUDA_VISIBLE_DEVICES, shared out among the workers, each of
    which sees its own as the first; none: all work on the device that `run` gets."""

    models: Path
    results: Path
    ways: tuple[Way, ...]
    videos: int
    seed: int
    steps: int
    flow_shift: float | None
    minutes: float
    workers: int
    cards: tuple[str, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """The first line of the file."""
        schemes = sorted({way.scheme for way in self.ways})
        weights = {scheme: _digest(self.folder(scheme)) for scheme in schemes}
        ways = [str(way) for way in self.ways]
        return {
            "ways": ways,
            "seed": self.seed,
            "steps": self.steps,
            "flow_shift": self.flow_shift,
            "weights": weights,
        }

    def folder(self, scheme: str) -> Path:
        return self.models / f"model-{scheme}"

    @property
    def control(self) -> Way:
        """The way that gets another scene's prompt."""
        return SHIPPED if SHIPPED in self.ways else REFERENCE


@dataclass(frozen=True)
class Task:
    """One scene to be made in every way. other: the same scene with another one's prompt."""

    number: int
    scene: Scene
    other: Scene
    settings: Settings
    device: torch.device


@dataclass(frozen=True)
class Line:
    """One scene. results: of each way and control, by its name; apart: dB between each way and REFERENCE."""

    number: int
    device: str
    seconds: float
    results: dict[str, Result]
    apart: dict[str, float]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Line:
        values = json.loads(text)
        results = {name: _result(result) for name, result in values["results"].items()}
        return cls(values["number"], values["device"], values["seconds"], results, values["apart"])


def parse_way(text: str) -> Way:
    """ "int8", "int8 w8a8", ... in the order of Way's fields. Raises RequestError."""
    words = text.split()
    if not 1 <= len(words) <= 4:
        raise RequestError(f"--row {text!r} is not SCHEME [COMPUTE [ATTENTION [DECODE]]].", f"Such as '{WAYS[-1]}'.")
    return Way(*words)


def run(settings: Settings, device: torch.device) -> list[Line]:
    """Goes on with the file of results until all scenes are there or the time is up; returns its lines by number."""
    end = monotonic() + 60 * settings.minutes
    lines = {line.number: line for line in read_lines(settings)}
    scenes = held_out_scenes(settings.videos + SPARE, settings.seed)
    prompts = shuffled_prompts(scenes)
    left = [
        Task(number, scenes[number], prompts[number], settings, device)
        for number in range(settings.videos)
        if number not in lines
    ]
    with settings.results.open("a", encoding="utf-8") as file:
        for line in _done(left, settings.workers, settings.cards, end):
            file.write(line.to_json() + "\n")
            file.flush()
            lines[line.number] = line
    return [lines[number] for number in sorted(lines) if number < settings.videos]


def _done(tasks: Sequence[Task], workers: int, cards: Sequence[str], end: float) -> Iterator[Line]:
    """The tasks' lines in the order in which they are finished; none begins after `end`."""
    if workers <= 1:
        _settle()
        yield from (one_scene(task) for task in tasks if monotonic() < end)
        return
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (numbers, cards)) as pool:
        left, running = iter(tasks), set[Future[Line]]()
        while True:
            while len(running) < workers and monotonic() < end and (task := next(left, None)) is not None:
                running.add(pool.submit(one_scene, task))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


def _begin_worker(numbers: Any, cards: Sequence[str]) -> None:
    """Takes a card, before torch looks for any."""
    if cards:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[numbers.get() % len(cards)]
    _settle(1)


def cards_of(device: str) -> tuple[str, ...]:
    """Of `--device`: all cards where it names none of them."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(str(card) for card in range(torch.cuda.device_count()))


def _settle(threads: int = 0) -> None:
    """Imports what is needed and takes it out of the collector's sight: each phase of a run collects, and looking
    through the libraries takes longer than most phases here. threads: of torch, 0 for its own choice."""
    import torch

    import_module("lowvram_i2v.pipeline")
    if threads:
        torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()


def read_lines(settings: Settings) -> list[Line]:
    """What the file holds, begun if it does not exist; a line that a killed run cut off is removed.

    Raises RequestError for the file of other weights, rows or settings, CheckpointError for a missing model.
    """
    if missing := [way.scheme for way in settings.ways if not settings.folder(way.scheme).is_dir()]:
        names = ", ".join(f"model-{scheme}" for scheme in dict.fromkeys(missing))
        raise CheckpointError(f"{settings.models} has no {names}", "Export the schemes, or name other --row.")
    if REFERENCE not in settings.ways:
        raise RequestError(f"no row is {REFERENCE}.", "All others are compared with it: add it.")
    wanted = json.dumps(settings.recorded())
    if not settings.results.is_file():
        settings.results.write_text(wanted + "\n", encoding="utf-8")
        return []
    text = settings.results.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        settings.results.write_text(whole, encoding="utf-8")
    first, *rest = whole.splitlines() or [""]
    if first != wanted:
        raise RequestError(f"{settings.results} is of other weights, rows or settings.", "Name another file.")
    return [Line.from_json(line) for line in rest]


def one_scene(task: Task) -> Line:
    """The scene in every way."""
    from lowvram_i2v.device import describe
    from lowvram_i2v.embed_cache import EmbedCache

    start, settings, scene = monotonic(), task.settings, task.scene
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Image.fromarray(render(scene)[0]).save(folder / "picture.png")
        request = GenerateRequest(
            folder / "picture.png",
            scene.prompt,
            folder / "video.mp4",
            size=scene.size,
            frames=scene.frames,
            steps=settings.steps,
            flow_shift=settings.flow_shift,
            seed=settings.seed + task.number,
        )
        cache = EmbedCache(folder / "cache")
        made = {str(way): _video(request, way, task, cache) for way in settings.ways}
        made[SHUFFLED] = _video(replace(request, prompt=task.other.prompt), settings.control, task, cache)
    made[STATIC] = still_video(scene)
    apart = {str(way): _decibels(made[str(way)], made[str(REFERENCE)]) for way in settings.ways}
    results = {name: judge(scene, video) for name, video in made.items()}
    return Line(task.number, describe(task.device), monotonic() - start, results, apart)


def _video(request: GenerateRequest, way: Way, task: Task, cache: EmbedCache) -> Video:
    from tools import attention_stand_in

    on_cpu = task.device.type == "cpu" and way.attention == "triton-int8"
    stand_in = attention_stand_in.attend if on_cpu else None
    profile = replace(
        load_profile(DEFAULT_PROFILE),
        compute=way.compute,
        attention="sdpa" if stand_in else way.attention,
        decode=way.decode,
    )
    return frames_of(request, task.settings.folder(way.scheme), profile, task.device, cache, stand_in)


def frames_of(
    request: GenerateRequest,
    model: Path,
    profile: VramProfile,
    device: torch.device,
    cache: EmbedCache | None = None,
    stand_in: AttentionBackend | None = None,
) -> Video:
    """The phases of `pipeline.generate`, less the file. stand_in: attention in place of the profile's.

    Raises RequestError where this machine would not run the profile as it is.
    """
    from lowvram_i2v import pipeline
    from lowvram_i2v.device import limited
    from lowvram_i2v.job import RunOptions, prepare
    from lowvram_i2v.sampling.conditioning import draw_noise
    from lowvram_i2v.video import to_uint8

    job = prepare(request, model, profile, device, ignore, RunOptions(cache))
    runs, asked = ((each.compute, each.attention) for each in (job.profile, profile))
    if runs != asked:
        raise RequestError(f"{' '.join(asked)} cannot run here; it would be {' '.join(runs)}.", "Leave the row out.")
    job = replace(job, attend=stand_in or job.attend)
    with limited(device, job.plan.limit):
        prompts = pipeline.encode_prompts(job)
        image_latent = pipeline.encode_image(job)
        steps = pipeline.condition_steps(job, prompts)
        latents = pipeline.sample(job, steps, image_latent, draw_noise(job.latent_shape, request.seed))
        pieces = [piece.permute(1, 2, 3, 0).numpy() for piece in pipeline.decode(job, latents)]
    return to_uint8(np.ascontiguousarray(np.concatenate(pieces)))


def table(lines: Sequence[Line], ways: Sequence[Way]) -> Iterator[str]:
    """Markdown, a row each for ways and controls."""
    columns = ("scheme", "compute", "attention", "decode", *FIGURES)
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for way in ways:
        apart = "" if way == REFERENCE else f"{np.mean([line.apart[str(way)] for line in lines]):.1f} dB"
        cells = [way.scheme, way.compute, way.attention, way.decode, *_cells(lines, str(way)), apart]
        yield f"| {' | '.join(cells)} |".replace("  ", " ")
    for name in (SHUFFLED, STATIC):
        yield f"| {' | '.join([f'control: {name}', '', '', '', *_cells(lines, name), ''])} |".replace("  ", " ")


def _cells(lines: Sequence[Line], name: str) -> list[str]:
    report = Report(tuple(line.results[name] for line in lines))
    flicker = np.nanmean([result.flicker for result in report.results])
    return [
        f"{100 * report.motion_right:.0f} %",
        f"{report.psnr:.1f} dB",
        f"{100 * report.colour_kept:.0f} %",
        f"{flicker:.2f}",
    ]


def summary(lines: Sequence[Line], settings: Settings) -> Iterator[str]:
    """The table, the control's way in full, and how many scenes there are, on what and how long they took."""
    if not lines:
        yield "no scene is done yet"
        return
    yield from table(lines, settings.ways)
    devices = ", ".join(sorted({line.device for line in lines}))
    seconds = float(np.mean([line.seconds for line in lines]))
    yield f"\n{settings.control}:"
    yield from Report(tuple(line.results[str(settings.control)] for line in lines)).lines()[1:]
    made = f"{len(lines)} of {settings.videos} held-out scenes, seed {settings.seed}, {settings.steps} steps"
    yield f"\n{made}; {devices}"
    profile = load_profile(DEFAULT_PROFILE)
    if any(way.attention == "triton-sparse" for way in settings.ways):
        yield f"sparse: {profile.sparse_density:g} of the key blocks, after {profile.sparse_after:g} of the steps"
    yield f"{seconds:.1f} s a scene, {seconds / (len(settings.ways) + 1):.2f} s a video"


def _decibels(a: Video, b: Video) -> float:
    return min(psnr(float(np.mean(np.square(a.astype(np.float64) - b)))), IDENTICAL)


def _digest(folder: Path) -> str:
    """Of `model.json`, which holds the sha256 of every tensor."""
    return hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()[:16]


def _result(values: dict[str, Any]) -> Result:
    words = {key: tuple(values[key]) for key in ("expected", "measured")}
    return Result(**{**values, **words})
