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

from lowvram_i2v.kernels.group_norm import Affine, Moments, Phases

TILE = 8192  # values that a program holds at a time
MEASURED_TILE = 4096  # fewer where sums are made: more programs fit on a processor
WARPS = 8
STAGES = 3  # tiles on their way while sums are made
PARTS = 1024  # programs that measure, at least where there is enough to measure


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
    width, channels = x.shape[2:]
    assert residual is None or residual.stride()[1:] == (width * channels, channels, 1)
    _launch(x, x, bias, residual, moments, rows, None, True)


def measure(x: Tensor, bias: Tensor, moments: Moments, rows: slice) -> None:
    """As `group_norm.measure`."""
    _launch(x, x, bias, None, moments, rows, None, False)


def interleave(out: Tensor, phases: Tensor, spread: Phases, bias: Tensor, moments: Moments | None, rows: slice) -> None:
    """As `group_norm.interleave`."""
    assert phases.is_contiguous()
    _launch(out, phases, bias, None, moments, rows, spread, True)


def _launch(
    x: Tensor,
    source: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    moments: Moments | None,
    rows: slice,
    spread: Phases | None,
    store: bool,
) -> None:
    frames, height, width, channels = x.shape
    assert x.is_contiguous()
    first, last, _ = rows.indices(height)
    line = height * width
    block = triton.next_power_of_2(channels)
    positions = max(1, MEASURED_TILE // block)
    total = frames * line
    repeats = max(1, total // (positions * PARTS))
    parts = triton.cdiv(total, positions * repeats)
    measured = (1, channels) if moments is None else (parts, channels)
    counts = torch.empty(measured[0], dtype=torch.float32, device=x.device)
    means, squares = (torch.empty(measured, dtype=torch.float32, device=x.device) for _ in range(2))
    time, first_row, first_pair, dropped = spread or (1, 0, 0, 0)
    _add_and_measure[(parts,)](
        x,
        source,
        bias,
        x if residual is None else residual,
        counts,
        means,
        squares,
        total,
        line,
        width,
        channels,
        first * width,
        last * width,
        line * channels if residual is None else residual.stride(0),
        repeats,
        first_row,
        first_pair,
        dropped,
        source.shape[1],
        TIME=time,
        PHASES=spread is not None,
        RESIDUAL=residual is not None,
        MEASURED=moments is not None,
        STORED=store,
        POSITIONS=positions,
        CHANNELS=block,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    if moments is not None:
        merge(moments.state, counts, means, squares)


@triton.jit
def _add_and_measure(
    x, source, bias, residual, counts, means, squares, total, line, width, channels, first, last, residual_frame,
    repeats, first_row, first_pair, dropped, phase_rows,
    TIME: tl.constexpr, PHASES: tl.constexpr, RESIDUAL: tl.constexpr, MEASURED: tl.constexpr, STORED: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x has `total` positions, `line` a frame, `width` a row; of a frame, [first, last) are measured.

    Each thread sums what it sees, as distances from the first tile's mean; threads meet only there and after the loop.
    """
    part = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    near = tl.zeros([CHANNELS], tl.float32)
    seen = tl.zeros([POSITIONS], tl.float32)
    added = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    square = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for repeat in tl.range(0, repeats, num_stages=STAGES):
        place = (part * repeats + repeat) * POSITIONS + tl.arange(0, POSITIONS)
        mask = (place < total)[:, None] & inside[None, :]
        offsets = place.to(tl.int64)[:, None] * channels + channel[None, :]
        frame, within = place // line, place % line
        if PHASES:
            row, column = first_row + within // width, within % width
            before = ((frame + dropped) // TIME * phase_rows + (row + 1) // 2 - 1 - first_pair).to(tl.int64)
            phase = ((frame + dropped) % TIME * 2 + row % 2) * 2 + column % 2
            read = (before * (width // 2 + 1) + (column + 1) // 2) * (TIME * 4) + phase
            values = tl.load(source + read[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            values = tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            beside = frame.to(tl.int64)[:, None] * residual_frame + within.to(tl.int64)[:, None] * channels
            values += tl.load(residual + beside + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        values += b[None, :]
        if STORED:
            values = values.to(x.dtype.element_ty)
            tl.store(x + offsets, values, mask=mask)
            values = values.to(tl.float32)
        if MEASURED:
            core = (place < total) & (within >= first) & (within < last)
            if repeat == 0:
                near = tl.sum(values, 0) / POSITIONS
            away = tl.where(core[:, None], values - near[None, :], 0.0)
            added += away
            square += away * away
            seen += core.to(tl.float32)
    if MEASURED:
        count = tl.sum(seen)
        step = tl.sum(added, 0) / tl.maximum(count, 1.0)
        spread = tl.maximum(tl.sum(square, 0) - step * step * count, 0.0)
        tl.store(counts + part, count)
        tl.store(means + part * channels + channel, near + step, mask=inside)
        tl.store(squares + part * channels + channel, spread, mask=inside)


def merge(state: Tensor, counts: Tensor, means: Tensor, squares: Tensor) -> None:
    """As `group_norm.Moments.add`, for its state."""
    parts, channels = means.shape
    groups = state.shape[1]
    _merge[(groups,)](
        state,
        counts,
        means,
        squares,
        parts,
        channels,
        groups,
        SIZE=channels // groups,
        PARTS=64,
        CHANNELS=triton.next_power_of_2(channels // groups),
        num_warps=4,
    )


@triton.jit
def _merge(
    state, counts, means, squares, parts, channels, groups,
    SIZE: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group of channels: the mean of all parts first, then their distances from it."""
    group = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    added = tl.zeros([PARTS], tl.float64)
    total = tl.zeros([PARTS, CHANNELS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (channel < SIZE)[None, :]
        count = tl.load(counts + part, mask=part < parts, other=0.0).to(tl.float64)
        offsets = part[:, None] * channels + group * SIZE + channel[None, :]
        total += tl.load(means + offsets, mask=mask, other=0.0).to(tl.float64) * count[:, None]
        added += count * SIZE
    number = tl.sum(added)
    mean = tl.sum(tl.sum(total, 1), 0) / number
    distances = tl.zeros([PARTS, CHANNELS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (channel < SIZE)[None, :]
        count = tl.load(counts + part, mask=part < parts, other=0.0).to(tl.float64)
        offsets = part[:, None] * channels + group * SIZE + channel[None, :]
        step = tl.load(means + offsets, mask=mask, other=0.0).to(tl.float64) - mean
        distances += tl.load(squares + offsets, mask=mask, other=0.0).to(tl.float64)
        distances += tl.where(mask, step * step * count[:, None], 0.0)
    spread = tl.sum(tl.sum(distances, 1), 0)
    seen, before = tl.load(state + group), tl.load(state + groups + group)
    step, both = mean - before, seen + number
    old = tl.load(state + 2 * groups + group)
    tl.store(state + group, both)
    tl.store(state + groups + group, before + step * (number / both))
    tl.store(state + 2 * groups + group, old + spread + step * step * (seen * number / both))
