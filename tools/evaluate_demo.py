"""How well the demo model animates, in numbers: `python tools/evaluate_demo.py`, `--model DIR` for another than the one
that ships; or of every way to run it: `python tools/evaluate_demo.py --table FILE.jsonl --models WORK`.

Renders held-out scenes, gives first frame and prompt to the model folder through the `pipeline.generate` that users
run, reads the mp4s back and measures them. Prints the table; `--control` makes the videos that should score far lower:

    shuffled   the model, but with another scene's prompt
    static     no model: the first frame, all the time
    rendered   no model: the scene itself, which is how far the measure can be trusted

`--keep DIR` keeps the videos and `--against DIR` compares with those of another run.

`--table` makes the Markdown table of what schemes, 8-bit products, attention and decode policies cost, controls in it
(`demo_table.py`). WORK holds `model-bf16`, `model-int8` and so on, as `tools.train_demo.train export` leaves them. It
goes on where it stopped; `--minutes` stops it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lowvram_i2v.compare import psnr, read_frames  # noqa: E402
from lowvram_i2v.demo_model import STEPS, model_path, shipped  # noqa: E402
from lowvram_i2v.errors import LowVramError, RequestError  # noqa: E402
from lowvram_i2v.events import ignore  # noqa: E402
from lowvram_i2v.profile import DEFAULT_PROFILE  # noqa: E402
from lowvram_i2v.request import GenerateRequest  # noqa: E402
from tools.train_demo.evaluation import (  # noqa: E402
    MakeVideo,
    Report,
    Video,
    evaluate,
    held_out_scenes,
    shuffled_prompts,
    still_video,
)
from tools.train_demo.render import render  # noqa: E402
from tools.train_demo.scenes import FPS, Scene, draw_scene  # noqa: E402

CONTROLS = ("shuffled", "static", "rendered")
WITHOUT_MODEL: dict[str, MakeVideo] = {"static": still_video, "rendered": render}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.table:
            return make_table(options)
        report, apart = run(options)
    except LowVramError as error:
        print(f"evaluate_demo: {error}", file=sys.stderr)
        return 1
    for result in report.results:
        if options.verbose or not result.right:
            print(f"{'right' if result.right else 'WRONG'}  {result.prompt}  measured: {', '.join(result.measured)}")
    print("\n".join(report.lines()))
    if apart:
        print(f"against {options.against}: PSNR {np.mean(apart):.2f} dB, worst {min(apart):.2f}")
    if options.json:
        values = {"against": apart, "results": [asdict(result) | {"right": result.right} for result in report.results]}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def run(options: argparse.Namespace) -> tuple[Report, list[float]]:
    """The report, and with --against the PSNR of each video to the other run's. Raises LowVramError."""
    _check(options)
    scenes = held_out_scenes(options.videos, options.seed)
    if options.trained:
        scenes = [draw_scene(options.seed, number) for number in range(options.videos)]
    if options.control == "shuffled":
        scenes = shuffled_prompts(scenes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_video = WITHOUT_MODEL.get(options.control) or generator(options, folder)
        report = evaluate(scenes, make_video)
        apart = [_apart(folder, options.against, number) for number in range(len(scenes))] if options.against else []
    return report, apart


def make_table(options: argparse.Namespace) -> int:
    """Goes on with the table and prints it as far as it is. Raises LowVramError."""
    from lowvram_i2v.device import pick_device
    from tools.demo_table import WAYS, Settings, cards_of, parse_way, summary
    from tools.demo_table import run as run_table

    if options.models is None or options.videos < 1:
        raise RequestError("--table needs --models, and 1 or more --videos.", "Name the folder of the exports.")
    settings = Settings(
        models=options.models,
        results=options.table,
        ways=tuple(map(parse_way, options.row)) if options.row else WAYS,
        videos=options.videos,
        seed=options.seed,
        steps=options.steps,
        flow_shift=options.flow_shift,
        minutes=options.minutes,
        workers=options.workers,
        cards=cards_of(options.device) if options.workers > 1 else (),
    )
    device = pick_device(options.device)
    print("\n".join(summary(run_table(settings, device), settings)))
    return 0


def generator(options: argparse.Namespace, folder: Path) -> MakeVideo:
    """Makes videos with the model and leaves them in the folder as 000.mp4, 001.mp4 and so on."""
    from lowvram_i2v.device import pick_device
    from lowvram_i2v.pipeline import generate
    from lowvram_i2v.profile import load_profile

    profile, device = load_profile(options.profile), pick_device(options.device)
    made = 0

    def make_video(scene: Scene) -> Video:
        nonlocal made
        picture, output = folder / f"{made:03d}.png", folder / f"{made:03d}.mp4"
        Image.fromarray(render(scene)[0]).save(picture)
        request = GenerateRequest(
            picture,
            scene.prompt,
            output,
            size=scene.size,
            frames=scene.frames,
            steps=options.steps,
            flow_shift=options.flow_shift,
            seed=options.seed + made,
            fps=FPS,
        )
        generate(request, options.model, profile, device, ignore)
        made += 1
        return read_video(output)

    return make_video


def read_video(path: Path) -> Video:
    """All frames of a video file, uint8 [F, H, W, 3]."""
    with closing(read_frames(path)) as frames:
        return np.stack(list(frames))


def _apart(folder: Path, other: Path, number: int) -> float:
    """dB between this run's video and the other's."""
    a, b = (read_video(place / f"{number:03d}.mp4").astype(np.float64) for place in (folder, other))
    if a.shape != b.shape:
        raise RequestError(f"Video {number} is {a.shape}, in {other} {b.shape}.", "Use the same --videos and --seed.")
    return min(psnr(float(np.mean(np.square(a - b)))), 100.0)


def _check(options: argparse.Namespace) -> None:
    if options.videos < 1:
        raise RequestError(f"--videos is {options.videos}.", "Give 1 or more.")
    if options.against and options.control in WITHOUT_MODEL:
        raise RequestError(f"--control {options.control} leaves no videos to compare.", "Leave --against out.")
    if options.against:
        missing = [n for n in range(options.videos) if not (options.against / f"{n:03d}.mp4").is_file()]
        if missing:
            raise RequestError(
                f"{options.against} lacks {len(missing)} of {options.videos} videos.", "Make them with --keep."
            )
        if options.keep and options.keep.resolve() == options.against.resolve():
            raise RequestError("--keep and --against are one folder.", "Name another to keep.")
    if options.control not in WITHOUT_MODEL and shutil.disk_usage(tempfile.gettempdir()).free < 64 << 20:
        raise RequestError("Less than 64 MiB free for the videos.", "Set TMPDIR, or name a folder with --keep.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("evaluate_demo", description="Measures the videos of the demo model.")
    add = parser.add_argument
    add("--model", type=model_path, default=shipped(), metavar="DIR", help="model folder (default: the one that ships)")
    add("--videos", type=int, default=100, metavar="N", help="(default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the scenes and the noise (default %(default)s)")
    add("--steps", type=int, default=STEPS, metavar="N", help="denoising steps (default %(default)s)")
    add("--flow-shift", type=float, metavar="X", help="of the noise schedule (default: the program's)")
    add("--profile", default=DEFAULT_PROFILE, metavar="NAME", help="(default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    add("--control", choices=CONTROLS, help="videos that should score lower, or as well as can be (rendered)")
    add("--trained", action="store_true", help="scenes such as training shows, instead of held-out ones")
    add("--keep", type=Path, metavar="DIR", help="keep the videos and their pictures here")
    add("--against", type=Path, metavar="DIR", help="compare with the videos that --keep left there")
    add("--table", type=Path, metavar="FILE", help="make the table of all ways; results are kept, and found, here")
    add("--models", type=Path, metavar="DIR", help="with --table: the folder of model-bf16, model-int8, ...")
    add("--row", action="append", metavar="WORDS", help="with --table: a way of your own, such as 'int8 w8a8 sdpa'")
    add("--minutes", type=float, default=1e6, metavar="N", help="with --table: begin no scene after so long")
    add("--workers", type=int, default=1, metavar="N", help="with --table: processes (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="every result")
    add("--verbose", action="store_true", help="print the videos that are right, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
