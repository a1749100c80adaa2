# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton matrix product of 8-bit activations with 8-bit weights (W8A8), and what follows it, in one kernel.

    y[m, n] = sum_k a[m, k] * w[n, k] * a_scale[m] * w_scale[n] + bias[n]

The products are summed as they are (integers exactly, e4m3 in float32), the scales come after the sum. What follows,
while y is still in registers: nothing, or residual += gate * y with the first-frame rule; y itself is then never
rounded and never in memory.

GELU is not among it: its codes need the whole row's largest magnitude, which no tile knows, so a second kernel reads 16
bits and writes codes anyway. There GELU costs nothing; here it took 20 % of a product's time, which nothing covers.

Invariants: row offsets are 64-bit, row counts are no part of what is compiled; rows beyond the last are computed from
row 0 again and not stored; all widths are right, multiples of 16 load fastest.

e4m3 sums: Hopper's tensor cores add with few bits inside one instruction chain. `two_level` adds each K tile's sum in
float32, which costs registers, hence smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_i2v.kernels.fused_rows import on_device
from lowvram_i2v.kernels.w8a8 import Codes, OpenWeight, by_library, torch_linear


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of what one program multiplies at a time, its warps, and loads kept in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    two_level: bool = False


TILES = {
    (9, torch.int8): Tile(128, 128, 128, 4, 3),
    (9, torch.float8_e4m3fn): Tile(128, 256, 128, 8, 4),
}
"""Major compute capability and codes -> tile; TILE for all others. With int8 two programs share a multiprocessor: what
one does after its sums is hidden under the products of the other."""

TILE = Tile(128, 256, 64, 8, 4)
"""Fits the 99 KB of shared memory of RTX 30, 40 and 50: compiled for them by the tests, timed by nobody yet."""

GROUP = 8
"""Row tiles that share their columns' weights in the L2 cache."""


