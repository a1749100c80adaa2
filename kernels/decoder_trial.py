"""The decoder's Triton kernels tried on a card, once, before the first of them is trusted.

Each makes the same small tensors as its plain-torch definition, which computes on the CPU: with rows that lie apart,
edges, rows that are not measured, and tails. Where one is wrong, or does not even compile, plain torch does all of
them on that card. Left out: what only sizes of a whole video could show.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from lowvram_i2v.kernels import group_norm, softmax_step
from lowvram_i2v.kernels.group_norm import Moments, Phases

SHAPE = FRAMES, ROWS, WIDTH, CHANNELS = 2, 5, 9, 128
GROUPS = 32
LIMIT = 2e-3
"""Relative L2 of float16 results and of float32 moments."""


@cache
def fault(device: torch.device) -> str | None:
    """Why the kernels are not used on this CUDA device; None where they are right. The first call tries them.

    Raises torch.OutOfMemoryError."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        name, error = max(errors(device), key=lambda found: found[1] if found[1] == found[1] else float("inf"))
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # noqa: BLE001 - whatever a compiler or a driver raises, the kernels are of no use
        return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]:.200}"
    return None if error < LIMIT else f"{name} is off by {error:.2g}, {LIMIT:.2g} is allowed"


@torch.inference_mode()
def errors(device: torch.device) -> Iterator[tuple[str, float]]:
    """The kernels' names, and the relative L2 distance of what each makes from its definition."""
    from lowvram_i2v.kernels import group_norm_triton, softmax_step_triton

    for name, run, plain, fused in (
        ("normalize_into", _normalized, group_norm, group_norm_triton),
        ("add_and_measure", _added, group_norm, group_norm_triton),
        ("interleave", _interleaved, group_norm, group_norm_triton),
        ("softmax_step", _softmax_steps, softmax_step, softmax_step_triton),
    ):
        for actual, expected in zip(run(fused, device), run(plain, torch.device("cpu")), strict=True):
            difference = actual.cpu().double() - expected.double()
            yield name, float(difference.norm() / expected.double().norm())


def _drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) + 0.5).to(device, dtype)


def _normalized(ops: ModuleType, device: torch.device) -> list[Tensor]:
    x = _drawn(FRAMES, ROWS + 2, WIDTH, CHANNELS, device=device)[:, 1:-1]
    scale, shift = (_drawn(CHANNELS, device=device, dtype=torch.float32) * sign for sign in (1, -1))
    outs = [x.new_zeros(FRAMES, ROWS + edges, WIDTH + 2, CHANNELS) for edges in (2, 0)]
    ops.normalize_into(outs[0], x, (scale, shift), 1, 1)
    ops.normalize_into(outs[1], x, None, 0, 0)
    return outs


def _added(ops: ModuleType, device: torch.device) -> list[Tensor]:
    x, bias = _drawn(*SHAPE, device=device), _drawn(CHANNELS, device=device)
    residual = _drawn(FRAMES, ROWS + 1, WIDTH, CHANNELS, device=device)[:, 1:]
    moments = Moments(GROUPS, device)
    for rows in (slice(0, 4), slice(4, ROWS)):
        ops.add_and_measure(x, bias, residual, moments, rows)
    return [x, *_scale_and_shift(moments, bias)]


def _interleaved(ops: ModuleType, device: torch.device) -> list[Tensor]:
    spread, moments, bias = Phases(2, 1, 0, 1), Moments(GROUPS, device), _drawn(CHANNELS, device=device)
    phases = _drawn(FRAMES, ROWS - 1, WIDTH + 1, 2 * 4 * CHANNELS, device=device)
    out = phases.new_zeros(2 * FRAMES - 1, 2 * ROWS - 4, 2 * WIDTH, CHANNELS)
    ops.interleave(out, phases, spread, bias, moments, slice(1, 2 * ROWS - 5))
    return [out, *_scale_and_shift(moments, bias)]


def _scale_and_shift(moments: Moments, bias: Tensor) -> tuple[Tensor, Tensor]:
    return moments.affine(torch.ones_like(bias), bias, 1e-6)


def _softmax_steps(ops: ModuleType, device: torch.device) -> list[Tensor]:
    """Two of them, so that what came before is scaled."""
    rows, keys = 5, 300
    weights = _drawn(rows, keys, device=device)
    total, sums = (_drawn(*shape, device=device, dtype=torch.float32) for shape in ((rows, CHANNELS), (rows,)))
    highest = torch.full((rows,), -1.0, device=device)
    for scores in _drawn(2, rows, keys, device=device, dtype=torch.float32) * 20:
        ops.softmax_step(scores, CHANNELS**-0.5, weights, total, highest, sums)
    return [weights, total, sums, highest]
