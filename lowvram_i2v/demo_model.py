"""The demo model: small trained weights that ship inside the package, for `--model demo` and where no model is named.

Invariants: its folder is an ordinary model folder, opened like any other and never written to. No weight is read here
and nothing heavy is imported. Left out: how it is made and what it can do (docs/demo_model.md).
"""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path

NAME = "demo"
FOLDER = "demo_weights"
MOST_BYTES = 12 * 2**20
PICTURE = "demo_picture.png"
PROMPT = "A striped purple car moves to the right, green meadow behind it."
"""What PICTURE shows, and what happens next: a combination of colour, shape and action that training never saw."""
SIZES = ((128, 128), (192, 128), (128, 192))
"""(width, height) of the videos that it was trained on."""
FRAMES, STEPS = 33, 20
ADVICE = (
    "The demo model knows drawn shapes that move before plain backgrounds, in the words of docs/demo_model.md, and "
    "nothing else; for photos convert the released weights and name their folder with --model."
)


def package_file(name: str) -> Path:
    """A file or folder beside this one, once installed too."""
    return Path(str(files("lowvram_i2v") / name)).absolute()


def shipped() -> Path:
    """The model folder."""
    return package_file(FOLDER)


def model_path(text: str) -> Path:
    """What --model names: `demo`, also as the path that another installation recorded in a video, else a folder.
    A folder of that name is ./demo."""
    named = text == NAME or Path(text).parts[-2:] == ("lowvram_i2v", FOLDER)
    return shipped() if named else Path(text)


def is_demo(folder: Path) -> bool:
    """Whether that is the demo model's folder."""
    return folder == shipped()


def size_for(image: Path) -> tuple[int, int]:
    """The (width, height) of SIZES nearest to the picture's ratio. Raises RequestError as `read_image` does."""
    from lowvram_i2v.image import read_image

    width, height = read_image(image).size
    return min(SIZES, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
