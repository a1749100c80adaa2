"""Videos judged against the scenes that they should show: results, controls and the table.

Invariants: a `MakeVideo` gets a scene and gives frames; that it renders, repeats a picture or runs a model makes no
difference to the judgement. Motion is right only if every word of it is: each object's action and the camera's. Two
controls show that the measure can fail: a video in which nothing moves, and one made by another scene's prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import numpy.typing as npt

from tools.train_demo.measure import colour_kept, first_frame_psnr, measure
from tools.train_demo.prompts import ACTIONS, CAMERAS
from tools.train_demo.render import render
from tools.train_demo.scenes import Scene, draw_scene

Video = npt.NDArray[np.uint8]  # [F, H, W, 3]
MakeVideo = Callable[[Scene], Video]
SURE = 1.96  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Result:
    """One video. expected, measured: words for every object, then the camera. psnr: of the first frame, dB.
    flicker: of the background, in levels of 255; what is rendered has some too where the camera moves."""

    prompt: str
    expected: tuple[str, ...]
    measured: tuple[str, ...]
    psnr: float
    colour_kept: bool
    flicker: float
    seconds: float

    @property
    def right(self) -> bool:
        return self.expected == self.measured


@dataclass(frozen=True)
class Report:
    """The results of one way to make videos."""

    results: tuple[Result, ...]

    @property
    def motion_right(self) -> float:
        return _share(result.right for result in self.results)

    @property
    def colour_kept(self) -> float:
        return _share(result.colour_kept for result in self.results)

    @property
    def psnr(self) -> float:
        """Mean of the videos' first frames, infinite ones counted as 100 dB."""
        return float(np.mean([min(result.psnr, 100.0) for result in self.results]))

    def by_word(self) -> dict[str, tuple[int, int]]:
        """Word -> (times it was measured where it was expected, times it was expected). Camera words begin with
        "camera"."""
        found: dict[str, tuple[int, int]] = {}
        for result in self.results:
            words = zip(_named(result.expected), _named(result.measured), strict=True)
            for expected, measured in words:
                right, times = found.get(expected, (0, 0))
                found[expected] = right + (expected == measured), times + 1
        order = [*ACTIONS, *(f"camera {word}" for word in CAMERAS)]
        return {word: found[word] for word in order if word in found}

    def lines(self) -> list[str]:
        """The table for people."""
        count = len(self.results)
        low, high = interval(round(self.motion_right * count), count)
        flicker = np.nanmean([result.flicker for result in self.results])
        worst = min(result.psnr for result in self.results)
        lines = [
            f"videos            {count}, {np.mean([result.seconds for result in self.results]):.2f} s each",
            f"motion right      {100 * self.motion_right:.1f} % (95 % interval {100 * low:.0f} to {100 * high:.0f})",
            f"first frame PSNR  {self.psnr:.2f} dB, worst {worst:.2f}",
            f"colour kept       {100 * self.colour_kept:.1f} %",
            f"flicker           {flicker:.2f} of 255",
        ]
        return [*lines, *(f"  {word:<18}{right:>4} of {times}" for word, (right, times) in self.by_word().items())]


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes that training never showed; something moves in each."""
    return [draw_scene(seed, number, held_out=True) for number in range(count)]


def evaluate(scenes: Iterable[Scene], make_video: MakeVideo) -> Report:
    """Makes and judges one video after the other."""
    return Report(tuple(_results(scenes, make_video)))


def _results(scenes: Iterable[Scene], make_video: MakeVideo) -> Iterator[Result]:
    for scene in scenes:
        start = monotonic()
        video = make_video(scene)
        yield judge(scene, video, monotonic() - start)


def judge(scene: Scene, video: Video, seconds: float = 0.0) -> Result:
    """Raises ValueError for a video of another size or length than the scene's."""
    truth = render(scene)
    if video.shape != truth.shape:
        raise ValueError(f"the video is {video.shape}, the scene {truth.shape}")
    colours = [subject.colour for subject in scene.script.subjects]
    seen = measure(video, colours)
    kept = [
        colour_kept(track, fades=subject.action == "fade")
        for track, subject in zip(seen.objects, scene.script.subjects, strict=True)
    ]
    return Result(
        prompt=scene.prompt,
        expected=scene.script.motion,
        measured=seen.motion,
        psnr=first_frame_psnr(video, truth[0]),
        colour_kept=all(kept),
        flicker=seen.flicker,
        seconds=seconds,
    )


def still_video(scene: Scene) -> Video:
    """The control in which nothing moves: the first frame, all the time."""
    return np.repeat(render(scene)[:1], scene.frames, axis=0)


def shuffled_prompts(scenes: Sequence[Scene]) -> list[Scene]:
    """The same scenes, each with the prompt of the next one in which the first object or the camera does something
    else: a model that follows its prompt gets nearly all of them wrong. Raises ValueError if all move alike."""
    shuffled = []
    for index, scene in enumerate(scenes):
        others = (*scenes[index + 1 :], *scenes[:index])
        prompt = next((other.prompt for other in others if _gist(other) != _gist(scene)), None)
        if prompt is None:
            raise ValueError("all scenes show the same motion")
        shuffled.append(replace(scene, prompt=prompt))
    return shuffled


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = right / count, SURE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = SURE / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _gist(scene: Scene) -> tuple[str, str]:
    return scene.script.motion[0], scene.script.motion[-1]


def _named(motion: tuple[str, ...]) -> tuple[str, ...]:
    return (*motion[:-1], f"camera {motion[-1]}")


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
