"""What is exported opens as a model folder and makes a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import training_micro as micro
from PIL import Image

from lowvram_i2v.checkpoint import open_model
from lowvram_i2v.events import ignore
from lowvram_i2v.pipeline import generate
from lowvram_i2v.profile import DEFAULT_PROFILE, load_profile
from lowvram_i2v.request import GenerateRequest
from tools.train_demo.clips import Source
from tools.train_demo.export import export
from tools.train_demo.train import with_steps
from tools.train_demo.vae import trained_config


def test_the_exported_model_animates_a_picture(tmp_path: Path) -> None:
    micro.train_all(tmp_path / "work")
    folder = export(micro.MICRO, micro.run(tmp_path / "work"))
    header = open_model(folder).header
    assert header.scheme == "int8"
    assert header.variant.name == "token_replace"
    assert header.vae == trained_config(tmp_path / "work")

    clip = micro.square_clip(0, 0, (32, 32))
    Image.fromarray(clip.frames[0]).save(tmp_path / "picture.png")
    request = GenerateRequest(
        tmp_path / "picture.png", clip.prompt, tmp_path / "video.mp4", size=(32, 32), frames=5, steps=2
    )
    made = generate(request, folder, load_profile(DEFAULT_PROFILE), torch.device("cpu"), ignore)
    assert made.stat().st_size > 0


def test_a_demo_clip_is_what_the_training_reads() -> None:
    from tools.train_demo.attributes import ATTRIBUTES, COUNTS
    from tools.train_demo.clips import demo_clip

    source: Source = demo_clip
    clip = source(0, 3, (128, 192))
    assert clip.frames.shape == (33, 192, 128, 3)
    assert clip.frames.dtype == np.uint8
    assert len(clip.labels) == len(ATTRIBUTES)
    assert all(0 <= label < count for label, count in zip(clip.labels, COUNTS, strict=True))


def test_the_length_of_one_stage_can_be_chosen() -> None:
    longer = with_steps(micro.MICRO, "flow", 99)
    assert longer.flow.steps == 99
    assert longer.vae == micro.MICRO.vae
