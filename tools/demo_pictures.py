"""The pictures of README.md and docs/demo_model.md, from what the other commands leave:

    lowvram-i2v demo --folder demo_out
    python tools/evaluate_demo.py --seed 2 --keep KEPT
    python tools/demo_pictures.py --film demo_out/demo.mp4 --kept KEPT --work WORK

`demo.webp` is the film, `demo_held_out.webp` frames of held-out scenes over what the model made of them (`--show` names
them), `demo_training.png` the curves of the logs that `tools.train_demo.train` writes. Each is made if its source is
given. Plain Pillow: no other package is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.evaluate_demo import read_video  # noqa: E402
from tools.train_demo.evaluation import held_out_scenes  # noqa: E402
from tools.train_demo.render import render  # noqa: E402
from tools.train_demo.scenes import FPS  # noqa: E402
from tools.train_demo.sheet import write_sheet  # noqa: E402

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 52, 22, 26, 30  # of one plot, and its margins
BLUE, ORANGE, GREY, LIGHT = (31, 90, 160), (225, 120, 20), (90, 90, 90), (222, 222, 222)
HOLD = 800  # milliseconds of the film's last frame

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One stage's curves over its steps. line, dots: (its name in the log, its name in the picture)."""

    stage: str
    title: str
    line: tuple[str, str]
    dots: tuple[str, str]
    logarithmic: bool = False


PLOTS = (
    Plot("vae", "vae: PSNR, dB", ("dB", "batch"), ("held-out dB", "held-out videos")),
    Plot("text", "text: share of attributes read", ("row", "batch"), ("held-out row", "held-out")),
    Plot("flow", "flow: loss", ("loss", "batch"), ("held-out loss", "held-out videos"), logarithmic=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("demo_pictures", description="Draws the pictures of the documents.")
    add = parser.add_argument
    add("--film", type=Path, metavar="FILE.mp4", help="of `lowvram-i2v demo`")
    add("--kept", type=Path, metavar="DIR", help="of `evaluate_demo.py --keep`")
    add("--show", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="scenes (default: the first four)")
    add("--seed", type=int, default=2, metavar="N", help="of the kept scenes (default: %(default)s)")
    add("--work", type=Path, metavar="DIR", help="of the training")
    add("--output", type=Path, default=ROOT / "docs", metavar="DIR", help="(default: docs)")
    options = parser.parse_args(arguments)
    if options.film:
        write_film(options.film, options.output / "demo.webp")
    if options.kept:
        scenes = held_out_scenes(max(options.show) + 1, options.seed)
        pairs = [(render(scenes[n]), read_video(options.kept / f"{n:03d}.mp4")) for n in options.show]
        write_sheet(pairs, options.output / "demo_held_out.webp")
    if options.work:
        write_curves(options.work, options.output / "demo_training.png")


def write_film(video: Path, path: Path) -> None:
    """The video as an animated picture that repeats, twice as large."""
    first, *others = (
        Image.fromarray(frame).resize((2 * frame.shape[1], 2 * frame.shape[0])) for frame in read_video(video)
    )
    durations = [round(1000 / FPS)] * len(others) + [HOLD]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=80, method=6)


def write_curves(work: Path, path: Path) -> None:
    """A plot for each stage, side by side."""
    picture = Image.new("RGB", (WIDTH * len(PLOTS), HEIGHT), "white")
    for number, plot in enumerate(PLOTS):
        lines = [json.loads(line) for line in (work / f"{plot.stage}.jsonl").read_text(encoding="utf-8").splitlines()]
        picture.paste(draw(plot, points(lines, plot.line[0]), points(lines, plot.dots[0])), (WIDTH * number, 0))
    picture.quantize(64).save(path, optimize=True)


def points(lines: list[dict[str, float]], name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if name in line]


def draw(plot: Plot, line: Points, dots: Points) -> Image.Image:
    """Axes, the line and the dots."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    scale = math.log10 if plot.logarithmic else float
    values = [value for _, value in (*line, *dots)]
    last = max(step for step, _ in line)
    low, high = scale(min(values)), scale(max(values))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, along = point[0] / last, (scale(point[1]) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - along * (HEIGHT - TOP - BOTTOM)

    for tick in range(5):
        height = low + (high - low) * tick / 4
        value = 10**height if plot.logarithmic else height
        y = place((0, value))[1]
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=LIGHT)
        pen.text((LEFT - 6, y), f"{value:.3g}", fill=GREY, anchor="rm")
        x = place((last * tick / 4, value))[0]
        pen.text((x, HEIGHT - BOTTOM + 6), f"{last * tick / 4:.0f}", fill=GREY, anchor="ma")
    pen.line([place(point) for point in line], fill=BLUE, width=1)
    for x, y in map(place, dots):
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=ORANGE)
    pen.text((LEFT, 6), plot.title, fill="black")
    pen.text((WIDTH - RIGHT, 6), plot.dots[1], fill=ORANGE, anchor="ra")
    pen.text((WIDTH - RIGHT - 100, 6), plot.line[1], fill=BLUE, anchor="ra")
    return picture


if __name__ == "__main__":
    main()