@triton.jit
def finish(
    sums, row, column, out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride, gate_stride,
    BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What comes after the sums of some rows and columns."""
    live_row, live_column = row < M, column < N
    live = live_row[:, None] & live_column[None, :]
    by_row = tl.load(a_scale + row, mask=live_row, other=0.0)
    by_column = tl.load(w_scale + column, mask=live_column, other=0.0)
    made = sums.to(tl.float32) * by_row[:, None] * by_column[None, :]
    if BIAS:
        made += tl.load(bias + column, mask=live_column, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    if GATED:
        own = tl.load(gate + column, mask=live_column, other=0.0).to(tl.float32)
        other = gate + tl.where(first_tokens > 0, gate_stride, 0)  # there may be no second vector
        first = tl.load(other + column, mask=live_column, other=0.0).to(tl.float32)
        chosen = tl.where((row < first_tokens)[:, None], first[None, :], own[None, :])
        made = tl.load(target, mask=live, other=0.0).to(tl.float32) + chosen * made
    tl.store(target, made.to(out.dtype.element_ty), mask=live)


@triton.jit
def finish_parts(
    sums, row, column, out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride, gate_stride,
    BM: tl.constexpr, BN: tl.constexpr, AT_ONCE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """`finish` for BN columns from `column` on, at most AT_ONCE of them together: beside the sums there are registers
    for the values of some columns only."""
    if BN > AT_ONCE:
        left, right = tl.split(tl.permute(tl.reshape(sums, [BM, 2, BN // 2]), [0, 2, 1]))
        finish_parts(left, row, column, out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride,
                     gate_stride, BM, BN // 2, AT_ONCE, BIAS, GATED)  # fmt: skip
        finish_parts(right, row, column + BN // 2, out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride,
                     gate_stride, BM, BN // 2, AT_ONCE, BIAS, GATED)  # fmt: skip
    else:
        finish(sums, row, column + tl.arange(0, BN), out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride,
               gate_stride, BIAS, GATED)  # fmt: skip


@triton.jit(do_not_specialize=["M", "first_tokens"])
def product_kernel(
    a, w, out, a_scale, w_scale, bias, gate, M, N, K, first_tokens,
    a_stride, w_stride, out_stride, gate_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, SUMS: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """WHOLE: BK divides K. SUMS: "int", "float", "two_level" or "scaled" (block scales of 1: the full rate of e4m3 on
    sm_120). GATED: out += gate * y, instead of out = y. AT_ONCE: as in `finish_parts`."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    inside = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    row = (group * GROUP + inside % height) * BM + tl.arange(0, BM)
    column = (inside // height) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    a_tile = a + tl.where(row < M, row, 0).to(tl.int64)[:, None] * a_stride + depth[None, :]
    w_tile = w + tl.where(column < N, column, 0).to(tl.int64)[:, None] * w_stride + depth[None, :]
    sums = tl.zeros([BM, BN], tl.int32 if SUMS == "int" else tl.float32)
    for start in range(0, K, BK):
        if WHOLE:
            x, y = tl.load(a_tile), tl.load(w_tile)
        else:
            x = tl.load(a_tile, mask=(start + depth < K)[None, :], other=0.0)
            y = tl.load(w_tile, mask=(start + depth < K)[None, :], other=0.0)
        if SUMS == "int":
            sums = tl.dot(x, tl.trans(y), sums, out_dtype=tl.int32)
        elif SUMS == "float":
            sums = tl.dot(x, tl.trans(y), sums)
        elif SUMS == "two_level":
            sums += tl.dot(x, tl.trans(y))
        else:
            one_a = tl.full([BM, BK // 32], 127, tl.uint8)
            one_w = tl.full([BN, BK // 32], 127, tl.uint8)
            sums = tl.dot_scaled(x, one_a, "e4m3", tl.trans(y), one_w, "e4m3", sums)
        a_tile += BK
        w_tile += BK
    column = (inside // height) * BN
    finish_parts(sums, row, column, out, a_scale, w_scale, bias, gate, M, N, first_tokens, out_stride, gate_stride,
                 BM, BN, AT_ONCE, BIAS, GATED)  # fmt: skip


def linear(x: Codes, weight: OpenWeight, dtype: torch.dtype) -> Tensor:
    """As `row_codes.linear`."""
    if by_library("linear", x.codes.dtype, x.codes.device):
        return torch_linear(x, weight, dtype, fast=True)
    out = torch.empty(len(x.codes), len(weight.codes), dtype=dtype, device=x.codes.device)
    launch(x, weight, out)
    return out


def linear_gated_residual_(residual: Tensor, x: Codes, weight: OpenWeight, gate: Tensor, first_tokens: int = 0) -> None:
    """As `row_codes.linear_gated_residual_`."""
    launch(x, weight, residual, gate=gate, first_tokens=first_tokens)


def launch(
    x: Codes,
    weight: OpenWeight,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    first_tokens: int = 0,
    tile: Tile | None = None,
) -> None:
    """out = y; with a gate, out += gate * y."""
    (rows, depth), columns = x.codes.shape, len(weight.codes)
    assert rows > 0
    assert weight.codes.shape == (columns, depth)
    assert weight.scale.numel() == columns
    assert out.shape == (rows, columns)
    assert x.codes.stride(1) == weight.codes.stride(1) == out.stride(1) == 1
    assert gate is None or gate.stride(1) == 1
    major = capability(out.device)
    tile = tile or tile_for(x.codes.dtype, major)
    at_once = 128 if gate is None else tile.warps * 1024 // tile.m  # 32 values a thread
    with on_device(out):
        product_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)](
            x.codes, weight.codes, out, x.scale, weight.scale, weight.scale if weight.bias is None else weight.bias,
            out if gate is None else gate, rows, columns, depth, first_tokens,
            x.codes.stride(0), weight.codes.stride(0), out.stride(0), 0 if gate is None else gate.stride(0),
            BM=tile.m, BN=tile.n, BK=tile.k, GROUP=GROUP, WHOLE=depth % tile.k == 0,
            SUMS=sums(x.codes.dtype, tile, major), BIAS=weight.bias is not None, GATED=gate is not None,
            AT_ONCE=at_once, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def tile_for(dtype: torch.dtype, major: int) -> Tile:
    """The tile for codes of a dtype on a card of this major compute capability."""
    return TILES.get((major, dtype), TILE)


def sums(dtype: torch.dtype, tile: Tile, major: int) -> str:
    """How the products of a tile are summed; see `product_kernel`."""
    if dtype == torch.int8:
        return "int"
    if major >= 12:
        return "scaled"
    return "two_level" if tile.two_level else "float"


@lru_cache
def capability(device: torch.device) -> int:
    """Major compute capability; in the interpreter on a CPU, that of RTX 30."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
