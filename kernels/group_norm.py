"""Group norm of a tensor that is never whole: moments gathered chunk by chunk, applied chunk by chunk.

The decoder's tensors are [frames, rows, columns, channels] chunks of something much larger. Two ops touch every value:

- `normalize_into`: x * scale + shift, SiLU, cast, written with its replicated border to where a convolution reads it;
- `add_and_measure`: a convolution's bias and residual added in place, and the moments of the sum.

Between them, `Moments` turns what was measured into the next scale and shift. Moments are float32 in a chunk and merged
in float64 (Chan's formula), so that 5e8 values lose nothing to cancellation. Nothing here waits for the device.

These are the plain-torch definitions and the oracle of `group_norm_triton`, which takes over on CUDA where Triton is
installed.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

MERGED = 32  # chunks whose parts are merged together

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel, float32 [channels]."""


class Moments:
    """Mean and variance of each group of channels, over all chunks added so far.

    Parts are collected and merged some at a time: merging is many small operations.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self._count = 0
        self._mean = torch.zeros(groups, dtype=torch.float64, device=device)
        self._squares = torch.zeros(groups, dtype=torch.float64, device=device)
        self._positions = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, positions: int, counts: Tensor, means: Tensor, squares: Tensor) -> None:
        """Parts of `positions` positions: counts [parts], and [parts, channels] means and sums of squared distances."""
        self._positions += positions
        self._parts.append((counts, means, squares))
        if len(self._parts) >= MERGED:
            self._merge()

    def _merge(self) -> None:
        if not self._parts:
            return
        counts, means, squares = (torch.cat(column).double() for column in zip(*self._parts, strict=True))
        groups, weight = len(self._mean), counts[:, None, None]
        by_group = means.view(len(means), groups, -1)
        added = self._positions * by_group.shape[2]
        mean = (by_group * weight).sum((0, 2)) / added
        spread = (by_group - mean[:, None]).square_().mul_(weight).sum((0, 2))
        spread += squares.view_as(by_group).sum((0, 2))
        total, step = self._count + added, mean - self._mean
        self._squares += spread + step.square() * (self._count * added / total)
        self._mean += step * (added / total)
        self._count, self._positions, self._parts = total, 0, []

    def affine(self, weight: Tensor, bias: Tensor, eps: float) -> Affine:
        """The norm with these moments as a scale and a shift of each channel."""
        self._merge()
        size = len(weight) // len(self._mean)
        scale = weight.double() * (self._squares / self._count + eps).rsqrt().repeat_interleave(size)
        shift = bias.double() - self._mean.repeat_interleave(size) * scale
        return scale.to(wide(weight.dtype)), shift.to(wide(weight.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What norms are computed in: float32, and float64 for those who test in it."""
    return torch.promote_types(dtype, torch.float32)


def normalize_into(out: Tensor, x: Tensor, affine: Affine | None, above: int, below: int) -> None:
    """silu(x * scale + shift), or x itself without an affine, with replicated edges, in the dtype of `out`.

    x [T, R, W, C] with any distance between frames; out [T, above + R + below, W + 2, C] contiguous. above and below
    (0 or 1) say whether the window ends there with the picture: only then there is an edge to replicate.
    """
    triton = _triton(x)
    if triton is not None:
        triton.normalize_into(out, x, affine, above, below)
        return
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


def add_and_measure(
    x: Tensor, bias: Tensor, residual: Tensor | None, moments: Moments | None, rows: slice = slice(None)
) -> None:
    """x += bias, and += residual where there is one, in place; then the moments of x[:, rows] join `moments`.

    x [T, R, W, C] contiguous; residual of the same shape with any distance between frames; bias [C].
    """
    triton = _triton(x)
    if triton is not None:
        triton.add_and_measure(x, bias, residual, moments, rows)
        return
    if residual is not None:
        x += residual
    x += bias
    if moments is None:
        return
    frames = [frame.flatten(0, 1).to(wide(x.dtype)) for frame in x[:, rows]]
    spread = [torch.var_mean(frame, 0, correction=0) for frame in frames]
    means, squares = torch.stack([mean for _, mean in spread]), torch.stack([variance for variance, _ in spread])
    size = len(frames[0])
    moments.add(size * len(frames), means.new_full((len(frames),), size), means, squares * size)


def _triton(x: Tensor) -> ModuleType | None:
    return _triton_module() if x.is_cuda else None


@cache
def _triton_module() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from lowvram_i2v.kernels import group_norm_triton

    return group_norm_triton
