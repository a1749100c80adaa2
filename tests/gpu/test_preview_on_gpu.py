"""Previews on a CUDA device: the same pictures as on the CPU, in about the memory that is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lowvram_i2v.preview import PreviewWriter
from lowvram_i2v.vae.preview import TinyDecoder, linear_rgb, tiny_decoder_bytes

pytestmark = pytest.mark.gpu


def random_decoder() -> TinyDecoder:
    """Random weights whose pictures are neither flat nor all black and white."""
    torch.manual_seed(1)
    made = TinyDecoder().eval().requires_grad_(False)
    for name, weight in made.state_dict().items():
        if weight.dim() == 4:
            gain = 0.2 if name.endswith(("conv.4.weight", "22.weight")) else 1.2
            weight.normal_(0, gain / weight[0].numel() ** 0.5)
    return made


def test_half_precision_on_the_device_shows_what_float32_shows_on_the_cpu() -> None:
    latents = torch.randn(16, 2, 12, 16)
    decoder = random_decoder()
    expected = torch.stack(list(decoder.decode(latents)))
    frames = torch.stack(list(decoder.to("cuda", torch.float16).decode(latents.cuda()))).cpu()
    assert (frames - expected).abs().mean() < 0.01
    torch.testing.assert_close(linear_rgb(latents.cuda()).cpu(), linear_rgb(latents), atol=2e-3, rtol=0)


def test_the_peak_is_near_the_prediction() -> None:
    """Convolutions may take workspace beside it, so the bound from above is loose."""
    decoder = random_decoder().to("cuda", torch.float16)
    latents = torch.randn(16, 3, 90, 160, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for frame in decoder.decode(latents, every_frame=False):
        del frame
    taken = torch.cuda.max_memory_allocated() - before
    predicted = tiny_decoder_bytes(90, 160, 2)
    assert 0.9 * predicted < taken < 2 * predicted, (taken, predicted)


def test_a_preview_of_latents_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "p.webp"
    decoder = random_decoder().to("cuda", torch.float16)
    PreviewWriter(path, [1.0, 0.0], 1, 24, pytest.fail, decoder)(1, torch.randn(16, 3, 12, 16, device="cuda"))
    with Image.open(path) as file:
        assert file.n_frames == 3  # type: ignore[attr-defined]
