"""The decoder's Triton kernels tried on a card, once, before the first of them is trusted.

Each makes the same small tensors as its plain-torch definition, which computes on the CPU: with rows that lie apart,
edges, rows that are not measured, and tails. Where one is wrong, or does not even compile, plain torch does all of
them on that card. `check-kernels` runs the same cases on larger tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import inf, isnan
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_i2v.kernels import group_norm_plain, softmax_step
from lowvram_i2v.kernels.group_norm import Moments, Phases

GROUPS = 32
LIMIT = 2e-3
"""Relative L2 of float16 results and of float32 moments."""
CPU = torch.device("cpu")


class Ops(NamedTuple):
    """What the decoder calls, in one way of computing it."""

    normalize_into: Callable[..., None]
    add_and_measure: Callable[..., None]
    measure: Callable[..., None]
    interleave: Callable[..., None]
    softmax_step: Callable[..., None]


PLAIN = Ops(
    group_norm_plain.normalize_into,
    group_norm_plain.add_and_measure,
    group_norm_plain.measure,
    group_norm_plain.interleave,
    softmax_step.by_torch,
)


def fused() -> Ops:
    from lowvram_i2v.kernels import group_norm_triton, softmax_step_triton

    return Ops(
        group_norm_triton.normalize_into,
        group_norm_triton.add_and_measure,
        group_norm_triton.measure,
        group_norm_triton.interleave,
        softmax_step_triton.softmax_step,
    )


class Size(NamedTuple):
    """Of a chunk."""

    frames: int
    rows: int
    width: int
    channels: int


SMALL = Size(2, 5, 9, 128)


@dataclass(frozen=True)
class Case:
    """op: the field of `Ops` that is tried. run: makes inputs, the same on every device, and returns what it made."""

    op: str
    run: Callable[[Ops, Size, torch.device], list[Tensor]]


@cache
def fault(device: torch.device) -> str | None:
    """Why the kernels are not used on this CUDA device; None where they are right. The first call tries them.

    Raises torch.OutOfMemoryError."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        found = {name: error(case, fused(), SMALL, device) for name, case in CASES.items()}
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # noqa: BLE001 - whatever a compiler or a driver raises, the kernels are of no use
        return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]:.200}"
    worst = max(found, key=lambda name: inf if isnan(found[name]) else found[name])
    return None if found[worst] < LIMIT else f"{worst} is off by {found[worst]:.2g}, {LIMIT:.2g} is allowed"


@torch.inference_mode()
def error(case: Case, ops: Ops, size: Size, device: torch.device) -> float:
    """The largest relative L2 distance of what the op makes from its definition; NaN where there is one."""
    pairs = zip(case.run(ops, size, device), case.run(PLAIN, size, CPU), strict=True)
    errors = [(made.cpu().double() - right.double()).norm() / right.double().norm() for made, right in pairs]
    return float(torch.stack(errors).max())  # NaN is the largest


def _drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) + 0.5).to(device, dtype)


def _normalized(ops: Ops, size: Size, device: torch.device) -> list[Tensor]:
    frames, rows, width, channels = size
    x = _drawn(frames, rows + 2, width, channels, device=device)[:, 1:-1]
    scale, shift = (_drawn(channels, device=device, dtype=torch.float32) * sign for sign in (1, -1))
    outs = [x.new_zeros(frames, rows + edges, width + 2, channels) for edges in (2, 0)]
    ops.normalize_into(outs[0], x, (scale, shift), 1, 1)
    ops.normalize_into(outs[1], x, None, 0, 0)
    return outs


def _added(ops: Ops, size: Size, device: torch.device) -> list[Tensor]:
    """In two parts, of which each measures rows of its own."""
    frames, rows, width, channels = size
    x, bias = _drawn(*size, device=device), _drawn(channels, device=device)
    residual = _drawn(frames, rows + 1, width, channels, device=device)[:, 1:]
    moments = Moments(GROUPS, device)
    for some in (slice(0, rows - 1), slice(rows - 1, rows)):
        ops.add_and_measure(x, bias, residual, moments, some)
    return [x, *_scale_and_shift(moments, bias)]


def _measured(ops: Ops, size: Size, device: torch.device) -> list[Tensor]:
    x, bias, moments = _drawn(*size, device=device), _drawn(size.channels, device=device), Moments(GROUPS, device)
    ops.measure(x, bias, moments, slice(1, size.rows))
    return [x, *_scale_and_shift(moments, bias)]


def _interleaved(ops: Ops, size: Size, device: torch.device) -> list[Tensor]:
    frames, rows, width, channels = size
    spread, moments, bias = Phases(2, 1, 0, 1), Moments(GROUPS, device), _drawn(channels, device=device)
    phases = _drawn(frames, rows - 1, width + 1, 2 * 4 * channels, device=device)
    out = phases.new_zeros(2 * frames - 1, 2 * rows - 4, 2 * width, channels)
    ops.interleave(out, phases, spread, bias, moments, slice(1, 2 * rows - 5))
    return [out, *_scale_and_shift(moments, bias)]


def _scale_and_shift(moments: Moments, bias: Tensor) -> tuple[Tensor, Tensor]:
    return moments.affine(torch.ones_like(bias), bias, 1e-6)


def _softmax_steps(ops: Ops, size: Size, device: torch.device) -> list[Tensor]:
    """Two of them, so that what came before is scaled."""
    queries, keys = size.rows * size.width, 2 * size.channels + 44
    weights = _drawn(queries, keys, device=device)
    total = _drawn(queries, size.channels, device=device, dtype=torch.float32)
    sums, highest = _drawn(queries, device=device, dtype=torch.float32), torch.full((queries,), -1.0, device=device)
    for scores in _drawn(2, queries, keys, device=device, dtype=torch.float32) * 20:
        ops.softmax_step(scores, size.channels**-0.5, weights, total, highest, sums)
    return [weights, total, sums, highest]


CASES = {
    "norm, SiLU, border": Case("normalize_into", _normalized),
    "bias, residual, moments": Case("add_and_measure", _added),
    "moments": Case("measure", _measured),
    "phases in order, moments": Case("interleave", _interleaved),
    "a softmax's step": Case("softmax_step", _softmax_steps),
}
