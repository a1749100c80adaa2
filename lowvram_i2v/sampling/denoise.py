"""The Euler loop and classifier-free guidance.

Invariant: latents stay float32 whatever the model computes in. CFG runs the model twice in turn, never as a batch of
two: half the activations, the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lowvram_i2v.attention import ByLayout, Layout
from lowvram_i2v.dit.blocks import Rope
from lowvram_i2v.dit.conditioning import StepConditioning
from lowvram_i2v.dit.token_order import TokenOrder
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer
from lowvram_i2v.dit.workspace import Workspace
from lowvram_i2v.sampling.conditioning import Conditioning

Velocity = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class GuidedVelocity:
    """The velocity that a step follows: the model's, or u + cfg * (c - u) where there is a negative prompt.

    positive, negative: what the transformer's `condition` gave for each step. blocks: the transformer's, iterated once
    for each prediction; None where all weights are in place. work: memory for the predictions, of both prompts in turn.
    attention: chooses each prediction's; None for the transformer's own. order: of the tokens inside a prediction, and
    so of `rope`; None for raster order.
    """

    transformer: HunyuanVideoTransformer
    positive: list[StepConditioning]
    negative: list[StepConditioning] | None
    cfg: float
    rope: Rope
    blocks: Iterable[nn.Module] | None = None
    work: Workspace | None = None
    attention: ByLayout | None = None
    order: TokenOrder | None = None

    def __call__(self, model_input: Tensor, step: int) -> Tensor:
        """model_input [in_channels, T, H, W], step counted from 0 -> velocity [16, T, H, W], float32."""
        if self.order is not None:
            model_input = self.order.arranged(model_input)
        velocity = self._guided(model_input, step)
        return velocity if self.order is None else self.order.restored(velocity)

    def _guided(self, model_input: Tensor, step: int) -> Tensor:
        conditional = self._predict(model_input, self.positive, step)
        if self.negative is None:
            return conditional
        unconditional = self._predict(model_input, self.negative, step)
        return unconditional + self.cfg * (conditional - unconditional)

    def _predict(self, model_input: Tensor, steps: list[StepConditioning], step: int) -> Tensor:
        conditioning = steps[step].to(model_input.device)
        attend = None
        if self.attention is not None:
            frames = model_input.shape[1] // self.transformer.config.patch_size[0]
            image_tokens = len(self.rope[0])
            text_tokens = len(conditioning.txt)
            attend = self.attention(Layout(image_tokens // frames, image_tokens, text_tokens, step, len(steps)))
        return self.transformer.predict(model_input, conditioning, self.rope, self.blocks, self.work, attend)


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
    with torch.inference_mode():
        latents = conditioning.enter(latents)
        for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
            v = velocity(conditioning.model_input(latents), step)
            latents = conditioning.enter(latents + v * (next_sigma - sigma))
            del v  # the next step needs the room
            on_step(step + 1, latents)
    return latents
