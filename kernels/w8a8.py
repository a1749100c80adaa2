"""8-bit products: rows as codes with a scale each, times the stored codes of a weight.

    Codes        row = codes * scale, scale = largest |value| of the row / largest code
    OpenWeight   weight = codes * scale
    y [rows, out]   codes @ weight.T, in integers or float32, * the row's scale * the weight's + bias, rounded once

Nothing is calibrated: scales follow every token, so outliers of one do not cost another its bits. What a token loses is
relative to its own largest value: int8 (255 even steps) suffers under channels that stand out in every token, e4m3
(three bits behind the leading one) does not, but is three times worse elsewhere.

WAYS names who multiplies, best first: our Triton kernel, and torch, which is the reference on every device. Memory is
counted in `compute.py`; no operation waits for the device, but for the first `way` of a card.

Left out: derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lowvram_i2v.errors import PlatformError
from lowvram_i2v.kernels.chunks import SMALLEST, row_chunks
from lowvram_i2v.kernels.compute import FEWEST_ROWS, PRODUCTS, product_rows

FP8 = torch.float8_e4m3fn
CODES = {"int8": torch.int8, "fp8": FP8}
"""Scheme -> dtype of the codes, of its weights and of rows."""

LARGEST = {torch.int8: 127.0, FP8: 448.0}

LIBRARY = {("linear", FP8, 9)}
"""Op, codes and major compute capability of the cards on which torch's library multiplies faster than our kernel, with
its fast sums, which are as exact as our kernel's. Everything else is ours: `_int_mm` and its passes are no faster than
16 bits on an H100."""


@dataclass(frozen=True)
class Codes:
    """Rows in 8 bits: codes [rows, width] int8 or e4m3, scale [rows] float32; row = codes * scale."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Codes:
        codes = torch.empty(rows, width, dtype=dtype, device=device)
        return cls(codes, torch.empty(rows, dtype=torch.float32, device=device))

    def part(self, rows: slice) -> Codes:
        """Some of the rows, in the same memory."""
        return Codes(self.codes[rows], self.scale[rows])


@dataclass(frozen=True)
class OpenWeight:
    """codes [out, in], int8 or e4m3; scale [1, out] float32; bias [out], float32 for int8, for fp8 in any dtype."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def quantized(x: Tensor, dtype: torch.dtype) -> Codes:
    """x [rows, width] as codes."""
    scale = token_scales(x, dtype)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    quantize_tokens(x, scale, codes)
    return Codes(codes, scale[:, 0])


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


def torch_linear(x: Codes, weight: OpenWeight, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """[rows, out] in `dtype`, by torch: `_int_mm` for int8; for e4m3 `_scaled_mm` on a GPU, float32 products on a CPU
    and for float32 results. fast: `_scaled_mm` may add with the few bits of Hopper's tensor cores."""
    if x.codes.dtype == torch.int8:
        result = torch.empty(len(x.codes), len(weight.codes), dtype=dtype, device=x.codes.device)
        for rows in product_parts(len(result), result.shape[1]):
            _finish(_int8_sums(x.part(rows), weight), weight, result[rows])
        return result
    if x.codes.is_cuda and dtype != torch.float32:
        return _scaled_mm(x, weight, fast).to(dtype)
    return _fp8_in_float32(x, weight, dtype)


