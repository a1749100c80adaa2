"""Videos side by side as one picture, for people to look at: each original over what a model made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Video = npt.NDArray[np.uint8]  # [F, H, W, 3]
SHOWN = 5  # frames of a video
GAP, GREY = 4, 128


def write_sheet(pairs: list[tuple[Video, Video]], path: Path) -> None:
    """pairs: (original, made) of one size each. Frames from left to right, evenly chosen."""
    rows = [_strip(video) for pair in pairs for video in pair]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=GREY) for row in rows]
    Image.fromarray(np.concatenate(padded)).save(path)


def _strip(video: Video) -> npt.NDArray[Any]:
    chosen = np.linspace(0, len(video) - 1, min(SHOWN, len(video))).round().astype(int)
    return np.concatenate([np.pad(video[i], ((0, 0), (0, GAP), (0, 0)), constant_values=GREY) for i in chosen], axis=1)
