"""One step of a softmax that sees its scores some keys at a time, and the sum of values that goes with it.

Attention of a head too wide for fused kernels is two matrix products with this between them: scores of some keys become
weights relative to the highest score so far, and what was summed before is scaled to it.

The plain-torch definition and the oracle of `softmax_step_triton`, which takes over on CUDA where `decoder_trial`
finds it right.
"""

from __future__ import annotations

from torch import Tensor

from lowvram_i2v.kernels.group_norm import has_triton


def softmax_step(scores: Tensor, scale: float, weights: Tensor, total: Tensor, highest: Tensor, sums: Tensor) -> None:
    """scores [M, N] wide; weights [M, N], written: exp(scale scores - highest). total [M, C] wide, highest [M] and
    sums [M] of the keys before: brought up to date but for the product of weights and values."""
    if has_triton(scores):
        from lowvram_i2v.kernels import softmax_step_triton

        softmax_step_triton.softmax_step(scores, scale, weights, total, highest, sums)
    else:
        by_torch(scores, scale, weights, total, highest, sums)


def by_torch(scores: Tensor, scale: float, weights: Tensor, total: Tensor, highest: Tensor, sums: Tensor) -> None:
    """The definition."""
    now = (scores.amax(1) * scale).maximum(highest)
    fade = (highest - now).exp()
    exponents = (scores * scale - now[:, None]).exp_()
    weights.copy_(exponents)
    sums.mul_(fade).add_(exponents.sum(1))
    total.mul_(fade[:, None])
    highest.copy_(now)
