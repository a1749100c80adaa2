"""Inputs for attention at any length, and how far from the definition a backend may be on them.

The same cases serve the self-test before a run (a few hundred tokens), `check-kernels` on the user's card at the
video's real length, and tests. They are what breaks careless kernels: softmax rows that look at all keys alike and rows
that live on a few, channels of K and V with offsets, a channel of q and k that stands out.

A limit tells a right kernel from a wrong one, which is off by its whole value or by the offset of V; it is no measure
of quality. Backends in 16 bits have one, backends that quantize another, wide where V has no offset: there a flat row's
result is a small mean of large values, and 8 bits of P and V are a part of it that no kernel can save. Who quantizes
without taking V's mean out first, as SageAttention 1 (0.0108 with an offset at 119 200 tokens), gets more room there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowvram_i2v.kernels.attention_reference import attention, relative_l2

Kind = Literal["exact", "eight_bit", "uncentred"]
"""In 16 bits; in 8 bits with V's mean taken out; in 8 bits."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Triple = tuple[Tensor, Tensor, Tensor]

OUTLIER = 6.0
SAMPLED = 256
"""Queries whose result is compared: the definition of all of them would take minutes at full length."""
TOKENS, HEADS = 601, 2
"""Of the self-test: tiles, and a ragged last one."""


@dataclass(frozen=True)
class Case:
    """sharpness: size of the queries' channels: 0.2 looks at all keys alike, 2 at some hundred of 34 000. v_offset:
    size of the vector that all values have in common. outlier: whether a channel of q and k is OUTLIER times as large.
    exact, eight_bit, uncentred: the relative L2 error up to which a backend of that kind is right."""

    sharpness: float
    v_offset: float
    outlier: bool
    exact: float
    eight_bit: float
    uncentred: float


CASES = {
    "flat": Case(0.2, 0.0, False, 0.005, 0.08, 0.08),
    "flat, V offset": Case(0.2, 1.0, False, 0.005, 0.01, 0.03),
    "peaked": Case(2.0, 0.0, False, 0.005, 0.08, 0.08),
    "outlier, V offset": Case(1.0, 1.0, True, 0.005, 0.03, 0.08),
}


def inputs(case: Case, tokens: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> Triple:
    """Seeded q, k, v, each [tokens, heads, dim]; K has an offset in every channel."""
    generator = torch.Generator(device).manual_seed(1)

    def made(size: float, offset: float, outlier: bool) -> Tensor:
        vector = torch.randn(heads, dim, generator=generator, device=device).mul_(offset)
        x = torch.randn(tokens, heads, dim, generator=generator, device=device).mul_(size).add_(vector)
        if outlier:
            x[:, :, dim // 3] *= OUTLIER
        return x.to(dtype)

    return (
        made(case.sharpness, 0.0, case.outlier),
        made(1.0, 1.0, case.outlier),
        made(1.0, case.v_offset, False),
    )


def error(attend: Attend, given: Triple) -> float:
    """Relative L2 distance from the definition in float32, over sampled queries with the last one among them. Waits
    for the device."""
    q, k, v = given
    step = max(1, len(q) // SAMPLED)
    rows = slice((len(q) - 1) % step, None, step)
    exact = attention(q, k, v, rows=rows)  # first: a backend may write over q
    return relative_l2(attend(q, k, v)[rows], exact)


def bound(case: Case, kind: Kind) -> float:
    return {"exact": case.exact, "eight_bit": case.eight_bit, "uncentred": case.uncentred}[kind]


def fault(
    attend: Attend,
    kind: Kind,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    only: Collection[str] = tuple(CASES),
) -> str | None:
    """What is wrong with a backend on this device: the first of the cases `only` that it gets wrong, on TOKENS tokens;
    None if it is right. Whatever the backend raises is the caller's to judge."""
    for name in only:
        case = CASES[name]
        off = error(attend, inputs(case, TOKENS, HEADS, dim, device, dtype))
        if not off <= bound(case, kind):
            return f"its self-test ({name}) is off by {off:.1%}, {bound(case, kind):.1%} is right"
    return None
