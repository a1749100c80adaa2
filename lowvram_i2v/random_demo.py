"""What `lowvram-i2v demo` does in a tree without trained weights: a tiny checkpoint with random ones in the released
layout is written, converted, and animates a drawn picture. It shows that everything works, nothing worth looking at.
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


def random_demo(folder: Path, image: Path | None, prompt: str | None, device: torch.device, listen: Listener) -> Path:
    """Writes checkpoint, model, picture and video into `folder`; returns the video's path."""
    if image is None:
        image = folder / "photo.png"
        draw_sample_photo().save(image)
    synth(folder / "checkpoint", "tiny", "token_replace", COMPONENTS, 0, device, listen)
    convert(folder / "checkpoint", folder / "model", listen=listen)
    listen(Notice("the weights are random: expect a pattern, not a film"))
    request = GenerateRequest(image, prompt or PROMPT, folder / "demo.mp4", size=(240, 160), frames=17, steps=4)
    return generate(request, folder / "model", load_profile(DEFAULT_PROFILE), device, listen)
