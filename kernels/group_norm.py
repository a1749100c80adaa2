"""Group norm of a tensor that is never whole: moments gathered chunk by chunk, applied chunk by chunk.

The decoder's tensors are [frames, rows, columns, channels] chunks of something much larger. These ops touch all values:

- `normalize_into`: x * scale + shift, SiLU, cast, written with its replicated border to where a convolution reads it;
- `add_and_measure`: a convolution's bias and residual added in place, and the moments of the sum;
- `measure`: the moments of a convolution's result and its bias, where the bias need not be added;
- `interleave`: an upsampler's phases brought in order, with its bias, and the moments of that.

Between them, `Moments` turns what was measured into the next scale and shift. Moments are float32 in a chunk and merged
in float64 (Chan's formula), so that 5e8 values lose nothing to cancellation. Each chunk's are merged at once: kept, the
parts of some chunks took 0.3 GiB. Nothing here waits for the device.

These are the plain-torch definitions and the oracle of `group_norm_triton`, which takes over on CUDA where
`decoder_trial` finds it right.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    if moments is not None:
        _add_moments(moments, x[:, rows], torch.zeros_like(bias))


def measure(x: Tensor, bias: Tensor, moments: Moments, rows: slice = slice(None)) -> None:
    """The moments of x[:, rows] + bias join `moments`; x stays as it is."""
    triton = _triton(x)
    if triton is not None:
        triton.add_and_measure(x, bias, None, moments, rows, store=False)
        return
    _add_moments(moments, x[:, rows], bias)


def interleave(
    out: Tensor, phases: Tensor, spread: Phases, bias: Tensor, moments: Moments | None, rows: slice = slice(None)
) -> None:
    """Writes the phases in order and with their bias; then the moments of out[:, rows] join `moments`."""
    triton = _triton(out)
    if triton is not None:
        triton.interleave(out, phases, spread, bias, moments, rows)
        return
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


def has_triton(x: Tensor) -> bool:
    """Whether a kernel takes over."""
    if not x.is_cuda:
        return False
    from lowvram_i2v.kernels.decoder_trial import fault

    return fault(x.device) is None


def _triton(x: Tensor) -> ModuleType | None:
    if not has_triton(x):
        return None
    from lowvram_i2v.kernels import group_norm_triton

    return group_norm_triton
