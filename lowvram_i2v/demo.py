"""The whole path in one command: a tiny checkpoint with random weights in the released layout, converted, animates a
picture. It shows that everything works; random weights make no picture worth looking at.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_i2v.checkpoint import COMPONENTS
from lowvram_i2v.convert.convert import convert
from lowvram_i2v.events import Listener, Notice
from lowvram_i2v.pipeline import generate
from lowvram_i2v.profile import DEFAULT_PROFILE, load_profile
from lowvram_i2v.request import GenerateRequest
from lowvram_i2v.sample_photo import draw_sample_photo
from lowvram_i2v.synth import synth

if TYPE_CHECKING:
    import torch

PROMPT = "The ball rolls slowly to the right, meadow under a clear sky, the camera stands still."


def demo(folder: Path, image: Path | None, device: torch.device, listen: Listener) -> Path:
    """Writes checkpoint, model, picture and video into `folder`; returns the video's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = folder / "photo.png"
        draw_sample_photo().save(image)
    synth(folder / "checkpoint", "tiny", "token_replace", COMPONENTS, 0, device, listen)
    convert(folder / "checkpoint", folder / "model", listen=listen)
    listen(Notice("the weights are random: expect a pattern, not a film"))
    request = GenerateRequest(image, PROMPT, folder / "demo.mp4", size=(240, 160), frames=17, steps=4)
    return generate(request, folder / "model", load_profile(DEFAULT_PROFILE), device, listen)
