"""Rows as 8-bit codes, and products of them: the plain-torch definitions of the ops that `fused_rows` and `fused_gemm`
do in one kernel each, under the same names.

Invariants: codes are made from float32 values, before any rounding to 16 bits: value / scale, scale = largest magnitude
/ 127 for int8 (rounded half to even) or / 448 for e4m3. A row of zeros has the smallest normal scale. Sums of code
products are exact here (float64 holds them all), so this is the oracle, not a fast path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram_i2v.kernels.chunks import SMALLEST
from lowvram_i2v.kernels.modulate import gated_residual_, layer_norm_modulate
from lowvram_i2v.kernels.w8a8 import LARGEST, OpenWeight


@dataclass(frozen=True)
class Codes:
    """Rows in 8 bits: codes [rows, width] int8 or e4m3, scale [rows] float32; row = codes * scale."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Codes:
        codes = torch.empty(rows, width, dtype=dtype, device=device)
        return cls(codes, torch.empty(rows, dtype=torch.float32, device=device))


def gelu(x: Tensor, out: Tensor) -> None:
    """GELU (tanh form) of x, written into `out`, which may be x."""
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def row_codes(x: Tensor, dtype: torch.dtype) -> Codes:
    """x [rows, width] as codes."""
    values, largest = x.float(), LARGEST[dtype]
    scale = (values.abs().amax(1) / largest).clamp_min(SMALLEST)
    scaled = (values / scale[:, None]).clamp_(-largest, largest)
    return Codes((scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale)


def layer_norm_modulate_codes(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int, dtype: torch.dtype) -> Codes:
    """`modulate.layer_norm_modulate` of x [rows, width], as codes."""
    return row_codes(layer_norm_modulate(x.float(), shift, scale, first_tokens), dtype)


def gelu_codes(hidden: Tensor, dtype: torch.dtype, beside: Tensor | None = None) -> Codes:
    """Rows [beside | GELU(hidden)] as codes, one scale for both: what a single block's second linear layer reads."""
    made = F.gelu(hidden.float(), approximate="tanh")
    return row_codes(made if beside is None else torch.cat([beside.float(), made], dim=1), dtype)


def linear(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """x [rows, in] times the weight, plus bias -> [rows, out] in `dtype`."""
    return product(x, weight).to(dtype)


def linear_gelu_codes(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Codes:
    """GELU of `linear`, as codes again; between the two it is in `dtype`, as the fused form holds it."""
    return row_codes(F.gelu(product(x, weight), approximate="tanh").to(dtype), x.codes.dtype)


def linear_gated_residual_(residual: Tensor, x: Codes, weight: OpenWeight, gate: Tensor, first_tokens: int = 0) -> None:
    """residual [rows, out] += gate * linear, rounded once; the first-frame rule is that of `gated_residual_`."""
    gated_residual_(residual, product(x, weight), gate, first_tokens)


def product(x: Codes, weight: OpenWeight) -> Tensor:
    """float32 [rows, out]."""
    sums = x.codes.double() @ weight.codes.double().t()
    made = sums * x.scale.double()[:, None] * weight.scale.double().reshape(1, -1)
    return (made if weight.bias is None else made + weight.bias.double()).float()
