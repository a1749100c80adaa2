"""Rows as 8-bit codes, and products of them: the plain-torch forms of the ops that `fused_rows` and `fused_gemm` do in
one kernel each, under the same names.

Invariants: codes are made from float32 values, before any rounding to 16 bits: value / scale, scale = largest magnitude
/ 127 for int8 (rounded half to even) or / 448 for e4m3. A row of zeros has the smallest normal scale. Sums of int8
products are exact. With float32 results this is the oracle of the fused forms, on every device; on a card where those
do not run it takes their place, so float32 copies are made of some rows at a time only (`compute.py` counts them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_i2v.kernels.chunks import row_chunks
from lowvram_i2v.kernels.modulate import gated_residual_, layer_norm_modulate_into
from lowvram_i2v.kernels.w8a8 import (
    Codes,
    OpenWeight,
    product_parts,
    quantize_tokens,
    quantized,
    token_scales,
    torch_linear,
    torch_values,
)


def gelu(x: Tensor, out: Tensor) -> None:
    """GELU (tanh form) of x, written into `out`, which may be x."""
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def row_codes(x: Tensor, dtype: torch.dtype) -> Codes:
    """x [rows, width] as codes."""
    return quantized(x, dtype)


def layer_norm_modulate_codes(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int, dtype: torch.dtype) -> Codes:
    """`modulate.layer_norm_modulate` of x [rows, width], as codes."""
    made = Codes.empty(len(x), x.shape[1], dtype, x.device)
    for rows in row_chunks(*x.shape):
        normed = torch.empty(x[rows].shape, dtype=torch.float32, device=x.device)
        layer_norm_modulate_into(x[rows], shift, scale, first_of(rows, first_tokens), normed)
        made.scale[rows] = token_scales(normed, dtype)[:, 0]
        quantize_tokens(normed, made.scale[rows, None], made.codes[rows])
        del normed  # before the next are made
    return made


def gelu_codes(hidden: Tensor, dtype: torch.dtype, beside: Tensor | None = None) -> Codes:
    """Rows [beside | GELU(hidden)] as codes, one scale for both: what a single block's second linear layer reads."""
    before = 0 if beside is None else beside.shape[1]
    made = Codes.empty(len(hidden), before + hidden.shape[1], dtype, hidden.device)
    for rows in row_chunks(*hidden.shape):
        values = hidden[rows].to(torch.float32, copy=True)
        gelu(values, values)
        scale = token_scales(values, dtype)
        if beside is not None:
            scale = torch.maximum(scale, token_scales(beside[rows], dtype))
            quantize_tokens(beside[rows], scale, made.codes[rows, :before])
        quantize_tokens(values, scale, made.codes[rows, before:])
        made.scale[rows] = scale[:, 0]
        del values  # before the next are made
    return made


def linear(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """x [rows, in] times the weight, plus bias -> [rows, out] in `dtype`."""
    return torch_linear(x, weight, dtype)


def linear_gated_residual_(residual: Tensor, x: Codes, weight: OpenWeight, gate: Tensor, first_tokens: int = 0) -> None:
    """residual [rows, out] += gate * linear; the first-frame rule is that of `gated_residual_`."""
    for rows in product_parts(*residual.shape):
        y = torch_values(x.part(rows), weight, residual.dtype)
        gated_residual_(residual[rows], y, gate, first_of(rows, first_tokens))
        del y  # before the next are made


def first_of(rows: slice, first_tokens: int) -> int:
    """How many of a range of rows belong to the first frame."""
    start, stop = int(rows.start), int(rows.stop)
    return min(max(first_tokens - start, 0), stop - start)
