"""8-bit products: activations quantized a token at a time, times the stored codes of a weight.

    x [tokens, in]     codes = round(x / scale), scale [tokens, 1] = largest |x| of the token / largest code
    y [tokens, out]    codes @ weight.T, in integers or float32, * scale * the weight's scale + bias, rounded once

Nothing is calibrated: scales follow every token, so outliers of one do not cost another its bits. What a token loses is
relative to its own largest value: int8 (255 even steps) suffers under channels that stand out in every token, e4m3
(three bits behind the leading one) does not, but is three times worse elsewhere.

WAYS names the functions that do it, best first, all under one signature: what computes on a CPU is the reference for
the others. Memory is counted in `compute.py`; no operation waits for the device.

Left out: derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels.chunks import SMALLEST, row_chunks
from lowvram_i2v.kernels.compute import FEWEST_ROWS, product_rows

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class OpenWeight:
    """codes [out, in], int8 or e4m3; scale [1, out] float32; bias [out], float32 for int8, for fp8 in any dtype."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def token_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [tokens, in] -> [tokens, 1] float32. A token with an infinite value or none gets that as its scale, and so its
    result is none either."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    largest = torch.maximum(low.neg_(), high).float()
    # divided by a tensor: by a number, a GPU multiplies with the reciprocal, which is another last bit
    return largest.div_(torch.full_like(largest, LARGEST[dtype])).clamp_min_(SMALLEST)


def quantize_tokens(x: Tensor, scale: Tensor, codes: Tensor) -> None:
    """x [tokens, in] with its scales [tokens, 1] -> codes [tokens, in], int8 or e4m3, written where they are given."""
    for rows in row_chunks(*x.shape):
        values = torch.div(x[rows], scale[rows])
        if codes.dtype == torch.int8:
            values.round_()
        else:
            values.clamp_(-LARGEST[codes.dtype], LARGEST[codes.dtype])
        codes[rows] = values
        del values  # before the next are made


