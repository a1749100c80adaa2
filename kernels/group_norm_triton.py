# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""`group_norm` as Triton kernels: each value is read once and written once.

A program takes positions of a tensor [.., channels] and all their channels: neighbouring threads read neighbouring
values. Offsets are 64-bit. Sums are float32 within a program, which sees a few thousand positions; moments of programs
are merged in float64 by `Moments`. Left out: the float64 of tests, which stays with plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.group_norm import Affine, Moments

TILE = 8192  # values that a program holds at a time
WARPS = 8
PARTS = 512  # programs that measure, at least where there is enough to measure


def normalize_into(out: Tensor, x: Tensor, affine: Affine | None, above: int, below: int) -> None:
    """As `group_norm.normalize_into`."""
    frames, rows, width, channels = x.shape
    assert out.is_contiguous()
    assert x.stride()[1:] == (width * channels, channels, 1)
    assert out.shape == (frames, rows + above + below, width + 2, channels)
    block = triton.next_power_of_2(channels)
    positions = max(1, TILE // block)
    lines = out.shape[0] * out.shape[1]
    scale, shift = affine if affine is not None else (out, out)  # not read
    _normalize_into[(triton.cdiv(width + 2, positions), lines)](
        out,
        x,
        scale,
        shift,
        rows,
        width,
        channels,
        out.shape[1],
        above,
        x.stride(0),
        NORMED=affine is not None,
        POSITIONS=positions,
        CHANNELS=block,
        num_warps=WARPS,
    )


@triton.jit
def _normalize_into(
    out, x, scale, shift, rows, width, channels, out_rows, above, x_frame,
    NORMED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    frame, out_row = line // out_rows, line % out_rows
    row = tl.minimum(tl.maximum(out_row - above, 0), rows - 1)
    place = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.minimum(tl.maximum(place - 1, 0), width - 1)
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = (place < width + 2)[:, None] & inside[None, :]
    source = x + frame.to(tl.int64) * x_frame + (row * width).to(tl.int64) * channels
    values = tl.load(source + column[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    if NORMED:
        a = tl.load(scale + channel, mask=inside, other=0.0)
        b = tl.load(shift + channel, mask=inside, other=0.0)
        y = values.to(tl.float32) * a[None, :] + b[None, :]
        values = (y * tl.sigmoid(y)).to(out.dtype.element_ty)
    target = out + line.to(tl.int64) * (width + 2) * channels
    tl.store(target + place[:, None] * channels + channel[None, :], values, mask=mask)


def add_and_measure(x: Tensor, bias: Tensor, residual: Tensor | None, moments: Moments | None, rows: slice) -> None:
    """As `group_norm.add_and_measure`."""
    frames, height, width, channels = x.shape
    assert x.is_contiguous()
    assert residual is None or residual.stride()[1:] == (width * channels, channels, 1)
    first, last, _ = rows.indices(height)
    line = height * width
    block = triton.next_power_of_2(channels)
    positions = max(1, TILE // block)
    total = frames * line
    repeats = max(1, total // (positions * PARTS))
    parts = triton.cdiv(total, positions * repeats)
    measured = (1, channels) if moments is None else (parts, channels)
    counts = torch.empty(measured[0], dtype=torch.float32, device=x.device)
    means, squares = (torch.empty(measured, dtype=torch.float32, device=x.device) for _ in range(2))
    _add_and_measure[(parts,)](
        x,
        bias,
        x if residual is None else residual,
        counts,
        means,
        squares,
        total,
        line,
        channels,
        first * width,
        last * width,
        line * channels if residual is None else residual.stride(0),
        repeats,
        RESIDUAL=residual is not None,
        MEASURED=moments is not None,
        POSITIONS=positions,
        CHANNELS=block,
        num_warps=WARPS,
    )
    if moments is not None:
        moments.add(frames * (last - first) * width, counts, means, squares)


@triton.jit
def _add_and_measure(
    x, bias, residual, counts, means, squares, total, line, channels, first, last, residual_frame, repeats,
    RESIDUAL: tl.constexpr, MEASURED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x has `total` positions, `line` a frame, of which [first, last) are measured."""
    part = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    seen = 0.0
    mean = tl.zeros([CHANNELS], tl.float32)
    square = tl.zeros([CHANNELS], tl.float32)
    for repeat in range(repeats):
        place = (part * repeats + repeat) * POSITIONS + tl.arange(0, POSITIONS)
        mask = (place < total)[:, None] & inside[None, :]
        offsets = place.to(tl.int64)[:, None] * channels + channel[None, :]
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        frame, within = place // line, place % line
        if RESIDUAL:
            beside = frame.to(tl.int64)[:, None] * residual_frame + within.to(tl.int64)[:, None] * channels
            values += tl.load(residual + beside + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        stored = (values + b[None, :]).to(x.dtype.element_ty)
        tl.store(x + offsets, stored, mask=mask)
        if MEASURED:
            core = (place < total) & (within >= first) & (within < last)
            count = tl.sum(core.to(tl.float32))
            kept = tl.where(core[:, None], stored.to(tl.float32), 0.0)
            here = tl.sum(kept, 0) / tl.maximum(count, 1.0)
            away = tl.where(core[:, None], stored.to(tl.float32) - here[None, :], 0.0)
            step = here - mean
            both = tl.maximum(seen + count, 1.0)
            square += tl.sum(away * away, 0) + step * step * (seen * count / both)
            mean += step * (count / both)
            seen += count
    if MEASURED:
        tl.store(counts + part, seen)
        tl.store(means + part * channels + channel, mean, mask=inside)
        tl.store(squares + part * channels + channel, square, mask=inside)
