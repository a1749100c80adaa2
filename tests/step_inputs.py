"""Random inputs of the transformer's `predict`, of the right shapes, and steps that walk through them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowvram_i2v.dit.conditioning import FINAL_PARTS, IMG_PARTS, SINGLE_PARTS, TXT_PARTS, StepConditioning
from lowvram_i2v.dit.config import TransformerConfig
from lowvram_i2v.dit.rope import rope_table, token_grid
from lowvram_i2v.dit.transformer import HunyuanVideoTransformer


@dataclass(frozen=True)
class Inputs:
    """Latents [in_channels, T, H, W], one conditioning a step, and the rotary table, on one device."""

    latents: Tensor
    steps: list[StepConditioning]
    rope: tuple[Tensor, Tensor]


def random_inputs(
    config: TransformerConfig,
    *,
    size: tuple[int, int],
    frames: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    text_tokens: int = 11,
) -> Inputs:
    """size: (width, height) in pixels. The same values on every device, up to the rounding to `dtype`."""
    generator = torch.Generator("cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    (t, h, w), hidden = token_grid(frames, size[1], size[0]), config.hidden_size
    vectors = 2 if config.replaces_first_frame else 1
    double, single = IMG_PARTS * vectors + TXT_PARTS, SINGLE_PARTS * vectors
    rows = config.double_blocks * double + config.single_blocks * single + FINAL_PARTS
    conditioning = [
        StepConditioning(
            txt=normal(text_tokens, hidden).to(device, dtype),
            modulation=normal(rows, hidden).mul_(0.1).to(device, dtype),
            vectors=vectors,
            double_blocks=config.double_blocks,
            single_blocks=config.single_blocks,
        )
        for _ in range(steps)
    ]
    cos, sin = rope_table((t, h, w), config.rope_dims, config.rope_theta, frames)
    return Inputs(
        normal(config.in_channels, t, 2 * h, 2 * w).to(device), conditioning, (cos.to(device), sin.to(device))
    )


@torch.inference_mode()
def walk(transformer: HunyuanVideoTransformer, inputs: Inputs, stream: Iterable[nn.Module] | None) -> list[Tensor]:
    """The velocity of each step, on the device; the next step's latents come from it. Waits for nothing."""
    latents, velocities = inputs.latents, []
    for step in inputs.steps:
        velocities.append(transformer.predict(latents, step, inputs.rope, stream))
        latents = latents.clone()
        latents[: len(velocities[-1])] += 0.1 * velocities[-1]
    return velocities


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, and finite."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
