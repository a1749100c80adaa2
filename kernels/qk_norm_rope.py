"""RMS norm of queries or keys over the head's channels, then rotary embedding of the image tokens.

`qk_norm_rope` is the plain-torch definition in float32, differentiable, the oracle for all other forms. Rotary pairs
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


def qkv_norm_rope_into(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """One product's q, k and v to where attention reads them: q and k as by `qk_norm_rope`, v as it is.

    qkv [tokens, 3 * heads * dim], contiguous; weights [dim]; rope: cos, sin of the first tokens, maybe of none; q, k, v
    [tokens, heads, dim] are written. No autograd. Makes one float32 copy of q and k; the norm's factor comes last, in
    the pass that writes.
    """
    parts = qkv.view(len(qkv), 3, *q.shape[1:])
    both = parts[:, :2]
    factor = torch.linalg.vector_norm(both, dim=-1, keepdim=True, dtype=torch.float32)
    factor.square_().mul_(1 / q.shape[-1]).add_(EPS).rsqrt_()
    wide = both * torch.stack([q_weight, k_weight])[:, None].float()
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
    pairs[: len(rope[0])] *= torch.complex(*rope)[:, None, None]
    torch.mul(wide[:, 0], factor[:, 0], out=q)
    torch.mul(wide[:, 1], factor[:, 1], out=k)
    v.copy_(parts[:, 2])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [tokens, heads, dim] by the angles of cos, sin [tokens, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
