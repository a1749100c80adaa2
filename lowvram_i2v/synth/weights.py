"""Seeded random weights that keep activations finite and of order 1 through all layers.

Invariant: a tensor's values depend on seed, component, name, shape, dtype and kind of device, and on
nothing else: neither on the order in which tensors are made nor on which components are asked for.

A linear layer of std 1/sqrt(inputs) keeps the variance of its input; norms sit near 1; what is added to a
residual stream is small, by gates (transformer) or by its last layer (text encoders), so that 60 blocks add
up to order 1.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

from lowvram_i2v.convert.shapes import Shapes
from lowvram_i2v.convert.sources import LazyTensor

# The first pattern that is found in the name decides: (pattern, mean, std, std is over sqrt(inputs)).
SPREADS: tuple[tuple[str, float, float, bool], ...] = (
    (r"norm\w*\.weight$", 1.0, 0.1, False),
    (r"\.bias$", 0.0, 0.02, False),
    (r"(token_embedding|embed_tokens|class_embedding)", 0.0, 1.0, False),
    (r"position_embedding", 0.0, 0.1, False),
    (r"logit_scale$", 2.66, 0.0, False),
    # gates and scales of about 0.15: the activation before it halves what comes in
    (r"(_mod|modulation)\.linear\.weight$|adaLN_modulation\.1\.weight$", 0.0, 0.35, True),
    (r"layers\.\d+\..*(o_proj|down_proj|out_proj|fc2)\.weight$", 0.0, 0.25, True),
    # trained latents have a std of about 1 / scaling factor
    (r"^encoder\.conv_out\.", 0.0, 3.5, True),
    (r"", 0.0, 1.0, True),
)


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor."""
    mean, std, by_inputs = next(values for pattern, *values in SPREADS if re.search(pattern, name))
    inputs = math.prod(shape[1:]) if by_inputs else 1
    return mean, std / math.sqrt(inputs)


def random_tensor(
    component: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> Tensor:
    """Made on `device`, returned on the CPU."""
    digest = hashlib.sha256(f"{seed}/{component}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mean, std = spread(name, shape)
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator).cpu()


def random_tensors(
    component: str, shapes: Shapes, dtype: torch.dtype, seed: int, device: torch.device
) -> dict[str, LazyTensor]:
    """One LazyTensor for each name, made when it is read."""

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, dtype, lambda: random_tensor(component, name, shape, dtype, seed, device))

    return {name: lazy(name, shape) for name, shape in shapes.items()}
