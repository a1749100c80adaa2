# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""`softmax_step` as a Triton kernel: a program takes a row and reads its scores once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


def softmax_step(scores: Tensor, scale: float, weights: Tensor, total: Tensor, highest: Tensor, sums: Tensor) -> None:
    """As `softmax_step.softmax_step`; rows of at most 16384 scores."""
    rows, keys = scores.shape
    assert scores.dtype == total.dtype == highest.dtype == sums.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (scores, weights, total, highest, sums))
    _softmax_step[(rows,)](
        scores,
        scale,
        weights,
        total,
        highest,
        sums,
        keys,
        total.shape[1],
        KEYS=triton.next_power_of_2(keys),
        CHANNELS=triton.next_power_of_2(total.shape[1]),
        num_warps=WARPS,
    )


@triton.jit
def _softmax_step(
    scores, scale, weights, total, highest, sums, keys, channels, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, KEYS)
    values = tl.load(scores + row * keys + key, mask=key < keys, other=-float("inf")) * scale
    before = tl.load(highest + row)
    now = tl.maximum(tl.max(values, 0), before)
    fade = tl.exp(before - now)
    exponents = tl.exp(values - now)
    tl.store(weights + row * keys + key, exponents.to(weights.dtype.element_ty), mask=key < keys)
    tl.store(sums + row, tl.load(sums + row) * fade + tl.sum(exponents, 0))
    tl.store(highest + row, now)
    channel = tl.arange(0, CHANNELS)
    changed = channel < tl.where(fade != 1.0, channels, 0)
    place = total + row * channels + channel
    tl.store(place, tl.load(place, mask=changed, other=0.0) * fade, mask=changed)
