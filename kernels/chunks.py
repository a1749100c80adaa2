"""Large weights in small pieces: float32 copies of a few rows at a time.

Invariant: the pieces change memory and nothing else, so every formula applied to them must look at one row (or one
block of values) only. The largest weight, 21504 x 3072, would be 264 MB in float32; a piece is 16 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowvram_i2v.errors import CheckpointError

if TYPE_CHECKING:  # the planner counts pieces too, and is quicker without torch
    from torch import Tensor

ELEMENTS = 2**22
"""Values of a piece."""

SMALLEST = 2.0**-126
"""Smallest normal float32. Scales do not fall below it: devices may take smaller numbers for zero."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive row ranges that cover `rows`; a range has at most ELEMENTS values, or one row."""
    step = max(1, ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def piece(rows: int, columns: int) -> int:
    """Values of the first, largest piece."""
    return next((rows.stop * columns for rows in row_chunks(rows, columns)), 0)


def absmax(values: Tensor, name: str, dim: int | None = None) -> Tensor:
    """Largest magnitude as float32, shape [] or, along `dim`, with that dimension kept as 1; no copy of the values.

    Raises CheckpointError naming the tensor if a value is infinite or not a number: a scale made from it would
    spread the damage over its row.
    """
    import torch

    low, high = torch.aminmax(values) if dim is None else torch.aminmax(values, dim=dim, keepdim=True)
    largest = torch.maximum(-low, high).float()
    if not largest.isfinite().all():
        raise CheckpointError(
            f"{name} has values that are infinite or not a number: it cannot be quantized",
            "The weights are damaged: download them again.",
        )
    return largest


def scaled(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Writes codes * scale into `out`, all of two dimensions, rounded once from float32. Codes are 8-bit integers or
    e4m3, which 16-bit floats hold exactly, so that a GPU needs no float32 copy of them."""
    import torch

    if out.is_cuda or out.dtype == torch.float32:
        torch.mul(out.copy_(codes), scale, out=out)
    else:  # for other dtypes, a CPU would make two copies
        out.copy_(codes.float().mul_(scale))
