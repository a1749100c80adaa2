"""Puts a trained model into the package: `python -m tools.ship_demo WORK/model-int8`.

The folder that `tools.train_demo.train export` wrote becomes the package's demo model, and the picture that
`lowvram-i2v demo` animates is drawn beside it: a scene of the held-out set. Refused is a folder that does not open, is
no int8 or fp8 one, or is too large. `--picture` draws the picture only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.demo_model import FOLDER, MOST_BYTES, PICTURE, PROMPT, package_file
from lowvram_i2v.errors import CheckpointError, LowVramError
from tools.train_demo.render import render
from tools.train_demo.scenes import Scene, draw_scene

SCENE = (1, 1262, (192, 128))
"""Seed, number and size of the held-out scene that PROMPT describes."""
SCHEMES = ("int8", "fp8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ship_demo", description="Puts a trained demo model into the package.")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="model folder")
    parser.add_argument("--picture", action="store_true", help="only draw the picture")
    options = parser.parse_args(arguments)
    if (options.folder is None) != options.picture:
        parser.error("give a model folder, or --picture")
    try:
        draw_picture(package_file(PICTURE))
        if options.folder is not None:
            place(options.folder, package_file(FOLDER))
    except LowVramError as error:
        print(f"ship_demo: {error}", file=sys.stderr)
        return 1
    return 0


def place(source: Path, target: Path) -> None:
    """Replaces `target` by the files of the model folder `source`. Raises CheckpointError."""
    header = open_model(source).header
    if header.scheme not in SCHEMES:
        raise CheckpointError(f"{source} is {header.scheme}", f"Export it as one of: {', '.join(SCHEMES)}.")
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in (*files, package_file(PICTURE)))
    if size > MOST_BYTES:
        raise CheckpointError(
            f"{source} and the picture are {size} bytes, at most {MOST_BYTES} ship", "Make it smaller."
        )
    shutil.rmtree(target, ignore_errors=True)
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    open_model(target)
    print(f"{target}: {len(files)} files, {size / 2**20:.2f} MiB with the picture")


def picture_scene() -> Scene:
    """The scene of the picture that ships; its prompt is PROMPT."""
    seed, number, size = SCENE
    scene = draw_scene(seed, number, held_out=True, size=size)
    assert scene.prompt == PROMPT, scene.prompt
    return scene


def draw_picture(path: Path) -> None:
    Image.fromarray(render(picture_scene())[0]).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