def int8_linear(x: Tensor, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """By `torch._int_mm`, in parts, because a product in 32-bit integers is twice as large as the result. Its memory
    then holds the floats that it becomes."""
    out = len(weight.codes)
    result = torch.empty(len(x), out, dtype=dtype, device=x.device)
    step = product_rows(len(x), out)
    for start in range(0, len(x), max(1, step)):
        _int8_part(x[start : start + step], weight, result[start : start + step])
    return result


def _int8_part(x: Tensor, weight: OpenWeight, result: Tensor) -> None:
    rows, padded = len(x), max(len(x), FEWEST_ROWS)
    scale = token_scales(x, torch.int8)
    codes = torch.empty(padded, x.shape[1], dtype=torch.int8, device=x.device)
    codes[rows:] = 0
    quantize_tokens(x, scale, codes[:rows])
    product = torch.empty(padded, len(weight.codes), dtype=torch.int32, device=x.device)
    int_mm(codes, weight.codes, product)
    scaled = _scaled_in_place(product[:rows], scale)
    if weight.bias is None:
        torch.mul(scaled, weight.scale, out=result)
    else:
        torch.addcmul(weight.bias, scaled, weight.scale, out=result)


def _scaled_in_place(product: Tensor, scale: Tensor) -> Tensor:
    """Integers times float32 scales, as floats in the integers' memory."""
    values = product.view(torch.float32)
    if product.is_cuda:  # in one pass; on a CPU that would make a copy
        return torch.mul(product, scale, out=values)
    return values.copy_(product).mul_(scale)


def int_mm(codes: Tensor, weight: Tensor, product: Tensor) -> None:
    """codes [tokens, in] and weight [out, in], int8 -> product [tokens, out] int32: exact on every device."""
    if product.is_cuda or cpu_product_is_exact():
        torch._int_mm(codes, weight.t(), out=product)
    else:
        product.copy_(codes.double() @ weight.double().t())


@cache
def cpu_product_is_exact() -> bool:
    """Whether this CPU adds 8-bit products in 32 bits. Without VNNI instructions, sums of two may be cut to 16."""
    codes = torch.full((FEWEST_ROWS, 64), 127, dtype=torch.int8)
    both = torch.cat([codes, -codes])
    product = torch._int_mm(both, both.t())
    return torch.equal(product, (both.double() @ both.double().t()).int())


def scaled_mm(x: Tensor, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """fp8 by `torch._scaled_mm` with a scale a row; it gives bfloat16."""
    codes, scale = _fp8_codes(x)
    bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
    columns = weight.codes.t()
    y = torch._scaled_mm(codes, columns, scale, weight.scale, bias=bias, out_dtype=torch.bfloat16)
    return y.to(dtype)


def fp8_linear(x: Tensor, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """What `scaled_mm` computes, in plain torch: products of codes are exact in float32, and summed in it."""
    codes, scale = _fp8_codes(x)
    y = (codes.float() @ weight.codes.float().t()).mul_(scale).mul_(weight.scale)
    return (y if weight.bias is None else y.add_(weight.bias)).to(dtype)


def _fp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = token_scales(x, torch.float8_e4m3fn)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    quantize_tokens(x, scale, codes)
    return codes, scale


@dataclass(frozen=True)
class Way:
    """One way to multiply x [tokens, in] by the weight of a scheme, where it works. The result has the dtype asked
    for."""

    scheme: str
    linear: Callable[[Tensor, OpenWeight, torch.dtype], Tensor]
    works_on: Callable[[torch.device], bool]


WAYS = [
    Way("int8", int8_linear, lambda device: device.type in ("cuda", "cpu")),
    Way("fp8", scaled_mm, lambda device: device.type == "cuda"),
    Way("fp8", fp8_linear, lambda device: device.type == "cpu"),
]


def way(scheme: str, device: torch.device) -> Way:
    """The best way for a device."""
    for candidate in WAYS:
        if candidate.scheme == scheme and candidate.works_on(device):
            return candidate
    raise PlatformError(f"no 8-bit product of {scheme} weights on {device}", "Choose the compute w8a16.")


def prepared(
    scheme: str, parts: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype, rows: slice
) -> Callable[[Tensor], Tensor]:
    """A layer's rows made ready for many calls: x [tokens, in] -> [tokens, out] in `dtype`."""
    codes = parts["weight"][rows]
    if scheme == "int8":
        scale = parts["weight_scale"][rows].view(1, -1)
        bias = None if bias is None else bias[rows].float()
    else:
        scale = parts["scale_weight"].view(1, 1).repeat(1, len(codes))
        bias = None if bias is None else bias[rows]
    weight, linear = OpenWeight(codes, scale, bias), way(scheme, codes.device).linear
    return lambda x: linear(x, weight, dtype)


def trial(scheme: str, device: torch.device) -> str | None:
    """Multiplies small numbers on the device and on the CPU. What went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(48, 64, generator=generator), torch.randn(96, 64, generator=generator) * 30
    scale, bias = torch.full((1, 96), 0.01), torch.randn(96, generator=generator)
    codes = codes.clamp_(-127, 127).to(torch.int8 if scheme == "int8" else torch.float8_e4m3fn)
    expected = way(scheme, torch.device("cpu")).linear(x, OpenWeight(codes, scale, bias), torch.float32)
    there = OpenWeight(codes.to(device), scale.to(device), bias.to(device))
    try:
        actual = way(scheme, device).linear(x.to(device), there, torch.bfloat16).float().cpu()
    except RuntimeError as error:  # of a product that this card, driver or torch has not: the user is told its message
        return f"torch {torch.__version__} cannot multiply {scheme} there: {str(error).strip().splitlines()[0]}"
    difference = float((actual - expected).norm() / expected.norm())
    return None if difference < 0.01 else f"{scheme} products there are wrong by {difference:.2g}"
