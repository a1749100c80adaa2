"""`group_norm` in plain torch: the definitions. Float32 of one frame at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.kernels.group_norm import Affine, Moments, Phases, wide


def normalize_into(out: Tensor, x: Tensor, affine: Affine | None, above: int, below: int) -> None:
    """As `group_norm.normalize_into`."""
    inner = out[:, above : above + x.shape[1]]
    if affine is None:
        inner[:, :, 1:-1] = x
    else:
        for frame, normed in zip(x, inner, strict=True):  # float32 of one frame at a time
            normed[:, 1:-1] = F.silu(torch.addcmul(affine[1], frame.to(affine[0].dtype), affine[0]), inplace=True)
    inner[:, :, 0] = inner[:, :, 1]
    inner[:, :, -1] = inner[:, :, -2]
    if above:
        out[:, 0] = out[:, 1]
    if below:
        out[:, -1] = out[:, -2]


def add_and_measure(x: Tensor, bias: Tensor, residual: Tensor | None, moments: Moments | None, rows: slice) -> None:
    """As `group_norm.add_and_measure`."""
    if residual is not None:
        x += residual
    x += bias
    if moments is not None:
        _add_moments(moments, x[:, rows], torch.zeros_like(bias))


def measure(x: Tensor, bias: Tensor, moments: Moments, rows: slice) -> None:
    """As `group_norm.measure`."""
    _add_moments(moments, x[:, rows], bias)


def interleave(out: Tensor, phases: Tensor, spread: Phases, bias: Tensor, moments: Moments | None, rows: slice) -> None:
    """As `group_norm.interleave`."""
    frames, high, width, channels = out.shape
    by_phase = phases.view(*phases.shape[:3], spread.time, 2, 2, channels)
    for time in range(spread.time):
        first = (time - spread.dropped) % spread.time
        source = (first + spread.dropped) // spread.time
        count = len(range(first, frames, spread.time))
        for odd in range(4):
            row, column = (spread.first_row + odd // 2) % 2, odd % 2  # the first of this phase in `out`
            pair = (spread.first_row + row - 1) // 2 - spread.first_pair
            part = by_phase[source : source + count, pair:, column:, time, odd // 2, odd % 2]
            out[first :: spread.time, row::2, column::2] = part[:, : len(range(row, high, 2)), : width // 2]
    add_and_measure(out, bias, None, moments, rows)


def _add_moments(moments: Moments, x: Tensor, bias: Tensor) -> None:
    frames = [frame.flatten(0, 1).to(wide(x.dtype)) + bias for frame in x]
    spread = [torch.var_mean(frame, 0, correction=0) for frame in frames]
    means, squares = torch.stack([mean for _, mean in spread]), torch.stack([variance for variance, _ in spread])
    size = len(frames[0])
    moments.add(means.new_full((len(frames),), size), means, squares * size)
