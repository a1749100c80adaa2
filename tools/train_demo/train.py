"""Trains the demo model from nothing: `python -m tools.train_demo.train STAGE --work DIR --minutes 9 --seed 0`.

Stages, in this order: vae, text, flow, decoder, export. Each goes on where it stopped, so a stage may be run in as many
pieces as one likes; a finished one returns at once. The learning rate falls at the end of a stage. Where that is, is
either said in steps (`--steps`, by default the recipe's, which must be the same in all pieces until the fall begins) or
by the clock: a run with `--finish` ends the stage within its minutes. `--rewind 0.3` takes a stage that has got further
back to 30 % of its schedule, with its weights: a second time at the full learning rate.

One GPU, or the CPU for those who can wait. Nothing is downloaded.
"""

from __future__ import annotations

import time

BEGIN = time.monotonic()  # before torch is imported: minutes are the command's

import argparse  # noqa: E402
import os  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from tools.train_demo.clips import Clips, demanding_clip, demo_clip, held_out_clip, small_clip  # noqa: E402
from tools.train_demo.loop import Run  # noqa: E402
from tools.train_demo.sizes import DEMO, SCHEME, SMOKE, Recipe  # noqa: E402

STAGES = ("vae", "text", "flow", "decoder", "export")
VOCABULARY_SCENES = 4000  # enough for every word of the grammar


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="the folder of checkpoints, logs and results")
    parser.add_argument("--minutes", type=float, default=9.0, help="end within that long (default: 9)")
    parser.add_argument("--finish", action="store_true", help="finish the stage within these minutes")
    parser.add_argument("--rewind", type=float, default=1.0, metavar="SHARE", help="go back to that share of the stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps of the stage (default: the recipe's)")
    parser.add_argument("--stop-at", type=int, help="stop at that step, whatever the time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--compile", action="store_true", help="let torch.compile fuse the transformer")
    parser.add_argument("--demanding", action="store_true", help="show more of the scenes that are learned last")
    parser.add_argument("--scheme", default=SCHEME, help="of export (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on two clips, to see that everything runs")
    given = parser.parse_args(arguments)

    torch.set_float32_matmul_precision("high")
    given.work.mkdir(parents=True, exist_ok=True)
    recipe = SMOKE if given.smoke else with_steps(DEMO, given.stage, given.steps)
    device = torch.device(given.device)
    begin = BEGIN if arguments is None else time.monotonic()
    run = Run(given.work, given.seed, given.minutes, device, given.stop_at, given.finish, given.rewind, begin)
    if given.stage == "export":
        from tools.train_demo.export import export

        export(recipe, run, given.scheme)
        return
    sources = (0, small_clip) if given.smoke else (given.workers, held_out_clip)
    source = small_clip if given.smoke else demanding_clip if given.demanding else demo_clip
    with Clips(source, run.seed, recipe.clip_sizes, recipe.clips_per_chunk, *sources) as clips:
        train(given.stage, recipe, clips, run, given.compile)


def train(stage: str, recipe: Recipe, clips: Clips, run: Run, compiled: bool) -> None:
    """One stage of the demo model."""
    if stage == "vae":
        from tools.train_demo import vae

        vae.train(recipe, clips, run)
    elif stage == "text":
        from tools.train_demo import attributes, text

        text.prepare(recipe, vocabulary_prompts(run.seed), run.work)
        text.train(recipe, attributes.COUNTS, clips, run)
    elif stage == "decoder":
        from tools.train_demo import decoder

        decoder.train(recipe, clips, run)
    else:
        from tools.train_demo import flow

        flow.train(recipe, clips, run, compiled)


def vocabulary_prompts(seed: int) -> list[str]:
    """Prompts that together have every word. Held-out combinations are combinations of these words."""
    from tools.train_demo.scenes import draw_scene

    return [draw_scene(seed, number).prompt for number in range(VOCABULARY_SCENES)]


def with_steps(recipe: Recipe, stage: str, steps: int | None) -> Recipe:
    """The recipe with another length of one stage."""
    if steps is None or stage == "export":
        return recipe
    return replace(recipe, **{stage: replace(getattr(recipe, stage), steps=steps)})


if __name__ == "__main__":
    main()
