"""The Euler loop and classifier-free guidance.

Invariant: latents stay float32 whatever the model computes in. CFG runs the model twice in turn, never as a batch of
two: half the activations, the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.sampling.conditioning import Conditioning
from lowvram_i2v.sampling.schedule import TIMESTEPS
from lowvram_i2v.text.embeds import PromptEmbeds

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GuidedVelocity:
    """The velocity that a step follows: the model's, or u + cfg * (c - u) where there is a negative prompt.

    guidance_scale is the embedded guidance ([1] tensor), None for weights without its embedder.
    """

    transformer: HunyuanVideoTransformer
    positive: PromptEmbeds
    negative: PromptEmbeds | None
    cfg: float
    guidance_scale: Tensor | None
    rope: Rope

    def __call__(self, model_input: Tensor, timestep: Tensor) -> Tensor:
        """model_input [in_channels, T, H, W], timestep [1] on 0..1000 -> velocity [16, T, H, W], float32."""
        conditional = self._predict(model_input, timestep, self.positive)
        if self.negative is None:
            return conditional
        unconditional = self._predict(model_input, timestep, self.negative)
        return unconditional + self.cfg * (conditional - unconditional)

    def _predict(self, model_input: Tensor, timestep: Tensor, prompt: PromptEmbeds) -> Tensor:
        embeds, pooled = prompt.prompt_embeds, prompt.pooled_prompt_embeds
        return self.transformer(model_input, timestep, embeds, pooled, self.guidance_scale, self.rope)  # type: ignore[no-any-return]


@torch.inference_mode()
def denoise(
    velocity: Velocity,
    conditioning: Conditioning,
    latents: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """Follow the velocity from sigmas[0] to sigmas[-1]: x + v * (sigma[i+1] - sigma[i]).

    latents [16, T, H, W] float32; sigmas [steps + 1] on the CPU. `on_step(number, latents)` is called after each step,
    numbers from 1. Returns the final latents.
    """
    latents = conditioning.enter(latents)
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        timestep = (sigma * TIMESTEPS).reshape(1).to(latents.device)
        v = velocity(conditioning.model_input(latents), timestep)
        latents = conditioning.enter(latents + v * float(next_sigma - sigma))
        on_step(i + 1, latents)
    return latents