def torch_values(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """`torch_linear` of the rows of one part, for what is computed from it at once: float32 where that costs no memory,
    else `dtype`."""
    if x.codes.dtype != torch.int8:
        return torch_linear(x, weight, dtype)
    sums = _int8_sums(x, weight)
    _finish(sums, weight, sums)
    return sums


def product_parts(rows: int, out: int) -> Iterator[slice]:
    """Ranges of rows that are multiplied at a time: a product in 32-bit integers is twice as large as the result."""
    step = max(1, product_rows(rows, out))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _int8_sums(x: Codes, weight: OpenWeight) -> Tensor:
    """Sums of the products times the rows' scales: float32 [rows, out], in the memory of the integers."""
    codes, rows = x.codes, len(x.codes)
    if rows < FEWEST_ROWS:
        codes = torch.zeros(FEWEST_ROWS, codes.shape[1], dtype=codes.dtype, device=codes.device)
        codes[:rows] = x.codes
    product = torch.empty(len(codes), len(weight.codes), dtype=torch.int32, device=codes.device)
    int_mm(codes, weight.codes, product)
    values = product.view(torch.float32)
    if product.is_cuda:  # in one pass; on a CPU that would make a copy
        torch.mul(product[:rows], x.scale[:, None], out=values[:rows])
    else:
        values[:rows].copy_(product[:rows]).mul_(x.scale[:, None])
    return values[:rows]


def _finish(sums: Tensor, weight: OpenWeight, out: Tensor) -> None:
    """The weight's scales and the bias."""
    if weight.bias is None:
        torch.mul(sums, weight.scale, out=out)
    else:
        torch.addcmul(weight.bias, sums, weight.scale, out=out)


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


def _scaled_mm(x: Codes, weight: OpenWeight, fast: bool) -> Tensor:
    """With a scale a row, which gives bfloat16."""
    bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
    columns, scale = weight.codes.t(), x.scale[:, None]
    given = x.codes, columns, scale, weight.scale
    return torch._scaled_mm(*given, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _fp8_in_float32(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """Products of e4m3 codes are exact in float32, and summed in it; some columns at a time."""
    result = torch.empty(len(x.codes), len(weight.codes), dtype=dtype, device=x.codes.device)
    codes, scale = x.codes.float(), x.scale[:, None]
    for columns in row_chunks(*weight.codes.shape):
        y = (codes @ weight.codes[columns].float().t()).mul_(scale).mul_(weight.scale[:, columns])
        result[:, columns] = y if weight.bias is None else y.add_(weight.bias[columns])
    return result


def triton_linear(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """As `torch_linear`, by our kernel."""
    from lowvram_i2v.kernels import fused_gemm

    return fused_gemm.linear(x, weight, dtype)


def triton_multiplies(codes: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    scheme = next(name for name, dtype in CODES.items() if dtype == codes)
    return torch.cuda.get_device_capability(device) >= PRODUCTS[scheme].capability


@dataclass(frozen=True)
class Way:
    """One way to multiply codes by a weight of the same dtype, where it works. The result has the dtype asked for."""

    name: str
    linear: Callable[[Codes, OpenWeight, torch.dtype], Tensor]
    works_on: Callable[[torch.dtype, torch.device], bool]


WAYS = [
    Way("triton", triton_linear, triton_multiplies),
    Way("torch", torch_linear, lambda codes, device: device.type in ("cuda", "cpu")),
]


def way(codes: torch.dtype, device: torch.device) -> Way:
    """The best way for codes of a dtype on a device: the first one that is right there.

    Raises PlatformError with what is wrong with each if there is none. The first call for a card waits for it.
    """
    found = []
    for candidate in WAYS:
        if candidate.works_on(codes, device):
            fault = None if device.type == "cpu" else _fault(candidate, codes, device)
            if fault is None:
                return candidate
            found.append(f"{candidate.name} {fault}")
    named = f"no 8-bit product of {codes} on {device}" if not found else "; ".join(found)
    raise PlatformError(named, "Choose the compute w8a16.")


def by_library(op: str, codes: torch.dtype, device: torch.device) -> bool:
    """Whether torch's library is faster at an op than our kernel, on a CUDA card."""
    return device.type == "cuda" and (op, codes, torch.cuda.get_device_capability(device)[0]) in LIBRARY


def prepared(scheme: str, parts: dict[str, Tensor], bias: Tensor | None, rows: slice) -> OpenWeight:
    """A layer's rows made ready for many calls."""
    codes = parts["weight"][rows]
    if scheme == "int8":
        return OpenWeight(codes, parts["weight_scale"][rows].view(1, -1), None if bias is None else bias[rows].float())
    scale = parts["scale_weight"].view(1, 1).repeat(1, len(codes))
    return OpenWeight(codes, scale, None if bias is None else bias[rows])


def linear(x: Tensor, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """x [tokens, in] in any float dtype -> [tokens, out] in `dtype`, by the best way there is."""
    codes = weight.codes.dtype
    return way(codes, x.device).linear(quantized(x, codes), weight, dtype)


def trial(scheme: str, device: torch.device) -> str | None:
    """What is wrong with every way to multiply a scheme on a device, or None."""
    try:
        way(CODES[scheme], device)
    except PlatformError as error:
        return error.what
    return None


@cache
def _fault(candidate: Way, codes: torch.dtype, device: torch.device) -> str | None:
    """Multiplies small numbers on the device and on the CPU. What went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    x = quantized(torch.randn(48, 256, generator=generator), codes)
    drawn = torch.randn(96, 256, generator=generator) * 30
    scale, bias = torch.full((1, 96), 0.01), torch.randn(96, generator=generator)
    weight = OpenWeight(drawn.clamp_(-127, 127).to(codes), scale, bias)
    expected = torch_linear(x, weight, torch.float32)
    there = OpenWeight(weight.codes.to(device), scale.to(device), bias.to(device))
    try:
        moved = Codes(x.codes.to(device), x.scale.to(device))
        actual = candidate.linear(moved, there, torch.bfloat16).float().cpu()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises, this way is of no use
        return f"cannot multiply {codes} there: {type(error).__name__} {(str(error).strip() or '-').splitlines()[0]}"
    difference = float((actual - expected).norm() / expected.norm())
    return None if difference < 0.01 else f"multiplies {codes} there wrong by {difference:.2g}"
