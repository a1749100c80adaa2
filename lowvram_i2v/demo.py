"""The whole path in one command: the model that ships animates the picture that ships, or one of the user's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_i2v.demo_model import ADVICE, FRAMES, PICTURE, PROMPT, STEPS, package_file, shipped, size_for
from lowvram_i2v.errors import RequestError
from lowvram_i2v.events import Listener, Notice
from lowvram_i2v.pipeline import generate
from lowvram_i2v.profile import DEFAULT_PROFILE, load_profile
from lowvram_i2v.request import GenerateRequest

if TYPE_CHECKING:
    import torch


def demo(folder: Path, image: Path | None, prompt: str | None, device: torch.device, listen: Listener) -> Path:
    """Writes picture and video into `folder`; returns the video's path.

    image: None for the picture that ships. Raises RequestError for a picture without a prompt, and as `generate` does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--folder {folder} cannot be made: {error}.", "Name another folder.") from error
    if image is not None and prompt is None:
        raise RequestError("--image without --prompt.", f"Say what happens in it, such as {PROMPT!r}")
    if image is None:
        image = folder / PICTURE
        shutil.copyfile(package_file(PICTURE), image)
    else:
        listen(Notice(ADVICE))
    request = GenerateRequest(
        image, prompt or PROMPT, folder / "demo.mp4", size=size_for(image), frames=FRAMES, steps=STEPS
    )
    listen(Notice(f"{image}: {request.prompt}"))
    return generate(request, shipped(), load_profile(DEFAULT_PROFILE), device, listen)
