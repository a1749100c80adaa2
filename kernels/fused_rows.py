# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels that read and write rows once: norm + modulate, gated residual, GELU, and rows as 8-bit codes.

One program handles a row at a time and keeps it in registers, so each value crosses the memory bus once each way; rows
may be any distance apart. A row of 3072 values is a tile of 2048 and one of 1024, or three of 1024: tiles are powers of
two, and one of 4096 would leave a quarter of the threads idle.

Invariants: float32 inside, one rounding at the end; a row's result does not depend on the other rows; row offsets are
64-bit (119 200 rows of 21 504 values are more than 2^31), the row count is never part of what is compiled.

Codes of a row: value / scale with scale = largest magnitude / 127 (int8, rounded half to even) or / 448 (e4m3). A row
of zeros has the smallest normal scale. They are made from the float32 values, before any rounding to 16 bits.

Left out: derivatives. The plain definitions are in `modulate.py` and `row_codes.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.w8a8 import LARGEST, Codes

EPS = tl.constexpr(1e-6)
SMALLEST = tl.constexpr(2.0**-126)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to the nearest integer, ties to even."""
GELU_LINEAR = tl.constexpr(-2.302208198144325)
"""-2 * sqrt(2 / pi) * log2(e): GELU's tanh form is x / (1 + 2^(GELU_LINEAR * (x + GELU_CUBIC * x^3)))."""
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu_tanh(x):
    return x / (1.0 + tl.exp2((x * x * (GELU_CUBIC * GELU_LINEAR) + GELU_LINEAR) * x))


@triton.jit
def magnitudes(values):
    """As the bits of float32: integers order them the same, and what is no number comes out largest."""
    return tl.abs(values).to(tl.int32, bitcast=True)


@triton.jit
def magnitude(values):
    """Largest magnitude of a tile, as bits."""
    return tl.max(magnitudes(values), 0)


@triton.jit
def scale_of(bits, LARGEST: tl.constexpr):
    """Scale of a row whose largest magnitude is known by its bits."""
    scale = bits.to(tl.float32, bitcast=True) / LARGEST
    return tl.where(scale < SMALLEST, SMALLEST, scale)


@triton.jit
def encode(values, inverse, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """values / scale as codes. LARGEST is 127 for integers, 448 for e4m3; no value is beyond it but by rounding."""
    if LARGEST == 127:  # the sum's last bits are the integer
        return (values * inverse + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return (values * inverse).to(dtype)


@triton.jit
def rounded(values, inverse, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """As codes, or, with LARGEST 0, as they are."""
    if LARGEST:
        return encode(values, inverse, LARGEST, dtype)
    else:
        return values.to(dtype)


@triton.jit
def third(START: tl.constexpr, STEP: tl.constexpr):
    """Columns START .. START + STEP as [STEP / 4, 4]: the last axis keeps a thread to 4 columns side by side, so that
    what a warp reads at once is one stretch of memory, for float32 vectors, 16-bit rows and codes alike. Left to
    itself the compiler gives each thread as many columns as fill 16 bytes of codes: 64 bytes of a vector."""
    SIDE: tl.constexpr = 4 if STEP >= 4 else STEP
    return START + tl.arange(0, STEP // SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]


@triton.jit
def read_third(pointer, START: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """Zeros beyond WIDTH. KEEP: other rows read the same."""
    columns = third(START, STEP)
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if START + STEP <= WIDTH:
        return tl.load(pointer + columns, eviction_policy=policy)
    else:
        return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0, eviction_policy=policy)


@triton.jit
def read_row(x, row, x_stride, STEP: tl.constexpr, WIDTH: tl.constexpr):
    x += row.to(tl.int64) * x_stride
    a, b = read_third(x, 0, STEP, WIDTH, False), read_third(x, STEP, STEP, WIDTH, False)
    return a, b, read_third(x, 2 * STEP, STEP, WIDTH, False)


@triton.jit
def read_vectors(shift, scale, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """What a row is multiplied by, and what is added."""
    a = 1.0 + read_third(scale, 0, STEP, WIDTH, True).to(tl.float32)
    b = 1.0 + read_third(scale, STEP, STEP, WIDTH, True).to(tl.float32)
    c = 1.0 + read_third(scale, 2 * STEP, STEP, WIDTH, True).to(tl.float32)
    d = read_third(shift, 0, STEP, WIDTH, True).to(tl.float32)
    e = read_third(shift, STEP, STEP, WIDTH, True).to(tl.float32)
    return a, b, c, d, e, read_third(shift, 2 * STEP, STEP, WIDTH, True).to(tl.float32)


@triton.jit
def minus(values, mean, START: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """values - mean, zeros beyond WIDTH."""
    values -= mean
    if START + STEP > WIDTH:
        values = tl.where(third(START, STEP) < WIDTH, values, 0.0)
    return values


@triton.jit
def normed(a, b, c, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """A row in three parts of STEP columns: added part by part, threads exchange one number for each of its sums."""
    a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
    mean = tl.sum(tl.sum(a + b + c, 1), 0) / WIDTH
    a = minus(a, mean, 0, STEP, WIDTH)
    b = minus(b, mean, STEP, STEP, WIDTH)
    c = minus(c, mean, 2 * STEP, STEP, WIDTH)
    inverse = tl.rsqrt(tl.sum(tl.sum(a * a + b * b + c * c, 1), 0) / WIDTH + EPS)
    return a * inverse, b * inverse, c * inverse


@triton.jit
def write_third(pointer, values, code, START: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip # noqa: E501
    columns = third(START, STEP)
    stored = rounded(values, code, LARGEST, pointer.dtype.element_ty)
    if START + STEP <= WIDTH:
        tl.store(pointer + columns, stored)
    else:
        tl.store(pointer + columns, stored, mask=columns < WIDTH)


@triton.jit
def larger(a, b):
    """What is no number counts as the larger one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def write_row(out, out_scale, row, out_stride, a, b, c, STEP: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr):
    """As it is, or as codes with their scale."""
    code = 1.0
    if LARGEST:
        largest = larger(larger(tl.abs(a), tl.abs(b)), tl.abs(c))
        row_scale = scale_of(tl.max(tl.max(magnitudes(largest), 1), 0), LARGEST)
        code = 1.0 / row_scale
        tl.store(out_scale + row, row_scale)
    out += row.to(tl.int64) * out_stride
    write_third(out, a, code, 0, STEP, WIDTH, LARGEST)
    write_third(out, b, code, STEP, STEP, WIDTH, LARGEST)
    write_third(out, c, code, 2 * STEP, STEP, WIDTH, LARGEST)


@triton.jit(do_not_specialize=["first_tokens"])
def modulate_kernel(
    x, shift, scale, out, out_scale, first_tokens, x_stride, vector_stride, out_stride,
    WIDTH: tl.constexpr, STEP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    shift += tl.where(row < first_tokens, 1, 0) * vector_stride
    scale += tl.where(row < first_tokens, 1, 0) * vector_stride
    a, b, c = read_row(x, row, x_stride, STEP, WIDTH)
    a, b, c = normed(a, b, c, STEP, WIDTH)
    fa, fb, fc, sa, sb, sc = read_vectors(shift, scale, STEP, WIDTH)
    a, b, c = a * fa + sa, b * fb + sb, c * fc + sc
    write_row(out, out_scale, row, out_stride, a, b, c, STEP, WIDTH, LARGEST)


@triton.jit(do_not_specialize=["first_tokens"])
def gated_residual_kernel(
    x, y, gate, first_tokens, x_stride, y_stride, vector_stride,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    gate += tl.where(row < first_tokens, 1, 0) * vector_stride
    a = tl.arange(0, A)
    ya = tl.load(y + a).to(tl.float32)
    xa = tl.load(x + a)
    if B:
        b = A + tl.arange(0, B)
        live = b < WIDTH
        yb = tl.load(y + b, mask=live, other=0.0).to(tl.float32)
        xb = tl.load(x + b, mask=live, other=0.0)
        sum_b = xb.to(tl.float32) + tl.load(gate + b, mask=live, other=0.0).to(tl.float32) * yb
        tl.store(x + b, sum_b.to(xb.dtype), mask=live)
    tl.store(x + a, (xa.to(tl.float32) + tl.load(gate + a).to(tl.float32) * ya).to(xa.dtype))


@triton.jit
def read_tile(pointer, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Columns START .. START + BLOCK of a row as float32, zeros beyond WIDTH, through GELU or not."""
    columns = START + tl.arange(0, BLOCK)
    if START + BLOCK <= WIDTH:
        values = tl.load(pointer + columns).to(tl.float32)
    else:
        values = tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if GELU:
        values = gelu_tanh(values)
    return values


@triton.jit
def write_tile(pointer, values, inverse, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip # noqa: E501
    columns = START + tl.arange(0, BLOCK)
    stored = rounded(values, inverse, LARGEST, pointer.dtype.element_ty)
    if START + BLOCK <= WIDTH:
        tl.store(pointer + columns, stored)
    else:
        tl.store(pointer + columns, stored, mask=columns < WIDTH)


@triton.jit
def rows_kernel(
    first, second, out, out_scale, first_stride, second_stride, out_stride,
    FIRST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SECOND: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    GELU: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Row of `first` (tiles A, B), then row of `second` (tiles C, D) through GELU or not, as one row of `out`.

    LARGEST 0: no codes.
    """
    row = tl.program_id(0)
    first += row.to(tl.int64) * first_stride
    second += row.to(tl.int64) * second_stride
    out += row.to(tl.int64) * out_stride
    if A:
        va = read_tile(first, 0, FIRST, A, False)
    if B:
        vb = read_tile(first, A, FIRST, B, False)
    vc = read_tile(second, 0, SECOND, C, GELU)
    if D:
        vd = read_tile(second, C, SECOND, D, GELU)
    inverse = 1.0
    if LARGEST:
        largest = magnitude(vc)
        if D:
            largest = tl.maximum(largest, magnitude(vd))
        if A:
            largest = tl.maximum(largest, magnitude(va))
        if B:
            largest = tl.maximum(largest, magnitude(vb))
        row_scale = scale_of(largest, LARGEST)
        inverse = 1.0 / row_scale
        tl.store(out_scale + row, row_scale)
    if A:
        write_tile(out, va, inverse, 0, FIRST, A, LARGEST)
    if B:
        write_tile(out, vb, inverse, A, FIRST, B, LARGEST)
    write_tile(out + FIRST, vc, inverse, 0, SECOND, C, LARGEST)
    if D:
        write_tile(out + FIRST, vd, inverse, C, SECOND, D, LARGEST)


def tiles(width: int) -> tuple[int, int]:
    """Two powers of two that cover a row: the largest one in it, and the smallest one over the rest (0: no rest)."""
    first = 1 << (width.bit_length() - 1) if width else 0
    return first, triton.next_power_of_2(width - first) if width > first else 0


def warps(width: int) -> int:
    """At most 64 values of a row in each thread."""
    return 1 if width <= 512 else 4 if width <= 4096 else 8


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int, out: Tensor) -> None:
    """As `modulate.layer_norm_modulate_into`."""
    launch_modulate(x, shift, scale, first_tokens, out, None, warps(x.shape[1]))


def layer_norm_modulate_codes(x: Tensor, shift: Tensor, scale: Tensor, first_tokens: int, dtype: torch.dtype) -> Codes:
    """As `row_codes.layer_norm_modulate_codes`."""
    made = Codes.empty(len(x), x.shape[1], dtype, x.device)
    launch_modulate(x, shift, scale, first_tokens, made.codes, made.scale, min(warps(x.shape[1]), 2))
    return made


def launch_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    first_tokens: int,
    out: Tensor,
    out_scale: Tensor | None,
    num_warps: int,
) -> None:
    rows, width = x.shape
    check_rows(x, shift, scale, out)
    if shift.stride(0) != scale.stride(0):
        shift, scale = shift.contiguous(), scale.contiguous()
    with on_device(x):
        modulate_kernel[(rows,)](
            x, shift, scale, out, out if out_scale is None else out_scale, first_tokens,
            x.stride(0), shift.stride(0), out.stride(0),
            WIDTH=width, STEP=triton.next_power_of_2(triton.cdiv(width, 3)),
            LARGEST=0 if out_scale is None else int(LARGEST[out.dtype]), num_warps=num_warps,
        )  # fmt: skip


def gated_residual_(x: Tensor, y: Tensor, gate: Tensor, first_tokens: int = 0) -> None:
    """As `modulate.gated_residual_`."""
    rows, width = x.shape
    check_rows(x, y, gate)
    a, b = tiles(width)
    with on_device(x):
        gated_residual_kernel[(rows,)](
            x, y, gate, first_tokens, x.stride(0), y.stride(0), gate.stride(0),
            WIDTH=width, A=a, B=b, num_warps=warps(width),
        )  # fmt: skip


def gelu(x: Tensor, out: Tensor) -> None:
    """As `row_codes.gelu`."""
    launch_rows(None, x, out, None, gelu=True)


def row_codes(x: Tensor, dtype: torch.dtype) -> Codes:
    """As `row_codes.row_codes`."""
    made = Codes.empty(len(x), x.shape[1], dtype, x.device)
    launch_rows(None, x, made.codes, made.scale)
    return made


def gelu_codes(hidden: Tensor, dtype: torch.dtype, beside: Tensor | None = None) -> Codes:
    """As `row_codes.gelu_codes`."""
    rows, width = hidden.shape
    made = Codes.empty(rows, width + (0 if beside is None else beside.shape[1]), dtype, hidden.device)
    launch_rows(beside, hidden, made.codes, made.scale, gelu=True)
    return made


def launch_rows(first: Tensor | None, second: Tensor, out: Tensor, scale: Tensor | None, gelu: bool = False) -> None:
    rows, width = second.shape
    before = 0 if first is None else first.shape[1]
    assert out.shape == (rows, before + width)
    first = second if first is None else first
    check_rows(first, second, out)
    (a, b), (c, d) = tiles(before), tiles(width)
    with on_device(second):
        rows_kernel[(rows,)](
            first, second, out, out if scale is None else scale, first.stride(0), second.stride(0), out.stride(0),
            FIRST=before, A=a, B=b, SECOND=width, C=c, D=d, GELU=gelu,
            LARGEST=0 if scale is None else int(LARGEST[out.dtype]), num_warps=warps(width),
        )  # fmt: skip


def check_rows(*tensors: Tensor) -> None:
    """The kernels step through a row one value at a time; a grid has at least one row."""
    for tensor in tensors:
        assert tensor.dim() == 2
        assert len(tensor) > 0
        assert tensor.stride(1) == 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
