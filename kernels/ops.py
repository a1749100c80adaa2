"""The ops between and around matrix products: one table, a line an op, plain torch or Triton.

`PLAIN` says what each op computes, on any device. `choose` gives the table for a device: Triton's kernels on a CUDA
card that can run them, where Triton is installed, and plain torch everywhere else. Nothing of Triton is imported
before.

Who multiplies 8-bit numbers on a card is decided in four places, in this order:

    compute.refusal     nobody: weights are dequantized (w8a16) on a card where neither Triton nor torch multiplies
    choose              the kernels of `fused_gemm`, or torch for those that the pipeline's self-test refused
    fused_gemm.linear   hands what `w8a8.LIBRARY` names, e4m3 on Hopper, to torch's library, which is faster there
    w8a8.way            for layers called with plain rows, not with codes: Triton or torch, the first that is right

To add an op: a field of `Ops`, its plain form in PLAIN, its kernel in `fused`, a case in `op_cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels import modulate, qk_norm_rope, row_codes
from lowvram_i2v.kernels.w8a8 import Codes, OpenWeight

OLDEST_CARD = (8, 0)
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ops:
    """Results go where the last argument says, or over the first one (names ending in _), or are returned."""

    layer_norm_modulate: Callable[[Tensor, Tensor, Tensor, int, Tensor], None]
    gated_residual_: Callable[[Tensor, Tensor, Tensor, int], None]
    qkv_norm_rope: Callable[[Tensor, Tensor, Tensor, Rope, Tensor, Tensor, Tensor], None]
    gelu: Callable[[Tensor, Tensor], None]
    row_codes: Callable[[Tensor, torch.dtype], Codes]
    layer_norm_modulate_codes: Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Codes]
    gelu_codes: Callable[[Tensor, torch.dtype, Tensor | None], Codes]
    linear: Callable[[Codes, OpenWeight, torch.dtype], Tensor]
    linear_gated_residual_: Callable[[Tensor, Codes, OpenWeight, Tensor, int], None]


PLAIN = Ops(
    layer_norm_modulate=modulate.layer_norm_modulate_into,
    gated_residual_=modulate.gated_residual_,
    qkv_norm_rope=qk_norm_rope.qkv_norm_rope_into,
    gelu=row_codes.gelu,
    row_codes=row_codes.row_codes,
    layer_norm_modulate_codes=row_codes.layer_norm_modulate_codes,
    gelu_codes=row_codes.gelu_codes,
    linear=row_codes.linear,
    linear_gated_residual_=row_codes.linear_gated_residual_,
)


def fused() -> Ops:
    """The Triton kernels. Raises PlatformError where Triton is not installed."""
    if find_spec("triton") is None:
        raise PlatformError("Triton is not installed", "Install the package triton (on Windows: triton-windows).")
    from lowvram_i2v.kernels import fused_gemm, fused_qkv, fused_rows

    return Ops(
        layer_norm_modulate=fused_rows.layer_norm_modulate,
        gated_residual_=fused_rows.gated_residual_,
        qkv_norm_rope=fused_qkv.qkv_norm_rope,
        gelu=fused_rows.gelu,
        row_codes=fused_rows.row_codes,
        layer_norm_modulate_codes=fused_rows.layer_norm_modulate_codes,
        gelu_codes=fused_rows.gelu_codes,
        linear=fused_gemm.linear,
        linear_gated_residual_=fused_gemm.linear_gated_residual_,
    )


def choose(device: torch.device, refused: Collection[str] = ()) -> Ops:
    """The ops for a device. refused: names of ops whose kernels are not to be used there."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < OLDEST_CARD:
        return PLAIN
    return replace(fused(), **{name: getattr(PLAIN, name) for name in refused})
