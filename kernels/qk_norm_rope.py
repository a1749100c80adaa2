"""RMS norm of queries or keys over the head's channels, then rotary embedding of the image tokens.

Plain-torch definition in float32, differentiable, the oracle for any fused kernel registered beside it. Rotary pairs
are neighbouring channels (0,1), (2,3), ...; tokens beyond the table (text) are normalized and not rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def qk_norm_rope(x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """x [tokens, heads, dim], weight [dim], rope = (cos, sin) each [rotated tokens, dim / 2] -> as x, in x's dtype."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
    if rope is None:
        return normed.to(x.dtype)
    rotated = rotate_pairs(normed[: len(rope[0])], *rope).to(x.dtype)
    return torch.cat([rotated, normed[len(rope[0]) :].to(x.dtype)])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [tokens, heads, dim] by the angles of cos, sin [tokens, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
