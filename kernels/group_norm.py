"""Group norm of a tensor that is never whole: moments gathered chunk by chunk, applied chunk by chunk.

The decoder's tensors are [frames, rows, columns, channels] chunks of something much larger. These ops touch all values:

- `normalize_into`: x * scale + shift, SiLU, cast, written with its replicated border to where a convolution reads it;
- `add_and_measure`: a convolution's bias and residual added in place, and the moments of the sum;
- `measure`: the moments of a convolution's result and its bias, where the bias need not be added;
- `interleave`: an upsampler's phases brought in order, with its bias, and the moments of that.

Between them, `Moments` turns what was measured into the next scale and shift. Moments are float32 in a chunk and merged
in float64 (Chan's formula), so that 5e8 values lose nothing to cancellation. Each chunk's are merged at once: kept, the
parts of some chunks took 0.3 GiB. Nothing here waits for the device.

`group_norm_plain` has the definitions, `group_norm_triton` the kernels that take over on CUDA where `decoder_trial`
finds them right.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel, float32 [channels]."""


class Phases(NamedTuple):
    """How an upsampler's phases [T, I, W + 1, time * 2 * 2 * D] become [time T - dropped, R, 2 W, D].

        row of the picture    made of rows of the input    row of the phases         phase
        2 k                   k - 1 and k                  k - 1 - first_pair        even
        2 k + 1               k and k + 1                  k - first_pair            odd

    Columns likewise, from column 0 on. The result's first row is row `first_row` of the picture. dropped: frames at the
    start that are no part of it.
    """

    time: int
    first_row: int
    first_pair: int
    dropped: int


class Moments:
    """Mean and variance of each group of channels, over all chunks added so far.

    state: float64 [3, groups], how many values there were, their mean, the sum of their squared distances from it.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self.state = torch.zeros(3, groups, dtype=torch.float64, device=device)

    def add(self, counts: Tensor, means: Tensor, squares: Tensor) -> None:
        """Parts: counts [parts], and [parts, channels] means and sums of squared distances."""
        by_group = means.double().view(len(means), self.state.shape[1], -1)
        weight = counts.double()[:, None, None]
        added = counts.double().sum() * by_group.shape[2]
        mean = (by_group * weight).sum((0, 2)) / added
        spread = ((by_group - mean[:, None]).square() * weight).sum((0, 2)) + squares.double().view_as(by_group).sum(
            (0, 2)
        )
        count, before, distances = self.state
        step, total = mean - before, count + added
        distances += spread + step.square() * (count * added / total)
        before += step * (added / total)
        count += added

    def affine(self, weight: Tensor, bias: Tensor, eps: float) -> Affine:
        """The norm with these moments as a scale and a shift of each channel."""
        count, mean, squares = self.state
        size = len(weight) // len(mean)
        scale = weight.double() * (squares / count + eps).rsqrt().repeat_interleave(size)
        shift = bias.double() - mean.repeat_interleave(size) * scale
        return scale.to(wide(weight.dtype)), shift.to(wide(weight.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What norms are computed in: float32, and float64 for those who test in it."""
    return torch.promote_types(dtype, torch.float32)


def normalize_into(out: Tensor, x: Tensor, affine: Affine | None, above: int, below: int) -> None:
    """silu(x * scale + shift), or x itself without an affine, with replicated edges, in the dtype of `out`.

    x [T, R, W, C] with any distance between frames; out [T, above + R + below, W + 2, C] contiguous. above and below
    (0 or 1) say whether the window ends there with the picture: only then there is an edge to replicate.
    """
    _kernels(x).normalize_into(out, x, affine, above, below)


def add_and_measure(
    x: Tensor, bias: Tensor, residual: Tensor | None, moments: Moments | None, rows: slice = slice(None)
) -> None:
    """x += bias, and += residual where there is one, in place; then the moments of x[:, rows] join `moments`.

    x [T, R, W, C] contiguous; residual of the same shape with any distance between frames; bias [C].
    """
    _kernels(x).add_and_measure(x, bias, residual, moments, rows)


def measure(x: Tensor, bias: Tensor, moments: Moments, rows: slice = slice(None)) -> None:
    """The moments of x[:, rows] + bias join `moments`; x stays as it is."""
    _kernels(x).measure(x, bias, moments, rows)


def interleave(
    out: Tensor, phases: Tensor, spread: Phases, bias: Tensor, moments: Moments | None, rows: slice = slice(None)
) -> None:
    """Writes the phases in order and with their bias; then the moments of out[:, rows] join `moments`."""
    _kernels(out).interleave(out, phases, spread, bias, moments, rows)


def has_triton(x: Tensor) -> bool:
    """Whether kernels take over."""
    if not x.is_cuda:
        return False
    from lowvram_i2v.kernels.decoder_trial import fault

    return fault(x.device) is None


def _kernels(x: Tensor) -> ModuleType:
    if has_triton(x):
        from lowvram_i2v.kernels import group_norm_triton

        return group_norm_triton
    from lowvram_i2v.kernels import group_norm_plain

    return group_norm_plain
