"""AdaLN arithmetic of the blocks: normalize and modulate, and the gated residual.

Both ops know the first-frame rule of the image-to-video model: of `tokens` rows, the first `first_tokens` use the
second row of the modulation vectors, all others the first row. With `first_tokens = 0` the vectors may have one row.

Arithmetic is float32 inside and the result has the dtype of `x`, as the reference behaves under autocast. The first
two functions are the definitions: differentiable, the oracle for all others. Those ending in `_into` or `_` write into
memory that is there already, in few passes and without autograd; their results differ by rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int = 0) -> Tensor:
    """LayerNorm without parameters, times (1 + scale), plus shift.

    x [tokens, hidden]; shift and scale [1 or 2, hidden] -> [tokens, hidden] in x's dtype.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    parts = [
        normed[rows] * (1 + scale[row].float()) + shift[row].float() for row, rows in _groups(len(x), first_tokens)
    ]
    return torch.cat(parts).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, first_tokens: int = 0) -> Tensor:
    """x + gate * y. x and y [tokens, hidden]; gate [1 or 2, hidden] -> [tokens, hidden] in x's dtype."""
    parts = [
        torch.addcmul(x[rows].float(), y[rows].float(), gate[row].float())
        for row, rows in _groups(len(x), first_tokens)
    ]
    return torch.cat(parts).to(x.dtype)


def layer_norm_modulate_into(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int, out: Tensor) -> None:
    """`layer_norm_modulate` written into `out` [tokens, hidden], contiguous."""
    for row, rows in _groups(len(x), first_tokens):
        out[rows] = F.layer_norm(x[rows].float(), x.shape[-1:], 1 + scale[row].float(), shift[row].float(), EPS)


def gated_residual_(x: Tensor, y: Tensor, gate: Tensor, first_tokens: int = 0) -> None:
    """x becomes `gated_residual(x, y, gate)`. The gate's float32 makes the whole sum float32: one pass, no copies."""
    for row, rows in _groups(len(x), first_tokens):
        torch.addcmul(x[rows], y[rows], gate[row].float(), out=x[rows])


def _groups(tokens: int, first_tokens: int) -> list[tuple[int, slice]]:
    """Pairs of modulation row and the tokens that use it, in token order."""
    rest = (0, slice(first_tokens, tokens))
    return [(1, slice(0, first_tokens)), rest] if first_tokens else [rest]
