"""The VAE for a batch is the runtime's, in every way to compute it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import training_micro as micro
from torch import Tensor

from tools.train_demo import vae
from tools.train_demo.batched_vae import Way, decode, encode, picture_latents

WAYS = [Way(torch.float32, flat, last) for flat in (False, True) for last in (False, True)]


def gradients(model: vae.Vae, made_by: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of its mean square with respect to all weights."""
    model.zero_grad()
    made = made_by()
    torch.autograd.backward(made.square().mean())
    return made.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_batch_is_what_its_clips_are_one_by_one(way: Way) -> None:
    torch.manual_seed(0)
    model = vae.Vae(micro.MICRO.size.vae)
    videos = torch.rand(2, 3, 9, 16, 24) * 2 - 1

    def one_by_one() -> Tensor:
        return torch.stack([model.decode(model.encode(video)[0]) for video in videos])

    expected, expected_gradient = gradients(model, one_by_one)
    made, gradient = gradients(model, lambda: decode(model, encode(model, videos, way)[0], way))
    assert torch.allclose(made, expected, atol=1e-4)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    with torch.no_grad():
        assert torch.allclose(encode(model, videos, way)[1][1], model.encode(videos[1])[1], atol=1e-4)
        assert torch.allclose(picture_latents(model, videos, way)[0], model.latents(videos[0]), atol=1e-4)


def test_bytes_become_floats_and_bytes_again() -> None:
    videos = torch.randint(0, 256, (2, 5, 8, 16, 3), dtype=torch.uint8)
    floats = vae.as_floats(videos)
    assert floats.shape == (2, 3, 5, 8, 16)
    assert torch.equal(vae.as_bytes(floats), videos)
    assert torch.equal(vae.as_floats(videos[0]), floats[0])
    worse = videos.clone()
    worse[0] = 255 - worse[0]
    assert vae.psnr(worse, videos)[1] > 90 > 20 > vae.psnr(worse, videos)[0]
