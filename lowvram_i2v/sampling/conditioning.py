"""How the first frame enters the latents: the two released variants, one class each, same three methods.

Latents are float32 [16, T, H, W]; the image latent is [16, 1, H, W], already times the VAE's scaling factor.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowvram_i2v.variant import Variant


class Conditioning(Protocol):
    """What the Euler loop asks of a variant."""

    def enter(self, latents: Tensor) -> Tensor:
        """The latents with the conditioning written into them, before the loop and after every step."""

    def model_input(self, latents: Tensor) -> Tensor:
        """What the transformer sees: [in_channels, T, H, W]."""


class FirstFrameReplaced:
    """token_replace: frame 0 of the latents is the image latent, whatever the model says about it."""

    def __init__(self, image_latent: Tensor) -> None:
        self.image_latent = image_latent

    def enter(self, latents: Tensor) -> Tensor:
        return torch.cat([self.image_latent, latents[:, 1:]], dim=1)

    def model_input(self, latents: Tensor) -> Tensor:
        return latents


class ImageChannels:
    """latent_concat: image latent (frame 0, zeros after it) and a mask (one in frame 0) are further channels."""

    def __init__(self, image_latent: Tensor) -> None:
        self.image_latent = image_latent

    def enter(self, latents: Tensor) -> Tensor:
        return latents

    def model_input(self, latents: Tensor) -> Tensor:
        image = torch.zeros_like(latents)
        image[:, :1] = self.image_latent
        mask = torch.zeros_like(latents[:1])
        mask[:, 0] = 1
        return torch.cat([latents, image, mask])


def condition(variant: Variant, image_latent: Tensor) -> Conditioning:
    """The variant's conditioning on that image."""
    return FirstFrameReplaced(image_latent) if variant.replaces_first_frame else ImageChannels(image_latent)


def start_latents(noise: Tensor, image_latent: Tensor, stability: bool) -> Tensor:
    """Where the loop starts: noise, with a thousandth of the image latent in every frame in stability mode."""
    return 0.999 * noise + (1 - 0.999) * image_latent if stability else noise


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """Gaussian noise, float32, from a CPU generator: a seed means the same noise on every card."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
